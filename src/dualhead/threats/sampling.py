"""Bilinear sampling that leaves an image as it is, to the bit, where nothing moves.

Written out, since `grid_sample` computes places in normalised coordinates, and rounds where nothing moves.
"""

from __future__ import annotations

import torch
from torch import Tensor


def moved(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Return images whose pixels take their colours from elsewhere; beyond the edge lies the pixel at the edge.

    Args:
        x: images [B, C, H, W].
        down: how far below each pixel its colour lies, in pixels [B, H, W].
        right: how far to the right of it, likewise.
    """
    height, width = x.shape[-2:]
    top, bottom, below = _between(down, height, 1)
    left, right_hand, across = _between(right, width, 0)
    flat, across = x.flatten(2), across[:, None]

    def pixels(row: Tensor, column: Tensor) -> Tensor:
        places = (row * width + column).flatten(1)[:, None]
        return flat.gather(2, places.expand(-1, x.shape[1], -1)).reshape(x.shape)

    upper = torch.lerp(pixels(top, left), pixels(top, right_hand), across)
    lower = torch.lerp(pixels(bottom, left), pixels(bottom, right_hand), across)
    return torch.lerp(upper, lower, below[:, None].expand(x.shape))


def _between(shift: Tensor, size: int, trailing: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two pixels along an axis between which each pixel's source lies, and how far it is to the second.

    Args:
        shift: [B, H, W], in pixels.
        size: pixels along the axis.
        trailing: how many axes of space follow it.

    Returns:
        Two int64 [B, H, W], and weights [B, H, W] in [0, 1].
    """
    place = torch.arange(size, device=shift.device, dtype=shift.dtype).reshape(-1, *[1] * trailing)
    source = (place + shift).clamp(0.0, size - 1.0)
    first = source.detach().floor()
    index = first.to(torch.int64)
    return index, (index + 1).clamp_max(size - 1), source - first
