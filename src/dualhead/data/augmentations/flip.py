"""Random horizontal flip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dualhead.data.augmentations.base import Augmentation, augmentations
from dualhead.errors import UserError
from dualhead.noise import Streams


@augmentations.register("flip")
@dataclass(frozen=True)
class Flip(Augmentation):
    """Mirror left and right. Wrong where that changes the class, as with digits.

    Args:
        p: probability, in [0, 1].
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.p <= 1.0:
            raise UserError(f"p must lie in [0, 1], got {self.p:g}")

    def __call__(self, images: Tensor, streams: Streams) -> Tensor:
        """See `Augmentation.__call__`."""
        mirrored = streams.uniform(1)[:, 0] < self.p
        return torch.where(mirrored[:, None, None, None], images.flip(3), images)
