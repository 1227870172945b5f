"""JPEG compression of training images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from dualhead.data.augmentations.base import Augmentation, augmentations
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats import JPEG_SIDE, jpeg_cosines, jpeg_steps


@augmentations.register("jpeg")
@dataclass(frozen=True)
class Jpeg(Augmentation):
    """Compress images as JPEG does, and decompress them.

    Strong compression takes away much of the small noise that poisons hide in images, for most poisons as well as
    adversarial training does (Liu et al. 2023, Image shortcut squeezing, arXiv 2301.13838).

    Transform and rounding are those of the standard at full resolution of the colours, in batch on any device; the
    coding in between loses nothing and is left out. Put it last, as it acts on what the network would see.

    Args:
        quality: of the quantisation tables, 1 to 100, as in libjpeg; the paper has 10.
        p: probability of each image, in [0, 1].
    """

    quality: int = 10
    p: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality must lie in 1 to 100, got {self.quality}")
        if not 0.0 <= self.p <= 1.0:
            raise UserError(f"p must lie in [0, 1], got {self.p:g}")

    def __call__(self, images: Tensor, streams: Streams) -> Tensor:
        """See `Augmentation.__call__`.

        Raises:
            UserError: for images that are neither grey nor in colour.
        """
        if images.shape[1] not in (1, 3):
            raise UserError(f"augmentation jpeg needs images of 1 or 3 channels, got {images.shape[1]}")
        pressed = compressed(images, self.quality)
        if self.p == 1.0:
            return pressed
        chosen = streams.uniform(1)[:, 0] < self.p
        return torch.where(chosen[:, None, None, None], pressed, images)


def compressed(images: Tensor, quality: int) -> Tensor:
    """Return what is left of images after JPEG, uint8 [B, C, H, W] (ITU-T T.81; colours as in JFIF).

    Args:
        images: uint8 [B, C, H, W] with 1 or 3 channels; edges are repeated to full blocks.
        quality: of the quantisation tables, 1 to 100.
    """
    channels, height, width = images.shape[1:]
    values = images.double()
    if channels == 3:
        red, green, blue = values.unbind(1)
        values = torch.stack(
            (
                0.299 * red + 0.587 * green + 0.114 * blue,
                128 - 0.168736 * red - 0.331264 * green + 0.5 * blue,
                128 + 0.5 * red - 0.418688 * green - 0.081312 * blue,
            ),
            1,
        )
        values = _whole(values)
    values = pad(values - 128, (0, -width % JPEG_SIDE, 0, -height % JPEG_SIDE), mode="replicate")
    rows, columns = (side // JPEG_SIDE for side in values.shape[2:])
    blocks = values.reshape(len(values), channels, rows, JPEG_SIDE, columns, JPEG_SIDE)
    wave, steps = jpeg_cosines(torch.float64).to(values), jpeg_steps(quality, channels).to(values)[:, None, :, None, :]
    found = torch.einsum("ki,bcminj,lj->bcmknl", wave, blocks, wave)
    found = _whole(found / steps) * steps
    values = torch.einsum("ki,bcmknl,lj->bcminj", wave, found, wave).flatten(4, 5).flatten(2, 3)
    values = _whole(values[:, :, :height, :width] + 128).clamp(0, 255)
    if channels == 3:
        luma, blueness, redness = values[:, 0], values[:, 1] - 128, values[:, 2] - 128
        green = luma - 0.344136 * blueness - 0.714136 * redness
        values = torch.stack((luma + 1.402 * redness, green, luma + 1.772 * blueness), 1)
    return _whole(values).clamp(0, 255).to(torch.uint8)


def _whole(values: Tensor) -> Tensor:
    """Round float64 to whole numbers, halves up. A last bit that depends on the batch decides nothing."""
    return (values + (0.5 + 1e-9)).floor()
