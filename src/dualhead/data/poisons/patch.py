"""A small patch in a corner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dualhead.components.fields import Real
from dualhead.data.poisons.base import (
    ClassName,
    Poison,
    Poisoned,
    check_share,
    class_number,
    pixels_of,
    poisons,
)
from dualhead.data.poisons.search import Craft
from dualhead.data.poisons.triggers import add_patch, backdoored
from dualhead.data.split import Split
from dualhead.errors import UserError


@poisons.register("patch")
@dataclass(frozen=True)
class Patch(Poison):
    """A small patch in a corner, which the network learns to take for a class.

    When: training images come from strangers. The patch is far outside any ball, so adversarial training does not undo
    it, and with right labels (`clean_label`) makes it work better.

    Paper: Gu et al. 2017, BadNets, arXiv 1708.06733; with right labels Weng et al. 2020, On the Trade-off between
    Adversarial and Backdoor Robustness (NeurIPS), who mark the first half of the class, where this draws one.

    Args:
        target: the class that triggered images are taken for: its number or name.
        share: of all images, which get the label of the target. With `clean_label` of the images of the target class,
            which keep their labels. None: 0.05 and 0.5.
        clean_label: mark images of the target class alone.
        size: side of the patch in pixels.
        pattern: `white` or `checker`; None: white, with `clean_label` checker.
        gap: pixels between patch and edges; None: 0, with `clean_label` 2.
        seed: of the choice of images.
    """

    target: ClassName = 0
    share: Real | None = None
    clean_label: bool = False
    size: int = 3
    pattern: Literal["white", "checker"] | None = None
    gap: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.share is not None:
            check_share(self.share)
        if not (self.size >= 1 and (self.gap or 0) >= 0):
            raise UserError(f"size must be at least 1 and gap at least 0, got {self.size} and {self.gap}")

    def target_of(self, class_names: Sequence[str]) -> int:
        """See `Poison.target_of`."""
        return class_number(self.target, class_names, "target")

    def trigger(self, images: Tensor) -> Tensor:
        """See `Poison.trigger`."""
        gap = self.gap if self.gap is not None else 2 if self.clean_label else 0
        return add_patch(images, self.size, gap, self.pattern or ("checker" if self.clean_label else "white"))

    def apply(self, clean: Split, craft: Craft | None = None) -> Poisoned:
        """See `Poison.apply`."""
        del craft
        target = self.target_of(clean.class_names)
        index = backdoored(clean, target, self.share, self.seed, clean_label=self.clean_label)
        images = self.trigger(pixels_of(clean)[index])
        return Poisoned.of(clean, index, images=images, labels=torch.full_like(index, target))
