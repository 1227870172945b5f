"""Accuracy on images that are not attacked but worn: the mean over common corruptions, and that of each kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dualhead.data import corruptions
from dualhead.evaluation.measurements.base import Measurement, measurements


@measurements.register("corruptions")
@dataclass(frozen=True)
class Corruptions(Measurement):
    """The 15 common corruptions of Hendrycks and Dietterich 2019 in 5 severities, in this project's own rendering.

    Noise, blur, weather and compression, with the constants of CIFAR-10-C for small images and of ImageNet-C for
    others. Accuracies are means over severities, of each kind and over all.

    When: for what cameras and weather do to images, which robustness against an adversary neither implies nor excludes.

    Paper: Hendrycks and Dietterich 2019, Benchmarking Neural Network Robustness to Common Corruptions and
    Perturbations, ICLR, arXiv 1903.12261.
    """

    levels: ClassVar[int] = corruptions.SEVERITIES

    def kinds(self) -> Sequence[str]:
        """All 15."""
        return corruptions.KINDS

    def check(self, image_shape: Sequence[int]) -> None:
        """Refuse images that are neither grey nor coloured, or too small.

        Raises:
            UserError: saying which can be corrupted.
        """
        corruptions.check_corruptible(*image_shape)

    def render(self, image: NDArray[np.uint8], kind: str, level: int, key: tuple[int, int]) -> NDArray[np.uint8]:
        """Corrupt an image."""
        return corruptions.corrupt(image, kind, level, key)

    def facts(self, image_shape: Sequence[int]) -> Mapping[str, Any]:
        """Return the rendering's name, and which constants it took."""
        _, height, width = image_shape
        small = corruptions.is_small(height, width)
        return {"name": corruptions.TITLE, "constants": "CIFAR-10-C" if small else "ImageNet-C"}
