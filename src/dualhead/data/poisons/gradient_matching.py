"""Noise that makes training take one test image for a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dualhead.components.fields import Real
from dualhead.data.poisons.base import (
    Aligning,
    ClassName,
    Craft,
    Poison,
    Poisoned,
    Surrogate,
    check_share,
    choose,
    class_number,
    crafted,
    members,
    poisons,
)
from dualhead.data.split import Split
from dualhead.threats import ThreatModel

_NATURAL = Surrogate()


@poisons.register("gradient_matching")
@dataclass(frozen=True)
class GradientMatching(Poison):
    """Images of a class whose training gradient leads to one test image being taken for that class; labels stay.

    A surrogate tells the gradient by which it would learn the wanted answer, and the images are changed until theirs
    points the same way. After Witches' Brew, not a reproduction: images are changed as they are, where the published
    search goes through augmentation, and one start is made, where it makes eight.

    When: against training from scratch by an adversary who wants one answer and changes no label. One run tells yes or
    no, so a rate needs many test images, a poison for each.

    Paper: Geiping et al. 2021, Witches' Brew: industrial scale data poisoning via gradient matching, arXiv 2009.02276.

    Args:
        image: position among the test images of the one that is aimed at; its label must be another class.
        target: the class that it is to be taken for, of which the changed images are: its number or name.
        share: of all images.
        norm: of the noise.
        eps: its radius, images in [0, 1].
        steps: of Adam on the sign of the gradient; its rate falls tenfold after 3, 5 and 7 eighths of them.
        step_size: its first rate, in the units of eps; None for eps / 10.
        restarts: independent starts; the one that ends best is kept.
        surrogate: `objective`, `eps`, `epochs` and `seed` of the network that gives the gradients.
        seed: of the random start, and of the choice of images.
    """

    image: int = 0
    target: ClassName = 0
    share: Real = 0.01
    norm: Literal["Linf", "L2"] = "Linf"
    eps: Real = 16 / 255
    steps: int = 250
    step_size: Real | None = None
    restarts: int = 1
    surrogate: Surrogate = _NATURAL
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self.share)
        self._search(0)

    def _search(self, wanted: int) -> Aligning:
        return Aligning(
            self.surrogate, ThreatModel(self.norm, self.eps), self.steps,
            self.eps / 10 if self.step_size is None else self.step_size, towards=True, seed=self.seed,
            image=self.image, wanted=wanted, restarts=self.restarts,
        )  # fmt: skip

    @property
    def needs_surrogate(self) -> bool:
        """See `Poison.needs_surrogate`."""
        return True

    @property
    def cost(self) -> str:
        """See `Poison.cost`."""
        return (
            f"the training of a surrogate, and for each start {self.steps} forward and {3 * self.steps} backward "
            "passes for each changed image, as gradients of gradients; the results tell it, and charge it to no method."
        )

    def aims_at(self, class_names: Sequence[str]) -> tuple[int, int]:
        """See `Poison.aims_at`."""
        return self.image, class_number(self.target, class_names, "target")

    def apply(self, clean: Split, craft: Craft | None = None) -> Poisoned:
        """See `Poison.apply`."""
        _, wanted = self.aims_at(clean.class_names)
        index = choose(members(clean, wanted), round(self.share * len(clean)), self.seed)
        images, facts = crafted(clean, index, clean.labels[index], self._search(wanted), craft)
        return Poisoned.of(clean, index, images=images, facts=facts)
