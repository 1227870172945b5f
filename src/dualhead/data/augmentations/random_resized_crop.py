"""Random part of the image at a random scale (Szegedy et al. 2015, arXiv 1409.4842, section 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from dualhead.data.augmentations.base import Augmentation, augmentations
from dualhead.errors import UserError
from dualhead.noise import Streams

_TRIES: Final = 10


@augmentations.register("random_resized_crop")
@dataclass(frozen=True)
class RandomResizedCrop(Augmentation):
    """A part of random area and proportions, resized; what ImageNet is trained with.

    Area and the logarithm of the proportions are uniform; of ten drawn parts the first that lies within the image is
    taken, else the middle of the image. Bilinear without antialiasing: keep images (`data.train_size`) not much larger
    than `size`.

    Args:
        size: height and width of the result; None: those of the image.
        area: smallest and largest part of the image's area, in (0, 1].
        ratio: smallest and largest width over height.
    """

    size: tuple[int, int] | None = None
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)

    def __post_init__(self) -> None:
        if self.size is not None and min(self.size) < 1:
            raise UserError(f"size must be [height, width], both at least 1, got {list(self.size)}")
        if not 0.0 < self.area[0] <= self.area[1] <= 1.0:
            raise UserError(f"area must be two fractions in (0, 1], the smaller one first, got {list(self.area)}")
        if not 0.0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise UserError(f"ratio must be two positive numbers, the smaller one first, got {list(self.ratio)}")

    def __call__(self, images: Tensor, streams: Streams) -> Tensor:
        """See `Augmentation.__call__`; the result is of `size`."""
        height, width = images.shape[2:]
        heights, widths = self._sides(height, width, streams)
        rows, columns = self.size or (height, width)
        place = streams.fork("place").uniform(2)
        y = _points(place[:, 0] * (height - heights), heights, rows, height)
        x = _points(place[:, 1] * (width - widths), widths, columns, width)
        grid = torch.stack((x[:, None, :].expand(-1, rows, -1), y[:, :, None].expand(-1, -1, columns)), 3)
        cut = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        return cut.round().clamp(0, 255).to(torch.uint8)

    def _sides(self, height: int, width: int, streams: Streams) -> tuple[Tensor, Tensor]:
        """Draw height and width of each crop, float32 [B]."""
        drawn = streams.fork("shape").uniform(_TRIES, 2)
        area = (self.area[0] + (self.area[1] - self.area[0]) * drawn[..., 0]) * (height * width)
        low, high = (math.log(bound) for bound in self.ratio)
        ratio = (low + (high - low) * drawn[..., 1]).exp()
        # In the end a part that always fits: all of the image, as far as the proportions allow.
        whole = min(max(width / height, self.ratio[0]), self.ratio[1])
        largest = min(height, width / whole)
        heights = F.pad((area / ratio).sqrt(), (0, 1), value=largest)
        widths = F.pad((area * ratio).sqrt(), (0, 1), value=largest * whole)
        fits = (heights <= height) & (widths <= width)
        fits[:, -1] = True
        first = fits.int().argmax(1, keepdim=True)
        return heights.gather(1, first)[:, 0], widths.gather(1, first)[:, 0]


def _points(start: Tensor, length: Tensor, count: int, whole: int) -> Tensor:
    """Place the result's pixels along an axis, [B, count], with -1 and 1 for the image's ends."""
    steps = (torch.arange(count, device=start.device) + 0.5) / count
    return (start[:, None] + length[:, None] * steps) * (2 / whole) - 1
