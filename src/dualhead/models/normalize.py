"""Normalisation as the first layer of the model, so that threat models speak of images in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.fx
from torch import Tensor, nn

from dualhead.errors import UserError

CHUNK = 1 << 24  # values that are squared at once


@torch.fx.wrap  # kept as one call where torch.fx traces a model, since the check depends on the shape
def _of_channels(images: Tensor, channels: int) -> Tensor:
    if images.shape[-3] != channels:
        raise UserError(f"the model takes images of {channels} channels, got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise UserError(f"the model takes floating images in [0, 1], got {images.dtype}; divide bytes by 255")
    return images


class Normalize(nn.Module):
    """(x - mean) / std, channel by channel.

    The constants are buffers that are not saved: the state dicts of the field do not hold them, and load strictly.
    Who saves a model therefore saves `mean` and `std` beside its weights.

    Args:
        mean: one number per channel, in units of images in [0, 1].
        std: one number per channel, greater than 0.

    Raises:
        UserError: if they differ in number, are not finite, or a std is not greater than 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean:
            raise UserError(f"normalisation needs a mean and a std per channel, got {len(mean)} and {len(std)}")
        if not all(map(math.isfinite, (*mean, *std))):
            raise UserError(f"mean and std must be finite, got mean {list(mean)} and std {list(std)}")
        if min(std) <= 0:
            raise UserError(f"std must be greater than 0 in each channel, got {list(std)}; 1 leaves a channel's scale")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)
        self.channels = len(mean)
        self.is_identity = all(m == 0 for m in mean) and all(s == 1 for s in std)

    @classmethod
    def identity(cls, channels: int) -> Normalize:
        """Change nothing: for models that normalise by themselves, or take images in [0, 1] as they are."""
        return cls([0.0] * channels, [1.0] * channels)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] in [0, 1] to the same, normalised.

        Raises:
            UserError: if the images have another number of channels, which would otherwise broadcast, or are integers,
                which would be taken for values in [0, 1].
        """
        return (_of_channels(images, self.channels) - self.mean) / self.std

    def extra_repr(self) -> str:
        """Show the constants, for people."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def channel_statistics(images: Tensor | Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel over all pixels.

    Summed in integers, chunk by chunk: the result is exact, does not depend on the pieces, and memory stays small.

    Args:
        images: uint8 [N, C, H, W], N at least 1; or such pieces of them, one after another.

    Returns:
        Means and (population) standard deviations, one per channel, in units of images in [0, 1].

    Raises:
        UserError: if there is no image, or they are not uint8 [N, C, H, W].
    """
    pixels, totals, squares = 0, [0], [0]
    for piece in (images,) if isinstance(images, Tensor) else images:
        if piece.dtype != torch.uint8 or piece.dim() != 4 or piece.numel() == 0:
            raise UserError(f"images must be uint8 [N, C, H, W], N at least 1, got {piece.dtype} {tuple(piece.shape)}")
        channels = piece.shape[1]
        if not pixels:
            totals, squares = [0] * channels, [0] * channels
        pixels += piece.numel() // channels
        length = max(1, CHUNK * len(piece) // piece.numel())
        for start in range(0, len(piece), length):
            for channel in range(channels):
                values = piece[start : start + length, channel]
                totals[channel] += int(values.sum(dtype=torch.int64))
                squares[channel] += int(values.int().square().sum(dtype=torch.int64))
    means = tuple(total / (255 * pixels) for total in totals)
    variances = (pixels * square - total**2 for total, square in zip(totals, squares, strict=True))
    return means, tuple(math.sqrt(variance) / (255 * pixels) for variance in variances)
