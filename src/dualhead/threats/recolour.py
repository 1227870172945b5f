"""Recolouring: each colour becomes another one nearby, the same one in the whole image (Laidlaw and Feizi 2019)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dualhead.errors import UserError
from dualhead.threats.base import threats
from dualhead.threats.bounded import Bounded

_TO_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
"""From linear sRGB, under the white of D65."""
_SPAN = (100.0, 200.0, 200.0)
"""The ranges of L, u and v that are 1 long here; those of u and v begin at -100."""
_KAPPA, _LINEAR = 24389.0 / 27.0, 216.0 / 24389.0


@threats.register("recolour")
@dataclass(frozen=True)
class Recolour(Bounded):
    """A function of colours, given by its values on a grid in CIELUV and interpolated between them.

    When: against other light, another camera, another tint: changes that are large in every norm of pixels and that
    people hardly see.

    Paper: Laidlaw and Feizi 2019, Functional Adversarial Attacks (ReColorAdv), arXiv 1906.00001. Without their penalty
    for functions that are not smooth: the bound alone holds them.

    Args:
        eps: largest change along an axis; greater than 0. L from 0 to 100 is 1 long, and so are u and v from -100 to
            100: 0.06 is 6 of L and 12 of u or v.
        lightness: points of the grid along L, at least 2.
        chroma: points of the grid along u and along v, at least 2.
    """

    typical_eps: ClassVar[str] = "0.06"

    lightness: int = 16
    chroma: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lightness", "chroma"):
            if not getattr(self, name) >= 2:
                raise UserError(f"{name} must be at least 2 points, got {getattr(self, name)}")

    def shape(self, image_shape: Sequence[int]) -> tuple[int, ...]:
        """Return [3, lightness, chroma, chroma]: the changes of L, u and v.

        Raises:
            UserError: for images that are not [3, H, W].
        """
        if len(image_shape) != 3 or image_shape[0] != 3:
            raise UserError(f"threat recolour needs images of shape [3, H, W], got {list(image_shape)}")
        return (3, self.lightness, self.chroma, self.chroma)

    def apply(self, x: Tensor, parameters: Tensor) -> Tensor:
        """Return the recoloured images [B, 3, H, W].

        They are x and what the function changes, each seen through the same conversions, so that these add no rounding
        of their own.
        """
        colours = to_luv(x)
        changed = colours + self._interpolated(colours, parameters.nan_to_num(0.0))
        return x + (to_rgb(changed) - to_rgb(colours))

    def _interpolated(self, colours: Tensor, parameters: Tensor) -> Tensor:
        """Return the function's values [B, 3, H, W] at colours [B, 3, H, W], trilinearly."""
        sizes = self.shape(self.image_shape)[1:]
        flat, total = parameters.flatten(2), torch.zeros_like(colours).flatten(2)
        lower, share = [], []
        for axis, size in enumerate(sizes):
            place = (colours[:, axis].flatten(1) * (size - 1)).clamp(0.0, size - 1.0)
            low = place.floor().clamp_max(size - 2.0)
            lower.append(low.to(torch.int64))
            share.append(place - low)
        for corner in itertools.product((0, 1), repeat=3):
            index, weight = torch.zeros_like(lower[0]), torch.ones_like(share[0])
            for axis, upper in enumerate(corner):
                index = index * sizes[axis] + lower[axis] + upper
                weight = weight * (share[axis] if upper else 1.0 - share[axis])
            total = total + weight[:, None] * flat.gather(2, index[:, None].expand(-1, 3, -1))
        return total.reshape(colours.shape)


def to_luv(rgb: Tensor) -> Tensor:
    """Return CIELUV, scaled so that L from 0 to 100 and u, v from -100 to 100 are [0, 1], of sRGB [B, 3, H, W]."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4)
    matrix = rgb.new_tensor(_TO_XYZ)
    x, y, z = torch.einsum("ij,bjhw->ibhw", matrix, linear)
    white = matrix.sum(1)
    whole = (x + 15.0 * y + 3.0 * z).clamp_min(1e-8)
    u, v = _white(white)
    lightness = torch.where(y <= _LINEAR, _KAPPA * y, 116.0 * y.clamp_min(_LINEAR) ** (1.0 / 3.0) - 16.0)
    dark = y <= 1e-7  # black has no chroma
    across = torch.where(dark, 0.0, 13.0 * lightness * (4.0 * x / whole - u))
    along = torch.where(dark, 0.0, 13.0 * lightness * (9.0 * y / whole - v))
    return torch.stack((lightness / _SPAN[0], across / _SPAN[1] + 0.5, along / _SPAN[2] + 0.5), 1)


def to_rgb(luv: Tensor) -> Tensor:
    """Return sRGB [B, 3, H, W] of what `to_luv` gives; colours that no screen shows lie outside [0, 1]."""
    matrix = luv.new_tensor(_TO_XYZ)
    u, v = _white(matrix.sum(1))
    lightness = (luv[:, 0] * _SPAN[0]).clamp_min(1e-3)
    across = (luv[:, 1] - 0.5) * _SPAN[1] / (13.0 * lightness) + u
    along = ((luv[:, 2] - 0.5) * _SPAN[2] / (13.0 * lightness) + v).clamp_min(1e-2)
    y = torch.where(lightness <= _KAPPA * _LINEAR, lightness / _KAPPA, ((lightness + 16.0) / 116.0) ** 3)
    x = y * 9.0 * across / (4.0 * along)
    z = y * (12.0 - 3.0 * across - 20.0 * along) / (4.0 * along)
    linear = torch.einsum("ij,jbhw->bihw", torch.linalg.inv(matrix), torch.stack((x, y, z)))
    curved = 1.055 * linear.clamp_min(0.0031308) ** (1.0 / 2.4) - 0.055
    return torch.where(linear <= 0.0031308, 12.92 * linear, curved)


def _white(white: Tensor) -> tuple[Tensor, Tensor]:
    whole = white[0] + 15.0 * white[1] + 3.0 * white[2]
    return 4.0 * white[0] / whole, 9.0 * white[1] / whole
