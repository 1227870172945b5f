"""Noise that makes images easy, so that nothing is left to learn from them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import torch
from torch import Tensor, nn

from dualhead.components.fields import Real
from dualhead.data.poisons.base import poisons
from dualhead.data.poisons.search import BATCH, Found, Projected, Surrogate, Workbench
from dualhead.data.poisons.searched import Searched
from dualhead.data.split import Split
from dualhead.errors import Interrupted, RunError, UserError
from dualhead.noise import Streams
from dualhead.system.modes import in_eval_mode
from dualhead.threats import ThreatModel

_log = logging.getLogger(__name__)

CLIP: Final = 5.0
"""Norm of the gradient at which the training between two searches is cut, as published."""


@poisons.register("error_minimising")
@dataclass(frozen=True)
class ErrorMinimising(Searched):
    """Noise of each image that lowers the loss of a network which learns from the noisy images meanwhile; labels stay.

    It solves min over theta and d of CE(f(x + d), y) in turns. A network that trains on such images errs on none of
    them, learns the noise, and fails on clean ones. Adversarial training with a larger eps than the noise restores
    most. Made for each image, not for each class.

    When: as the standard poison that is to make data useless for natural training, beside `class_noise`, which costs
    nothing.

    Paper: Huang et al. 2021, Unlearnable examples: making personal data unexploitable (EM), arXiv 2101.04898.

    Args:
        norm: of the noise.
        eps: its radius, images in [0, 1].
        steps: of projected gradient in a round.
        step_size: length of a step, in the units of eps; None for eps / 10.
        batches: of training in a round, by the optimiser of the victim's first stage.
        error: share of the training images that the network may still get wrong when the search ends.
        rounds: at most; the record tells the error that was reached.
        share: of all images.
        seed: of the network, of the order of its batches, and of the choice of images.
    """

    norm: Literal["Linf", "L2"] = "Linf"
    eps: Real = 8 / 255
    steps: int = 20
    step_size: Real | None = None
    batches: int = 10
    error: Real = 0.01
    rounds: int = 50
    share: Real = 1.0
    seed: int = 0

    def search(self) -> Alternating:
        """See `Searched.search`."""
        return Alternating(
            Surrogate(seed=1_000_003 + self.seed), ThreatModel(self.norm, self.eps), self.seed, self.steps,
            self.eps / 10 if self.step_size is None else self.step_size, towards=True, batches=self.batches,
            error=self.error, rounds=self.rounds,
        )  # fmt: skip


@dataclass(frozen=True)
class Alternating(Projected):
    """A search that trains its surrogate on what it has found so far, in turns (error-minimising noise).

    The surrogate begins untrained. In each round it learns from some batches of the changed images, and the search
    goes on from there for `steps` steps on every image. It ends where the surrogate hardly errs on them. A search that
    is stopped begins anew.

    Args:
        batches: of training in a round.
        error: share of the training images that the surrogate may still get wrong.
        rounds: at most.
    """

    trained: ClassVar[bool] = False

    batches: int = 10
    error: float = 0.01
    rounds: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.batches >= 1 and self.rounds >= 1 and 0 < self.error < 1):
            raise UserError(
                f"batches and rounds must be at least 1 and error in (0, 1), got {self.batches}, {self.rounds} and "
                f"{self.error:g}"
            )

    @property
    def cost(self) -> str:
        """See `Search.cost`."""
        return (
            f"in each of at most {self.rounds} rounds {self.steps} forward and backward passes for each changed image "
            f"and {self.batches} batches of training"
        )

    def find(self, clean: Split, index: Tensor, labels: Tensor, bench: Workbench) -> Found:
        """See `Search.find`.

        Raises:
            Interrupted: when the run is stopped.
            RunError: if the surrogate's loss is not finite.
        """
        made = Turns(self, clean, index, labels, bench)
        error, rounds = 1.0, 0
        while rounds < self.rounds and error > self.error:
            if bench.stopped():
                raise Interrupted("stopped while noise was made; the same command begins it anew")
            made.train(rounds)
            made.search()
            error = made.error()
            rounds += 1
        if error > self.error:
            _log.warning(
                "data.poison: after %d rounds the surrogate still errs on %.1f %% of training images (wanted: %g %%)",
                rounds, 100 * error, 100 * self.error,
            )  # fmt: skip
        passes = rounds * (self.steps * len(index) + self.batches * bench.batch_size)
        return Found(made.images, passes, passes, surrogate={"rounds": rounds, "training_error": error})


class Turns:
    """A network that learns from changed images, and changes that follow it.

    Args:
        search: how.
        clean: all images.
        index: positions of those that are changed, int64 [M].
        labels: that the search uses, int64 [M].
        bench: the network, untrained, its optimiser, and how many images a batch has.
    """

    def __init__(self, search: Alternating, clean: Split, index: Tensor, labels: Tensor, bench: Workbench) -> None:
        self._search, self._model, self._device = search, bench.model, bench.device
        self._optimiser, self._size = bench.optimiser(), bench.batch_size
        self._climbed = search.climbed(clean, bench)
        self._pixels, self._labels = clean.images[:], clean.labels
        self._index, self._wanted = index, labels
        self._place = torch.full((len(clean),), -1, dtype=torch.int64)
        self._place[index] = torch.arange(len(index))
        self._threat = search.threat.for_images(clean.image_shape)
        self.images = self._pixels[index].float() / 255
        self._order = torch.zeros(0, dtype=torch.int64)
        self._epoch = 0

    def _shown(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return images as they are now, and their labels."""
        x, places = self._pixels[rows].float() / 255, self._place[rows]
        x[places >= 0] = self.images[places[places >= 0]]
        return x.to(self._device), self._labels[rows].to(self._device)

    def _next_rows(self) -> Tensor:
        if not len(self._order):
            every = torch.arange(len(self._labels))
            lot = Streams.of(self._search.seed, every).fork(f"order {self._epoch}").bits(1)[:, 0]
            self._order, self._epoch = lot.argsort(stable=True), self._epoch + 1
        rows, self._order = self._order[: self._size], self._order[self._size :]
        return rows

    def train(self, number: int) -> None:
        """Train on some batches; `number` of the round is for messages.

        Raises:
            RunError: if the loss is not finite.
        """
        self._model.train()
        for _ in range(self._search.batches):
            x, y = self._shown(self._next_rows())
            self._optimiser.zero_grad()
            loss = nn.functional.cross_entropy(self._model(x), y)
            if not bool(loss.isfinite()):
                raise RunError(f"data.poison: the surrogate's loss is not finite in round {number}; lower the rate")
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(self._model.parameters(), CLIP)
            self._optimiser.step()
        self._optimiser.zero_grad()

    def search(self) -> None:
        """Go on with the change of every image, by the network as it is now."""
        search, threat = self._search, self._threat
        length = 2.5 * search.threat.eps / search.steps if search.step_size is None else search.step_size
        with in_eval_mode(self._model):
            for places in torch.split(torch.arange(len(self._index)), BATCH):
                x = (self._pixels[self._index[places]].float() / 255).to(self._device)
                y, now = self._wanted[places].to(self._device), self.images[places].to(self._device)
                for _ in range(search.steps):
                    now = now.requires_grad_()
                    (slope,) = torch.autograd.grad(self._climbed(now, y).sum(), now)
                    now = threat.project(threat.ascend(now.detach(), slope, length), x)
                self.images[places] = now.cpu()

    def error(self) -> float:
        """Return the share of the training images that the network gets wrong as they are now."""
        wrong = 0
        with torch.no_grad(), in_eval_mode(self._model):
            for rows in torch.split(torch.arange(len(self._labels)), BATCH):
                x, y = self._shown(rows)
                logits = self._model(x).float()
                wrong += int(((logits.argmax(1) != y) | logits.isnan().any(1)).sum())
        return wrong / len(self._labels)
