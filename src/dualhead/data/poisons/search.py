"""Searches for the images of a poison with a surrogate, and the tools that a run lends to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Final

import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dualhead.components.fields import Real, above
from dualhead.data.split import Split
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats import Threat

BATCH: Final = 256
"""Images that go through a surrogate at once."""


@dataclass(frozen=True)
class Surrogate:
    """The network that a poison is made with, trained on the clean images before the victim is.

    Args:
        objective: the method that trains it, as in a stage; `self`: by the victim's own recipe, so that the poison is
            made against the very method (adaptive).
        eps: radius of its adversary; None for the recipe's.
        epochs: of its training, at least 1; `self` has the recipe's.
        seed: of its training, another one than the victim's.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    objective: str | dict[str, Any] = "natural"
    eps: Real | None = None
    epochs: int = 40
    seed: int = 1_000_003

    def __post_init__(self) -> None:
        if not (self.epochs >= 1 and self.seed >= 0):
            raise UserError(f"epochs must be at least 1 and seed at least 0, got {self.epochs} and {self.seed}")
        above(0, "eps", self.eps)


class Workbench(ABC):
    """The tools that a run lends to a search.

    Attributes:
        device: on which the surrogate lies.
        model: the surrogate, images float32 [B, C, H, W] in [0, 1] on the device to logits [B, K]; in eval mode as the
            search begins. It belongs to the search, which may train it.
        batch_size: images in a batch of the surrogate's training.
        aimed: the test images that `Search.aimed` asked for, uint8 [A, C, H, W].
    """

    device: torch.device
    model: nn.Module
    batch_size: int
    aimed: Tensor

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Return what the surrogate's last linear layer is given, [B, D], with a graph to the images.

        Args:
            x: images, as `model` takes them.

        Raises:
            UserError: for a surrogate that has no features of its own.
        """

    @abstractmethod
    def optimiser(self) -> torch.optim.Optimizer:
        """Return a new optimiser of the surrogate, as its training has it; its rate stays as it is."""

    @abstractmethod
    def attacked(
        self, attack: Mapping[str, Any], climb: Callable[[Tensor], Tensor], x: Tensor, threat: Threat, streams: Streams
    ) -> Tensor:
        """Return attacked images [B, C, H, W] in [0, 1], detached.

        Args:
            attack: as a stage of a recipe writes it.
            climb: images to the values climbed [B], with a graph to the images.
            x: images [B, C, H, W] in [0, 1].
            threat: how far they may go.
            streams: randomness of these images.

        Raises:
            UserError: for images that the threat cannot change, or an attack that cannot climb any value.
        """

    @abstractmethod
    def stopped(self) -> bool:
        """Tell whether the run was asked to stop; a search that takes long asks, and raises `Interrupted`."""


@dataclass(frozen=True, eq=False)
class Found:
    """The images that a search found, and what it took.

    Args:
        images: float32 [M, C, H, W] in [0, 1].
        forward_passes: of single images through the surrogate.
        backward_passes: likewise.
        search: further figures of the search, JSON values.
        surrogate: figures of a surrogate that learnt meanwhile, likewise.
    """

    images: Tensor
    forward_passes: int
    backward_passes: int
    search: Mapping[str, Any] = field(default_factory=dict)
    surrogate: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Search(ABC):
    """A search within a threat for the images of a poison, with a surrogate.

    Subclasses are frozen dataclasses, each in the file of its poison. Its fields hold all that decides what is found,
    since what was found before is looked up by them.

    Args:
        surrogate: the network.
        threat: how far images may go.
        seed: of the search.
    """

    trained: ClassVar[bool] = True
    """Whether the surrogate is trained before the search; else it is given as it is initialised."""

    surrogate: Surrogate
    threat: Threat
    seed: int

    @abstractmethod
    def find(self, clean: Split, index: Tensor, labels: Tensor, bench: Workbench) -> Found:
        """Return changed images. In a group of processes the first one alone calls it.

        Args:
            clean: all images, on which the surrogate is trained.
            index: positions of those that are changed, int64 [M].
            labels: that the search uses, int64 [M].
            bench: the surrogate, and tools.
        """

    @property
    @abstractmethod
    def cost(self) -> str:
        """Return what it costs, in words that begin a sentence."""

    def aimed(self, test: Split) -> Tensor:
        """Return the test images that it aims at, uint8 [A, C, H, W]; none, unless a subclass says so.

        Raises:
            UserError: for an image that is not there, or that cannot be aimed at.
        """
        return torch.zeros(0, *test.image_shape, dtype=torch.uint8)

    def described(self) -> dict[str, Any]:
        """Return JSON values that tell it from any other search."""
        return {**asdict(self), "threat": self.threat.describe(), "kind": type(self).__name__}


@dataclass(frozen=True)
class Projected(Search):
    """A search by projected gradient for images on which a surrogate's loss is small, or large.

    Args:
        steps: of projected gradient.
        step_size: length of a step, in the units of eps; None for 2.5 eps / steps.
        towards: descend the cross-entropy of the labels, rather than climb it.
    """

    steps: int
    step_size: float | None
    towards: bool

    def __post_init__(self) -> None:
        check_steps(self.steps, self.step_size)

    @property
    def cost(self) -> str:
        """See `Search.cost`."""
        return f"the training of a surrogate, and {self.steps} forward and backward passes for each changed image"

    def described(self) -> dict[str, Any]:
        """See `Search.described`."""
        known = super().described()
        if type(self) is Projected:  # the first kind of search: what it found was kept without the name of a kind
            del known["kind"]
        return known

    def climbed(self, clean: Split, bench: Workbench) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the function that is climbed: of images and labels int64 [B], values [B] with a graph to the images.

        Args:
            clean: all images.
            bench: the surrogate.
        """

        def value(x: Tensor, labels: Tensor) -> Tensor:
            loss = cross_entropy(bench.model(x), labels, reduction="none")
            return -loss if self.towards else loss

        return value

    def find(self, clean: Split, index: Tensor, labels: Tensor, bench: Workbench) -> Found:
        """See `Search.find`."""
        attack = {"name": "pgd", "steps": self.steps, "step_size": self.step_size}
        value, made = self.climbed(clean, bench), []
        for rows in torch.split(torch.arange(len(index)), BATCH):
            x = clean.images[index[rows]].to(bench.device).float() / 255
            y = labels[rows].to(bench.device)

            def climb(z: Tensor, y: Tensor = y) -> Tensor:
                return value(z, y)

            streams = Streams.of(self.seed, index[rows].to(bench.device)).fork("poison search")
            made.append(bench.attacked(attack, climb, x, self.threat, streams).cpu())
        passes = self.steps * len(index)
        return Found(torch.cat(made), passes, passes)


def check_steps(steps: int, step_size: float | None) -> None:
    """Refuse a search that makes no step.

    Raises:
        UserError: saying so.
    """
    if not (steps >= 1 and (step_size is None or step_size > 0)):
        raise UserError(f"steps must be at least 1 and step_size greater than 0, got {steps} and {step_size}")


class Craft(ABC):
    """Does for a poison what images alone do not: lends a search a surrogate that was trained on the clean images."""

    @abstractmethod
    def find(self, clean: Split, index: Tensor, labels: Tensor, search: Search) -> tuple[Tensor, Mapping[str, Any]]:
        """Return images that a search finds, and what they cost.

        Args:
            clean: all images, on which the surrogate is trained.
            index: positions of those that are changed, int64 [M].
            labels: that the search uses, int64 [M].
            search: how.

        Returns:
            float32 [M, C, H, W] in [0, 1], and JSON values.

        Raises:
            UserError: where only what was found before may be read, and it is not there.
        """
