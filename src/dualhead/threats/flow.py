"""Flow fields: every pixel takes its colour from a place nearby (Xiao et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dualhead.errors import UserError
from dualhead.threats.base import threats
from dualhead.threats.bounded import Bounded


@threats.register("flow")
@dataclass(frozen=True)
class Flow(Bounded):
    """A spatial transformation: a field of shifts, one for each pixel, with bilinear interpolation.

    When: against an adversary who bends an image rather than add noise to it. No norm of pixels bounds this.

    Paper: Xiao et al. 2018, Spatially Transformed Adversarial Examples, arXiv 1801.02612. They search for a smooth
    field; here each shift is bounded instead, as in Laidlaw et al. 2021, Perceptual Adversarial Robustness,
    arXiv 2006.12655.

    Args:
        eps: longest shift along either axis, in coordinates in which the image reaches from -1 to 1; greater than 0.
            0.05 is 0.8 pixels of 32.
    """

    def shape(self, image_shape: Sequence[int]) -> tuple[int, ...]:
        """Return [2, H, W]: the shifts down and to the right.

        Raises:
            UserError: for images that are not [C, H, W].
        """
        if len(image_shape) != 3:
            raise UserError(f"threat flow needs images of shape [C, H, W], got {list(image_shape)}")
        return (2, *image_shape[1:])

    def apply(self, x: Tensor, parameters: Tensor) -> Tensor:
        """Return the bent images [B, C, H, W]; what lies beyond the edge is the pixel at the edge.

        Written out, since `grid_sample` computes places in normalised coordinates, and rounds where nothing moves.
        """
        height, width = x.shape[-2:]
        top, bottom, down = _between(parameters[:, 0], height, 1)
        left, right, across = _between(parameters[:, 1], width, 0)
        flat, across = x.flatten(2), across[:, None]

        def pixels(row: Tensor, column: Tensor) -> Tensor:
            places = (row * width + column).flatten(1)[:, None]
            return flat.gather(2, places.expand(-1, x.shape[1], -1)).reshape(x.shape)

        above = torch.lerp(pixels(top, left), pixels(top, right), across)
        below = torch.lerp(pixels(bottom, left), pixels(bottom, right), across)
        return torch.lerp(above, below, down[:, None].expand(x.shape))


def _between(shift: Tensor, size: int, trailing: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two pixels along an axis between which each pixel's source lies, and how far it is to the second.

    Args:
        shift: [B, H, W], in coordinates in which the axis is 2 long.
        size: pixels along the axis.
        trailing: how many axes of space follow it.

    Returns:
        Two int64 [B, H, W], and weights [B, H, W] in [0, 1].
    """
    place = torch.arange(size, device=shift.device, dtype=shift.dtype).reshape(-1, *[1] * trailing)
    source = (place + shift.nan_to_num(0.0) * (size / 2)).clamp(0.0, size - 1.0)
    first = source.detach().floor()
    index = first.to(torch.int64)
    return index, (index + 1).clamp_max(size - 1), source - first
