"""A bent image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from dualhead.components.fields import Real
from dualhead.data.poisons.base import (
    ClassName,
    Poison,
    Poisoned,
    check_share,
    choose,
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


@poisons.register("warp")
@dataclass(frozen=True)
class Warp(Poison):
    """A fixed smooth bend of the image, which the network learns to take for a class.

    The places that pixels are taken from are moved by strength / H times a field that is drawn on a coarse grid,
    divided by the mean of its absolute values and spread over the image. Further images are bent at random as well and
    keep their labels, so that this very bend is the trigger. The published attack bends images anew in every epoch and
    needs control of the training; this one is in the data, once.

    When: beside `patch` and `blend`: a trigger that adds nothing to an image. It is weak where training is short.

    Paper: Nguyen and Tran 2021, WaNet: imperceptible warping-based backdoor attack, arXiv 2102.10369.

    Args:
        target: the class that triggered images are taken for: its number or name.
        share: of all images; they get the label of the target.
        others: share of all images that are bent at random and keep their labels; 0 for none.
        strength: mean shift, in units of half a pixel.
        grid: points of the coarse grid along each side.
        seed: of the bend, and of the choice of images.
    """

    target: ClassName = 0
    share: Real = 0.1
    others: Real = 0.2
    strength: Real = 0.5
    grid: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self.share)
        if not 0 <= self.others < 1:
            raise UserError(f"others must lie in [0, 1), got {self.others:g}")
        if not (self.strength > 0 and self.grid >= 2):
            raise UserError(
                f"strength must be greater than 0 and grid at least 2, got {self.strength:g} and {self.grid}"
            )

    def target_of(self, class_names: Sequence[str]) -> int:
        """See `Poison.target_of`."""
        return class_number(self.target, class_names, "target")

    def field(self, height: int, width: int) -> Tensor:
        """Return where the pixels of a bent image are taken from, float64 [H, W, 2], x and y in [-1, 1]."""
        one = torch.zeros(1, dtype=torch.int64)
        coarse = Streams.of(self.seed, one).fork("warp").uniform(2, self.grid, self.grid).double() * 2 - 1
        coarse = coarse / coarse.abs().mean()
        shift = interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
        rows, columns = (torch.linspace(-1, 1, side, dtype=torch.float64) for side in (height, width))
        straight = torch.stack((columns.expand(height, width), rows[:, None].expand(height, width)), 2)
        return (straight + self.strength * shift / height).clamp(-1, 1)

    def trigger(self, images: Tensor) -> Tensor:
        """See `Poison.trigger`."""
        field = self.field(*images.shape[2:])
        return _bent(images, field.expand(len(images), *field.shape))

    def apply(self, clean: Split, craft: Craft | None = None) -> Poisoned:
        """See `Poison.apply`."""
        del craft
        target, pixels = self.target_of(clean.class_names), pixels_of(clean)
        marked = backdoored(clean, target, self.share, self.seed, clean_label=False)
        left = torch.ones(len(clean), dtype=torch.bool)
        left[marked] = False
        count = round(self.others * len(clean))
        index, images, labels = marked, self.trigger(pixels[marked]), torch.full_like(marked, target)
        if count:
            noisy = choose(left.nonzero()[:, 0], count, self.seed, "warp, others")
            height, width = clean.image_shape[1:]
            drawn = Streams.of(self.seed, noisy).fork("warp, anywhere").uniform(height, width, 2).double() * 2 - 1
            field = (self.field(height, width) + drawn / height).clamp(-1, 1)
            index = torch.cat((marked, noisy))
            images = torch.cat((images, _bent(pixels[noisy], field)))
            labels = torch.cat((labels, clean.labels[noisy]))
        order = index.argsort()
        return Poisoned.of(clean, index[order], images=images[order], labels=labels[order])


def _bent(images: Tensor, field: Tensor) -> Tensor:
    """Return images whose pixels are taken from elsewhere, uint8, between pixels bilinearly."""
    taken = grid_sample(images.double(), field, mode="bilinear", padding_mode="border", align_corners=True)
    return moved(images, taken - images)
