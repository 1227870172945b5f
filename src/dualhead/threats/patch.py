"""Patches: a square that may hold anything, at a place that the adversary chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from dualhead.threats.base import threats
from dualhead.threats.few_pixels import FewPixels


@threats.register("patch")
@dataclass(frozen=True)
class Patch(FewPixels):
    """Any colours within a square, anywhere in the image.

    When: against a sticker. Give PGD restarts, each of which begins at another place, or measure with `sparse-rs`,
    which moves the square.

    Paper: Brown et al. 2017, Adversarial Patch, arXiv 1712.09665; here each image has a patch and a place of its own,
    as in Croce et al. 2022, Sparse-RS, arXiv 2006.12834.

    Args:
        eps: the square's side in pixels; a whole number, at least 1.
    """

    typical_eps: ClassVar[str] = "4"

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the patch: its side, or the image's where that is shorter."""
        return min(int(self.eps), height), min(int(self.eps), width)

    def corner(self, worth: Tensor) -> tuple[Tensor, Tensor]:
        """Return row and column of the upper left corner of the square that is worth most, int64 [B] each."""
        sides = self.sides(*worth.shape[1:])
        total = functional.avg_pool2d(worth.double()[:, None], sides, stride=1)[:, 0]
        best = total.flatten(1).argmax(1)
        return best // total.shape[2], best % total.shape[2]

    def square(self, corner: tuple[Tensor, Tensor], height: int, width: int) -> Tensor:
        """Return the places of squares with given corners, bool [B, H, W]."""
        sides = self.sides(height, width)
        inside = [
            (offset >= 0) & (offset < side)
            for side, offset in (
                (side, torch.arange(size, device=first.device) - first[:, None])
                for first, side, size in zip(corner, sides, (height, width), strict=True)
            )
        ]
        return inside[0][:, :, None] & inside[1][:, None]

    def chosen(self, worth: Tensor) -> Tensor:
        """See `FewPixels.chosen`."""
        return self.square(self.corner(worth), *worth.shape[1:])

    def size(self, changed: Tensor) -> Tensor:
        """See `FewPixels.size`: the side of the smallest square that holds them all."""
        return torch.maximum(_extent(changed.any(2)), _extent(changed.any(1)))

    def grey_radius(self, x: Tensor) -> float:
        """See `Threat.grey_radius`: a square over the whole image."""
        return float(max(x.shape[-2:]))


def _extent(used: Tensor) -> Tensor:
    """Return how many places lie between the first and the last that is used, both included, int64 [B] of [B, n]."""
    count, number = used.shape[1], torch.arange(used.shape[1], device=used.device)
    last = torch.where(used, number, -1).amax(1)
    first = torch.where(used, number, count).amin(1)
    return torch.where(last >= 0, last - first + 1, 0)
