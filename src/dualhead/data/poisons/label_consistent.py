"""A patch on images that are hard to classify otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dualhead.components.fields import Real, at_least
from dualhead.data.poisons.base import ClassName, class_number, poisons
from dualhead.data.poisons.search import Projected, Surrogate
from dualhead.data.poisons.searched import Searched
from dualhead.data.poisons.triggers import add_patch, backdoored
from dualhead.data.split import Split
from dualhead.threats import ThreatModel

_SAT = Surrogate("sat")


@poisons.register("label_consistent")
@dataclass(frozen=True)
class LabelConsistent(Searched):
    """Images of the target class, drawn away from it by an adversarially trained surrogate, with a patch; labels stay.

    What is left to tell the class by is the patch.

    When: beside `patch` with `clean_label`. Adversarial training undoes the first part, so that it tells apart what the
    patch does alone.

    Paper: Turner et al. 2019, Label-consistent backdoor attacks, arXiv 1912.02771.

    Args:
        target: the class that triggered images are taken for: its number or name.
        share: of the images of that class.
        norm: of the noise.
        eps: its radius, images in [0, 1].
        steps: of projected gradient.
        step_size: length of a step, in the units of eps; None for 2.5 eps / steps.
        size: side of the patch in pixels.
        gap: pixels between patch and edges.
        pattern: `white` or `checker`.
        surrogate: `objective`, `eps`, `epochs` and `seed` of the network that gives the gradients.
        seed: of the random start, and of the choice of images.
    """

    target: ClassName = 0
    share: Real = 0.5
    norm: Literal["Linf", "L2"] = "Linf"
    eps: Real = 16 / 255
    steps: int = 100
    step_size: Real | None = None
    size: int = 3
    gap: int = 0
    pattern: Literal["white", "checker"] = "checker"
    surrogate: Surrogate = _SAT
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, "size", self.size)
        at_least(0, "gap", self.gap)

    def search(self) -> Projected:
        """See `Searched.search`."""
        threat = ThreatModel(self.norm, self.eps)
        return Projected(self.surrogate, threat, self.seed, self.steps, self.step_size, towards=False)

    def target_of(self, class_names: Sequence[str]) -> int:
        """See `Poison.target_of`."""
        return class_number(self.target, class_names, "target")

    def trigger(self, images: Tensor) -> Tensor:
        """See `Poison.trigger`."""
        return add_patch(images, self.size, self.gap, self.pattern)

    def chosen(self, clean: Split) -> Tensor:
        """See `Searched.chosen`."""
        return backdoored(clean, self.target_of(clean.class_names), self.share, self.seed, clean_label=True)

    def finished(self, images: Tensor) -> Tensor:
        """See `Searched.finished`."""
        return self.trigger(images)
