"""The control of a poison: noise of the same size on the same images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dualhead.data.poisons.base import REMOVED, Poisoned, pixels_of, poisons
from dualhead.data.poisons.control import Control
from dualhead.data.poisons.search import Craft
from dualhead.data.split import Split
from dualhead.noise import Streams

_TRIES = 12
"""Each brings the length nearer, since what rounding and the ends of the range take changes little with the amount."""


@poisons.register("sham")
@dataclass(frozen=True)
class Sham(Control):
    """Uniform noise on the images that a poison would change, each by as much in Euclidean length; labels stay right.

    When: beside every poison: what it does and the sham does not is the poison's.

    Paper: none; a control, as a placebo is.

    Args:
        like: the poison; its trigger is measured too.
        seed: of the noise.
    """

    def apply(self, clean: Split, craft: Craft | None = None) -> Poisoned:
        """See `Poison.apply`."""
        made = self.like.apply(clean, craft)
        if not self.changes_pixels:
            return Poisoned.of(clean, made.index, facts=made.facts)
        touched = made.index[made.new_label != REMOVED]
        length = made.l2[made.new_label != REMOVED]
        noise = Streams.of(self.seed, touched).fork("sham").uniform(*clean.image_shape).double() * 2 - 1
        pixels = pixels_of(clean)[touched]
        return Poisoned.of(clean, touched, images=as_long(pixels, noise, 255 * length), facts=made.facts)


def as_long(pixels: Tensor, noise: Tensor, length: Tensor) -> Tensor:
    """Add noise to images, so much that they have moved by a given length once they are rounded and clipped.

    Args:
        pixels: uint8 [B, C, H, W].
        noise: float64 [B, C, H, W].
        length: Euclidean, in grey levels, float64 [B]; where no amount reaches it, the noise is as large as it can be.

    Returns:
        uint8 [B, C, H, W].
    """
    scale = length / noise.flatten(1).norm(dim=1).clamp_min(1e-12)
    made = pixels
    for _ in range(_TRIES):
        made = (pixels + noise * scale[:, None, None, None]).round().clamp(0, 255).to(torch.uint8)
        moved = (made.double() - pixels.double()).flatten(1).norm(dim=1)
        scale = scale * (length / moved.clamp_min(1.0)).clamp(0.5, 2.0)
    return made
