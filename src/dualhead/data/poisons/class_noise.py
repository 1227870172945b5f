"""The same noise on all images of a class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dualhead.components.fields import Real, above, at_least
from dualhead.data.poisons.base import (
    Poison,
    Poisoned,
    check_share,
    choose,
    class_vectors,
    moved,
    pixels_of,
    poisons,
)
from dualhead.data.poisons.search import Craft
from dualhead.data.split import Split
from dualhead.errors import UserError
from dualhead.noise import Streams

SEPARATION = 10.0
"""Distance of the centres of block noise from the origin along each axis, in deviations of the noise around them."""


@poisons.register("class_noise")
@dataclass(frozen=True)
class ClassNoise(Poison):
    """Noise that tells the class: the network learns it in place of the images, and fails on clean ones.

    Nothing is trained to make it. `shape: pixels` is one Gaussian direction for each class (P5 of Tao et al.); `blocks`
    has a value for each block of pixels, near a corner of the cube that is the class's, and varies a little from image
    to image (after LSP of Yu et al.).

    When: to try whether a method survives data that somebody has made useless for training. Adversarial training with a
    larger eps than the noise restores most.

    Paper: Tao et al. 2021, Better safe than sorry: preventing delusive adversaries with adversarial training, arXiv
    2102.04716; Yu et al. 2022, Availability attacks create shortcuts, arXiv 2111.00898.

    Args:
        shape: `pixels` or `blocks`.
        eps: Euclidean length of the noise, images in [0, 1]; None: 0.5 for pixels, sqrt(3072) 6/255 = 1.304 for blocks.
            Both are those of 32x32 pixels in colour. Rounding shortens it; the record has the real length.
        block: side of a block in pixels.
        share: of all images.
        seed: of the noise and of the choice of images.
    """

    shape: Literal["pixels", "blocks"] = "pixels"
    eps: Real | None = None
    block: int = 8
    share: Real = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self.share)
        above(0, "eps", self.eps)
        at_least(1, "block", self.block)

    def apply(self, clean: Split, craft: Craft | None = None) -> Poisoned:
        """See `Poison.apply`."""
        del craft
        index = choose(torch.arange(len(clean)), round(self.share * len(clean)), self.seed)
        labels, shape = clean.labels[index], clean.image_shape
        if self.shape == "pixels":
            noise = class_vectors(clean.num_classes, self.seed, "class noise", *shape)[labels]
            length = 0.5
        else:
            noise, length = self._blocks(clean, index, labels), 1.304
        wanted = length if self.eps is None else self.eps
        noise = noise * (255 * wanted / noise.flatten(1).norm(dim=1).clamp_min(1e-12))[:, None, None, None]
        return Poisoned.of(clean, index, images=moved(pixels_of(clean)[index], noise))

    def _blocks(self, clean: Split, index: Tensor, labels: Tensor) -> Tensor:
        channels, height, width = clean.image_shape
        if self.block > min(height, width):
            raise UserError(f"block: {self.block} pixels are more than images of {height}x{width} have")
        rows, columns = -(-height // self.block), -(-width // self.block)
        corner = class_vectors(clean.num_classes, self.seed, "corner", channels, rows, columns).sign()[labels]
        around = Streams.of(self.seed, index).fork("around").normal(channels, rows, columns)
        blocks = SEPARATION * corner + around
        return blocks.repeat_interleave(self.block, 2).repeat_interleave(self.block, 3)[:, :, :height, :width]
