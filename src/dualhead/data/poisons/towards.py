"""Noise that a surrogate takes for a class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dualhead.components.fields import Real, at_least
from dualhead.data.poisons.base import poisons
from dualhead.data.poisons.search import Projected, Surrogate
from dualhead.data.poisons.searched import Searched
from dualhead.data.split import Split
from dualhead.threats import ThreatModel

_NATURAL = Surrogate()


@poisons.register("towards")
@dataclass(frozen=True)
class Towards(Searched):
    """Images of each class, drawn by a surrogate's gradients towards the class `shift` further on; labels stay.

    With `shift: 1` the features of a wrong class carry the label, and a network that learns them fails on clean images
    (P1, or TAP from a naturally trained surrogate). With `shift: 0` images are drawn towards their own class: those
    features cost nothing to learn and are not robust, so that *robust* accuracy falls while clean accuracy stays or
    rises (P2, or hypocritical noise from a surrogate that was trained adversarially for a short time and at a small
    eps, `surrogate: {objective: sat, eps: 2/255, epochs: 10}`). The published hypocritical noise is made on augmented
    images; this is not.

    When: `shift: 0` for a study of robust accuracy, which other poisons leave alone; `surrogate: {objective: self}` for
    a poison that is made against the very method.

    Paper: Tao et al. 2021, arXiv 2102.04716 (P1, P2); Fowl et al. 2021, Adversarial examples make strong poisons, arXiv
    2106.10807 (TAP); Tao et al. 2022, Can adversarial training be manipulated by non-robust features?, arXiv
    2201.13329 (hypocritical).

    Args:
        shift: added to the number of the class, modulo the number of classes.
        norm: of the noise.
        eps: its radius, images in [0, 1].
        steps: of projected gradient.
        step_size: length of a step, in the units of eps; None for 2.5 eps / steps.
        share: of all images.
        surrogate: `objective`, `eps`, `epochs` and `seed` of the network that gives the gradients.
        seed: of the random start, and of the choice of images.
    """

    shift: int = 1
    norm: Literal["Linf", "L2"] = "Linf"
    eps: Real = 8 / 255
    steps: int = 100
    step_size: Real | None = None
    share: Real = 1.0
    surrogate: Surrogate = _NATURAL
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, "shift", self.shift)

    def search(self) -> Projected:
        """See `Searched.search`."""
        threat = ThreatModel(self.norm, self.eps)
        return Projected(self.surrogate, threat, self.seed, self.steps, self.step_size, towards=True)

    def sought(self, clean: Split, index: Tensor) -> Tensor:
        """See `Searched.sought`."""
        return (clean.labels[index] + self.shift) % clean.num_classes
