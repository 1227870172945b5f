"""Random crop from the zero-padded image (He et al. 2016, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from dualhead.components.fields import at_least
from dualhead.data.augmentations.base import Augmentation, augmentations
from dualhead.noise import Streams


@augmentations.register("pad_crop", numbers=("padding",))
@dataclass(frozen=True)
class PadCrop(Augmentation):
    """Shift by up to `padding` pixels in each direction; what comes in from outside is black.

    Args:
        padding: pixels of black on each side, at least 1; 4 is usual for 32x32.
    """

    padding: int = 4

    def __post_init__(self) -> None:
        at_least(1, "padding", self.padding, "leave pad_crop out for none")

    def __call__(self, images: Tensor, streams: Streams) -> Tensor:
        """See `Augmentation.__call__`."""
        height, width = images.shape[2:]
        offset = streams.integers(2 * self.padding + 1, 2)
        rows = offset[:, :1] + torch.arange(height, device=images.device)
        columns = offset[:, 1:] + torch.arange(width, device=images.device)
        padded = F.pad(images, [self.padding] * 4)
        sample = torch.arange(len(images), device=images.device)[:, None, None]
        cropped = padded[sample, :, rows[:, :, None], columns[:, None, :]]  # [B, H, W, C]: indexed axes come first
        return cropped.permute(0, 3, 1, 2).contiguous()
