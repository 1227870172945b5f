"""Attacks: programs over slots, so that samples at different iterations share one batch.

Each sample's trajectory depends on that sample alone. An attack therefore keeps its state as tensors with one row per
slot, advances all slots by one query of the model, and holds no number that is common to the batch. A caller may keep
a batch fixed (`Attack.__call__`) or hand a finished slot the next sample (the evaluation's scheduler): the trajectories
are the same.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor

from dualhead.components.fields import at_least, whole
from dualhead.components.registry import Registry
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats import Threat

LogitsFn = Callable[[Tensor], Tensor]
"""Images float32 [B, ...] in [0, 1] to logits [B, C]."""

LossFn = Callable[[Tensor], Tensor]
"""Logits [B, C] to one number per image [B]."""

Climb = Callable[[Tensor], Tensor]
"""Points of a threat [B, ...], for norms images, to the values climbed [B], with a graph to the points."""

State = dict[str, Tensor]
"""Tensors with one row per slot, no two of which share memory, so that rows can be assigned in place.

Every attack keeps: `x`, `y` (the origin of the clean image among the threat's points, which for a norm is the image;
label), `adversarial` (the best point so far: float32, like x), `found` (bool: the logits that the attack saw
misclassify `adversarial`, as its goal if it has one, within the threat model), `iteration` (int64: steps taken). A
caller that rejects an example sets `found` to False; the attack then offers its next one. It may keep `over` (bool): no
further step will find or change anything.
"""


def per_slot(values: Tensor, like: Tensor) -> Tensor:
    """Return a view of values [B] that broadcasts over the rows of `like` [B, ...]."""
    return values.reshape(-1, *(1 for _ in like.shape[1:]))


def require_at_least_one(attack: object, *fields: str) -> None:
    """Refuse numbers that are below 1 or not whole.

    Raises:
        UserError: naming the field.
    """
    for field in fields:
        at_least(1, field, getattr(attack, field))
        whole(field, getattr(attack, field))


def class_by_rank(clean: Tensor, y: Tensor, rank: Tensor) -> Tensor:
    """Return the class, int64 [B], that the clean logits rank at `rank` (from 1) among all but the true one."""
    others = clean.scatter(1, y[:, None], torch.inf)
    return others.argsort(1).gather(1, clean.shape[1] - 1 - rank[:, None])[:, 0]


def predictions(logits: Tensor) -> Tensor:
    """Return the class of the highest logit, int64 [B] of [B, C]; -1, which is no class, where a logit is NaN."""
    return logits.argmax(1).masked_fill(logits.isnan().any(1), -1)


def _full_precision(logits: Tensor) -> Tensor:
    """Return logits as float32, or as float64 if the model works in that."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _input_gradient(losses: Tensor, x: Tensor, *, keep: bool = False) -> Tensor:
    """Return the gradient [B, ...] of each image's own loss; `keep` the graph for further losses."""
    if not losses.requires_grad:  # a model that lets no gradient through has a gradient of zero
        return torch.zeros_like(x)
    with torch.enable_grad():  # the caller may have turned gradients off around the whole attack
        total = losses.sum()
    (gradient,) = torch.autograd.grad(total, x, retain_graph=keep, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


def slope(climb: Climb, x: Tensor) -> Tensor:
    """Return the gradient [B, ...] at x of each image's own value, detached: one forward and one backward pass."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        values = climb(x)
    return _input_gradient(values, x)


@dataclasses.dataclass
class _Passes:
    forward: int = 0
    backward: int = 0


class Query:
    """Model under attack, with a count of passes in images.

    Args:
        logits_fn: the model under attack; the attack may differentiate through it with respect to its input.
        outputs_fn: images to the logits of all heads and, last, of the aggregate: [B, H + 1, C], from one pass; for
            attacks that use the heads. None if the model has one head.
    """

    repeatable: bool = False
    """Whether the same point is known to get the same answer every time, to the bit, whatever else is in its batch."""

    def __init__(self, logits_fn: LogitsFn, outputs_fn: LogitsFn | None = None) -> None:
        self._logits_fn = logits_fn
        self._outputs_fn = outputs_fn
        self._passes = _Passes()

    @property
    def forward_passes(self) -> int:
        """Number of images that went through the model."""
        return self._passes.forward

    @forward_passes.setter
    def forward_passes(self, count: int) -> None:
        self._passes.forward = count

    @property
    def backward_passes(self) -> int:
        """Number of images that a gradient was taken to."""
        return self._passes.backward

    @backward_passes.setter
    def backward_passes(self, count: int) -> None:
        self._passes.backward = count

    def through(self, render: LogitsFn) -> Self:
        """Return a query of the same model at points that `render` makes images of; passes count in both."""
        ask, ask_heads, rendered = self._logits_fn, self._outputs_fn, copy.copy(self)
        rendered._logits_fn = lambda point: ask(render(point))
        rendered._outputs_fn = None if ask_heads is None else lambda point: ask_heads(render(point))
        return rendered

    def num_heads(self, x: Tensor) -> int:
        """Return the number of heads that the model shows, from a look at one image; 1 if it shows none."""
        if self._outputs_fn is None:
            return 1
        self.forward_passes += 1
        with torch.no_grad():
            return self._outputs_fn(x[:1]).shape[1] - 1

    def ask(self, x: Tensor) -> Tensor:
        """Return logits [B, C] with a graph, for code that takes its gradients itself; counts a pass each way."""
        self.forward_passes += x.shape[0]
        if torch.is_grad_enabled() and x.requires_grad:
            self.backward_passes += x.shape[0]
        return _full_precision(self._logits_fn(x))

    def logits(self, x: Tensor) -> Tensor:
        """Return logits [B, C] without a graph: one forward pass."""
        self.forward_passes += x.shape[0]
        with torch.no_grad():
            return _full_precision(self._logits_fn(x))

    def gradient(self, x: Tensor, loss: LossFn) -> tuple[Tensor, Tensor, Tensor]:
        """Run one forward pass and one backward pass to the input.

        Args:
            x: images [B, ...].
            loss: logits [B, C] to one number per image [B].

        Returns:
            Logits [B, C], losses [B] and gradients [B, ...] of each image's own loss, all detached.
        """
        return self._gradient(self._logits_fn, x, loss)

    def outputs_gradient(self, x: Tensor, loss: LossFn) -> tuple[Tensor, Tensor, Tensor]:
        """Do as `gradient`, with the logits of all heads and, last, of the aggregate: [B, H + 1, C].

        Raises:
            UserError: if the model has one head.
        """
        if self._outputs_fn is None:
            raise UserError("this attack needs the logits of several heads, and the model has one head")
        return self._gradient(self._outputs_fn, x, loss)

    def gradients(self, x: Tensor, losses: Callable[[Tensor], Iterable[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Run one forward pass, and one backward pass to the input for each of several losses.

        Args:
            x: images [B, ...].
            losses: logits [B, C] to losses [B].

        Yields:
            Losses [B] and their gradients [B, ...], detached; the caller decides how many are kept in memory.
        """
        self.forward_passes += x.shape[0]
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = _full_precision(self._logits_fn(x))
            all_losses = list(losses(logits))
        for loss in all_losses:
            yield loss.detach(), self._backward(loss, x, keep=True)

    def _gradient(self, model: LogitsFn, x: Tensor, loss: LossFn) -> tuple[Tensor, Tensor, Tensor]:
        self.forward_passes += x.shape[0]
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = _full_precision(model(x))
            losses = loss(logits)
        return logits.detach(), losses.detach(), self._backward(losses, x)

    def _backward(self, losses: Tensor, x: Tensor, *, keep: bool = False) -> Tensor:
        self.backward_passes += x.shape[0]
        return _input_gradient(losses, x, keep=keep)


class Attack(ABC):
    """A search for adversarial examples within a threat model, or several searches in turn.

    Subclasses are frozen dataclasses registered in `attacks`.
    """

    registered_name: ClassVar[str]
    short_numbers: ClassVar[tuple[str, ...]]
    always_numbered: ClassVar[bool] = False
    """Whether the label shows the numbers of the short form even where they are the defaults: `pgd-40`."""
    needs_heads: ClassVar[bool] = False
    """Whether it attacks only models that show the logits of several heads."""
    norms: ClassVar[tuple[str, ...] | None] = None
    """The threats for which it is defined, by `Threat.family`; None for any, since it only calls its methods."""

    @property
    def single_step(self) -> bool:
        """Whether training with it takes one gradient for each image: it may overfit catastrophically."""
        return False

    @property
    def begins_clean(self) -> bool:
        """Whether it takes its first gradient at the very images that it perturbs."""
        return False

    @property
    def label(self) -> str:
        """Name in results: the registered one, and fields that are not at their defaults: `square-1000(p_init=0.5)`."""
        given = getattr(self, "_label", None)
        if given is not None:
            return str(given)
        fields = [f for f in dataclasses.fields(cast("Any", self)) if f.init]
        changed = {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}
        numbers = self.short_numbers if self.always_numbered or changed.keys() & set(self.short_numbers) else ()
        name = "-".join([self.registered_name, *(str(getattr(self, number)) for number in numbers)])
        others = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in changed.items() if k not in numbers]
        return f"{name}({','.join(others)})" if others else name

    def labelled(self, label: str) -> Self:
        """Return the same attack under another label."""
        named = copy.copy(self)
        object.__setattr__(named, "_label", label)
        return named

    def notes(self, num_classes: int) -> list[str]:
        """Return caveats for a reader of its results, a sentence each; empty where nothing deviates."""
        del num_classes
        return []

    def for_classes(self, names: Sequence[str]) -> Self:
        """Return the attack on a model whose classes have these names, in their order."""
        del names
        return self

    def takes(self, threat: Threat) -> bool:
        """Tell whether the attack is defined for a threat."""
        return self.norms is None or threat.family in self.norms

    def check(self, threat: Threat) -> None:
        """Refuse a threat for which the attack is not defined.

        Raises:
            UserError: naming both, and attacks that can be used.
        """
        if self.takes(threat):
            return
        others = [name for name in attacks.names() if attacks.get(name).norms is None]
        raise UserError(
            f"attack {self.registered_name} is defined for {', '.join(self.norms or ())}, not for threat "
            f"{threat.kind}; use {', '.join(others[:-1])} or {others[-1]}"
        )

    @abstractmethod
    def parts(self, num_classes: int, threat: Threat, num_heads: int = 1) -> Sequence[Search]:
        """Return the searches to run in turn, each on the samples that those before it left; their labels differ.

        Args:
            num_classes: number of logits that the model gives.
            threat: one that `check` lets pass.
            num_heads: number of heads that the model shows; 1 if it shows none.

        Raises:
            UserError: if the attack cannot be used with that model.
        """

    def __call__(
        self,
        logits_fn: LogitsFn,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        *,
        generator: torch.Generator | Streams,
        outputs_fn: LogitsFn | None = None,
    ) -> Tensor:
        """Return adversarial examples for a batch, float32 like x, within the threat's budget.

        A row is the first example found that is misclassified, by a targeted attack as it wants, or else the last
        job's strongest one.

        Args:
            logits_fn: the model under attack, images to logits [B, C].
            x: clean images, float32 [B, ...] in [0, 1].
            y: labels, int64 [B].
            threat: what the adversary may do.
            generator: randomness.
            outputs_fn: images to the logits of all heads and, last, of the aggregate [B, H + 1, C], if there are heads.

        Raises:
            UserError: if the attack cannot be used with that model or that threat.
        """
        return self.search(Query(logits_fn, outputs_fn), x, y, threat, generator)

    def search(
        self, query: Query, x: Tensor, y: Tensor, threat: Threat, generator: torch.Generator | Streams
    ) -> Tensor:
        """Attack as a call does, on a query that the caller keeps for its counts of passes."""
        self.check(threat)
        threat = threat.for_images(x.shape[1:])
        return threat.render(self.search_points(query.through(threat.render), threat.lift(x), y, threat, generator))

    def search_points(
        self, query: Query, x: Tensor, y: Tensor, threat: Threat, generator: torch.Generator | Streams
    ) -> Tensor:
        """Search between `lift` and `render`: from origins x, on a query of points, to points."""
        streams = Streams.drawn_from(generator, x.shape[0], x.device)
        clean, num_heads = query.logits(x), query.num_heads(x[:1])
        result, found = x.clone(), predictions(clean) != y
        fooled = found.clone()
        for part_index, part in enumerate(self.parts(clean.shape[1], threat, num_heads)):
            goal = part.goal(clean, y)
            if goal is not None:
                found = found | (goal == y)
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
                answer = predictions(query.logits(example))
                within = threat.distance(example, x[open_rows]) <= threat.eps
                wrong = (answer != y[open_rows]) & within
                wanted = wrong if goal is None else (answer == goal[open_rows]) & within
                # A wrong answer that is not the wanted one is worth more than a later right one.
                worse = per_slot(fooled[open_rows] & ~wrong, example)
                result[open_rows] = torch.where(worse, result[open_rows], example)
                fooled[open_rows] |= wrong
                found[open_rows] = wanted
        return result


class Search(Attack):
    """An attack that is one program over slots.

    A sample is searched by `jobs` independent tries (restarts, targets), in order, until one of them succeeds; a job
    takes at most `max_steps` calls of `step`.
    """

    uses_gradients: ClassVar[bool] = True
    """Whether it may ask for gradients. One that never does loses nothing by reduced precision: it only compares."""
    stops_at_cycles: ClassVar[bool] = False
    """Whether it uses `Query.repeatable` to end where it would only repeat itself."""

    def parts(self, num_classes: int, threat: Threat, num_heads: int = 1) -> Sequence[Search]:
        """Return the search itself."""
        del threat, num_heads
        if num_classes < 2:
            raise UserError(f"an attack needs at least 2 classes, and the model gives {num_classes} logit per image")
        return (self,)

    def jobs(self, num_classes: int) -> int:
        """Return the most tries that a sample gets."""
        del num_classes
        return 1

    def goal(self, clean: Tensor, y: Tensor) -> Tensor | None:
        """Return the class that each image is to be taken for, int64 [B]; None for any but its label.

        Where it is the label there is nothing to do, and the image is not attacked.

        Args:
            clean: logits of the clean images [B, C].
            y: labels, int64 [B].
        """
        del clean, y
        return None

    @abstractmethod
    def max_steps(self) -> int:
        """Return the number of calls of `step` that complete a job."""

    @abstractmethod
    def begin(self, x: Tensor, y: Tensor, clean: Tensor, job: Tensor, threat: Threat, streams: Streams) -> State:
        """Return the state of fresh slots, without asking the model.

        Args:
            x: origins, float32 [B, ...]: for norms the clean images.
            y: labels, int64 [B].
            clean: logits of the clean images, float32 [B, C].
            job: number of the try, int64 [B], in [0, jobs).
            threat: what the adversary may do, for images of this shape.
            streams: randomness of these samples for this attack; a job's own is `streams.fork(job)`.
        """

    @abstractmethod
    def step(self, state: State, query: Query, threat: Threat) -> State:
        """Advance all slots by one iteration. Rows whose `iteration` has reached `max_steps` may hold anything."""


@runtime_checkable
class LooksAhead(Protocol):
    """A search that knows its next steps as long as nothing is found, so that several can share one query."""

    def leap(self, state: State, query: Query, threat: Threat, count: int) -> State:
        """Do up to `count` calls of `step` at once, with `count` rows a slot in one query.

        A slot goes as far as its first step that changes something, which `iteration` tells, and never beyond
        `max_steps`. The queries after that step were in vain.
        """


@runtime_checkable
class Maximiser(Protocol):
    """An attack that adversarial training can use: it climbs any value, and gives its last iterate."""

    def maximise(self, climb: Climb, x: Tensor, threat: Threat, streams: Streams) -> Tensor:
        """Return points [B, ...] within the budget. To give and get images, call `maximise_within`.

        Args:
            climb: points to the values climbed [B], with a graph to the points.
            x: origins [B, ...]: for norms the clean images.
            threat: what the adversary may do, for images of this shape.
            streams: randomness of these samples.
        """


def refuse_untrainable(attack: Attack, key: str = "attack") -> None:
    """Refuse an attack that adversarial training cannot use, or one with settings that it would leave out.

    Args:
        attack: with its settings.
        key: where it stands.

    Raises:
        UserError: naming the key.
    """
    if not isinstance(attack, Maximiser):
        raise UserError(f"{key} {attack.registered_name!r} cannot be trained with; use pgd or fgsm")
    for field in dataclasses.fields(cast("Any", attack)):
        if field.name in ("loss", "restarts", "target") and getattr(attack, field.name) != field.default:
            raise UserError(
                f"{key}.{field.name}: is for measuring; training climbs its objective's loss, once. Leave it out"
            )


def maximise_within(attack: Maximiser, climb: Climb, x: Tensor, threat: Threat, streams: Streams) -> Tensor:
    """Return attacked images [B, ...] in [0, 1], detached: lift the images, climb, and render the last point.

    Args:
        attack: how to climb.
        climb: images to the values climbed [B], with a graph to the images.
        x: clean images [B, ...] in [0, 1].
        threat: what the adversary may do.
        streams: randomness of these samples.

    Raises:
        UserError: for images that the threat cannot change.
    """
    threat = threat.for_images(x.shape[1:])
    return threat.render(attack.maximise(lambda p: climb(threat.render(p)), threat.lift(x), threat, streams))


attacks: Registry[Attack] = Registry("attack", "dualhead.attacks", Attack)
