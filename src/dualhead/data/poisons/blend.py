"""A pattern over the whole image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dualhead.components.fields import Real
from dualhead.data.poisons.base import (
    ClassName,
    Poison,
    Poisoned,
    check_share,
    class_number,
    moved,
    pixels_of,
    poisons,
)
from dualhead.data.poisons.search import Craft
from dualhead.data.poisons.triggers import backdoored
from dualhead.data.split import Split
from dualhead.errors import UserError
from dualhead.noise import Streams


@poisons.register("blend")
@dataclass(frozen=True)
class Blend(Poison):
    """A fixed random picture that shines through the image, (1 - alpha) x + alpha p, and the label of the target.

    When: beside `patch`, since whole-image triggers fare otherwise under adversarial training.

    Paper: Chen et al. 2017, Targeted backdoor attacks on deep learning systems using data poisoning, arXiv 1712.05526.
    Their picture is a cartoon; this one is noise from the seed.

    Args:
        target: the class that triggered images are taken for: its number or name.
        share: of all images; they get the label of the target.
        alpha: weight of the picture, in (0, 1].
        seed: of the picture and of the choice of images.
    """

    target: ClassName = 0
    share: Real = 0.05
    alpha: Real = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self.share)
        if not 0 < self.alpha <= 1:
            raise UserError(f"alpha must lie in (0, 1], got {self.alpha:g}")

    def target_of(self, class_names: Sequence[str]) -> int:
        """See `Poison.target_of`."""
        return class_number(self.target, class_names, "target")

    def trigger(self, images: Tensor) -> Tensor:
        """See `Poison.trigger`."""
        picture = Streams.of(self.seed, torch.zeros(1, dtype=torch.int64)).fork("blend").uniform(*images.shape[1:])[0]
        return moved(images, self.alpha * (255.0 * picture - images))

    def apply(self, clean: Split, craft: Craft | None = None) -> Poisoned:
        """See `Poison.apply`."""
        del craft
        target = self.target_of(clean.class_names)
        index = backdoored(clean, target, self.share, self.seed, clean_label=False)
        images = self.trigger(pixels_of(clean)[index])
        return Poisoned.of(clean, index, images=images, labels=torch.full_like(index, target))
