"""What an attack is: a program over slots, so that samples at different iterations share one batch.

Each sample's trajectory depends on that sample alone. An attack therefore keeps its state as tensors with one row per
slot, advances all slots by one query of the model, and holds no number that is common to the batch. Who runs it may
keep a batch fixed (`Attack.__call__`) or hand a finished slot the next sample (the evaluation's scheduler): the
trajectories are the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from dualhead.noise import Streams
from dualhead.registry import Registry
from dualhead.threat import ThreatModel

LogitsFn = Callable[[Tensor], Tensor]
"""Images float32 [B, ...] in [0, 1] to logits [B, C]."""

State = dict[str, Tensor]
"""Tensors with one row per slot. Every attack keeps: `x`, `y` (clean image, label), `adversarial` (the best example so
far: float32, like x), `found` (bool: the logits that the attack saw misclassify `adversarial`), `iteration` (int64:
steps taken)."""


class Query:
    """Access to the model that counts passes, in images.

    Args:
        logits_fn: the model under attack; the attack may differentiate through it with respect to its input.
        heads_fn: images to the logits of all heads [B, H, C], for attacks that use them; None if the model has one.
    """

    def __init__(self, logits_fn: LogitsFn, heads_fn: LogitsFn | None = None) -> None:
        self._logits_fn = logits_fn
        self.heads_fn = heads_fn
        self.forward_passes = 0
        self.backward_passes = 0

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, C] without a graph: one forward pass."""
        self.forward_passes += x.shape[0]
        with torch.no_grad():
            return self._logits_fn(x).float()

    def gradient(self, x: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """One forward pass and one backward pass to the input.

        Args:
            x: images [B, ...].
            loss: logits [B, C] to one number per image [B].

        Returns:
            Logits [B, C], losses [B] and gradients [B, ...] of each image's own loss, all detached.
        """
        self.forward_passes += x.shape[0]
        self.backward_passes += x.shape[0]
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = self._logits_fn(x).float()
            losses = loss(logits)
            (gradient,) = torch.autograd.grad(losses.sum(), x)
        return logits.detach(), losses.detach(), gradient


class Attack(ABC):
    """A way to look for adversarial examples within a threat model: one search, or several in turn.

    Subclasses are frozen dataclasses registered in `attacks`.
    """

    registered_name: ClassVar[str]

    @abstractmethod
    def parts(self, num_classes: int, threat: ThreatModel) -> Sequence[Search]:
        """The searches to run in turn, each on what the ones before it left.

        Raises:
            UserError: if the attack cannot be used with that many classes or that threat model.
        """

    def __call__(
        self,
        logits_fn: LogitsFn,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | Streams,
    ) -> Tensor:
        """Adversarial examples for a batch, float32 like x, inside ball and box.

        A row is the first example found that is misclassified or, where none is, the last job's strongest one.
        """
        streams = Streams.drawn_from(generator, x.shape[0], x.device)
        query = Query(logits_fn)
        clean = query.logits(x)
        result, found = x.clone(), clean.argmax(1) != y
        for part_index, part in enumerate(self.parts(clean.shape[1], threat)):
            for job in range(part.jobs(clean.shape[1])):
                open_rows = (~found).nonzero()[:, 0]
                if not len(open_rows):
                    return result
                state = part.begin(
                    x[open_rows],
                    y[open_rows],
                    clean[open_rows],
                    torch.full_like(open_rows, job),
                    threat,
                    streams[open_rows].fork(part_index),
                )
                for _ in range(part.max_steps()):
                    state = part.step(state, query, threat)
                example = threat.confine(state["adversarial"], x[open_rows])
                result[open_rows] = example
                found[open_rows] = query.logits(example).argmax(1) != y[open_rows]
        return result


class Search(Attack):
    """An attack that is one program over slots.

    A sample is searched by `jobs` independent tries (restarts, targets), in order, until one of them succeeds; a job
    takes at most `max_steps` calls of `step`.
    """

    def parts(self, num_classes: int, threat: ThreatModel) -> Sequence[Search]:
        """Itself."""
        del num_classes, threat
        return (self,)

    def jobs(self, num_classes: int) -> int:
        """How many tries a sample gets at most."""
        del num_classes
        return 1

    @abstractmethod
    def max_steps(self) -> int:
        """How many calls of `step` complete a job."""

    @abstractmethod
    def begin(self, x: Tensor, y: Tensor, clean: Tensor, job: Tensor, threat: ThreatModel, streams: Streams) -> State:
        """The state of fresh slots; asks the model nothing.

        Args:
            x: clean images, float32 [B, ...] in [0, 1].
            y: labels, int64 [B].
            clean: logits of x, float32 [B, C].
            job: which try, int64 [B], in [0, jobs).
            threat: ball and box.
            streams: randomness of these samples for this attack; a job's own is `streams.fork(job)`.
        """

    @abstractmethod
    def step(self, state: State, query: Query, threat: ThreatModel) -> State:
        """All slots one iteration further. Rows whose `iteration` has reached `max_steps` may hold anything."""


@runtime_checkable
class Maximiser(Protocol):
    """An attack that adversarial training can use: it climbs any loss, and gives its last iterate."""

    def maximise(
        self, logits_fn: LogitsFn, x: Tensor, loss: Callable[[Tensor], Tensor], threat: ThreatModel, streams: Streams
    ) -> Tensor:
        """Perturbed images [B, ...] inside ball and box.

        Args:
            logits_fn: the model under attack.
            x: clean images [B, ...] in [0, 1].
            loss: logits [B, C] to one number per image [B], climbed.
            threat: ball and box.
            streams: randomness of these samples.
        """


attacks: Registry[Attack] = Registry("attack", "dualhead.attacks")
