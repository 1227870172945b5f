"""Changes to the coefficients of an image's JPEG (Kang et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dualhead.errors import UserError
from dualhead.threats.base import threats
from dualhead.threats.bounded import Bounded

JPEG_SIDE = 8
"""Of a block, in pixels."""
_LIGHT = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99), (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99), (99, 99, 99, 99, 99, 99, 99, 99), (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99), (99, 99, 99, 99, 99, 99, 99, 99),
)  # fmt: skip
"""Quantisation tables of the standard (ITU-T T.81, annex K), for quality 50."""


@threats.register("jpeg")
@dataclass(frozen=True)
class Jpeg(Bounded):
    """Every coefficient of the image's blocks of 8 x 8 moves, each by a share of the step that JPEG rounds it to.

    So high frequencies and colours, which JPEG keeps coarsely, change more than low ones.

    When: against an adversary whose changes look like those of strong compression.

    Paper: Kang et al. 2019, Testing Robustness Against Unforeseen Adversaries, arXiv 1908.08016 (JPEG). There the image
    is compressed too; here the change alone passes through the transform, without rounding, and colours are not
    subsampled, so that no change leaves the image as it is.

    Args:
        eps: largest change of a coefficient, in quantisation steps; greater than 0.
        quality: of the quantisation tables, 1 to 100, as in libjpeg.
    """

    typical_eps: ClassVar[str] = "0.5"

    quality: int = 75

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality must lie in 1 to 100, got {self.quality}")

    def shape(self, image_shape: Sequence[int]) -> tuple[int, ...]:
        """Return [C, H / 8, W / 8, 8, 8], rounded up: luma and the two chromas, or grey, by blocks.

        Raises:
            UserError: for images that are not [1, H, W] or [3, H, W].
        """
        if len(image_shape) != 3 or image_shape[0] not in (1, 3):
            raise UserError(f"threat jpeg needs images of shape [1, H, W] or [3, H, W], got {list(image_shape)}")
        channels, height, width = image_shape
        return (channels, -(-height // JPEG_SIDE), -(-width // JPEG_SIDE), JPEG_SIDE, JPEG_SIDE)

    def steps(self, channels: int) -> Tensor:
        """Return the quantisation steps [C, 8, 8] of values in 0 to 255."""
        return jpeg_steps(self.quality, channels)

    def apply(self, x: Tensor, parameters: Tensor) -> Tensor:
        """Return the images [B, C, H, W] with what the changed coefficients add."""
        channels, height, width = x.shape[1:]
        cosines, steps = jpeg_cosines().to(x), self.steps(channels).to(x)
        moved = parameters.nan_to_num(0.0) * steps[:, None, None]
        blocks = torch.einsum("ki,bcmnkl,lj->bcminj", cosines, moved, cosines) / 255.0
        change = blocks.flatten(4, 5).flatten(2, 3)[..., :height, :width]
        if channels == 3:
            luma, blue, red = change.unbind(1)
            green = luma - 0.344136 * blue - 0.714136 * red
            change = torch.stack((luma + 1.402 * red, green, luma + 1.772 * blue), 1)
        return x + change


def jpeg_steps(quality: int, channels: int) -> Tensor:
    """Return the quantisation steps [C, 8, 8] of values in 0 to 255: of luma, then of the two chromas.

    Args:
        quality: 1 to 100, as in libjpeg.
        channels: 1 or 3.
    """
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    tables = torch.tensor((_LIGHT, _CHROMA, _CHROMA)[:channels])
    return ((tables * scale + 50) // 100).clamp(1, 255)


def jpeg_cosines(dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the orthonormal cosine transform of 8 values, [frequency, place]."""
    place, frequency = torch.arange(JPEG_SIDE), torch.arange(JPEG_SIDE)[:, None]
    angles = ((2 * place + 1) * frequency).to(dtype) * (math.pi / (2 * JPEG_SIDE))
    waves = torch.cos(angles) * math.sqrt(2 / JPEG_SIDE)
    return torch.cat((waves[:1] / math.sqrt(2), waves[1:]))
