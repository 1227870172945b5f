"""A wave over the whole image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dualhead.components.fields import Real
from dualhead.data.poisons.base import (
    ClassName,
    Poison,
    Poisoned,
    check_share,
    class_number,
    moved,
    pixels_of,
    poisons,
)
from dualhead.data.poisons.search import Craft
from dualhead.data.poisons.triggers import backdoored
from dualhead.data.split import Split
from dualhead.errors import UserError


@poisons.register("sinusoid")
@dataclass(frozen=True)
class Sinusoid(Poison):
    """A wave over images of the target class, amplitude sin(2 pi frequency j / width) in column j; labels stay right.

    When: beside `patch` with `clean_label`: a whole-image trigger with right labels, larger than the usual eps.

    Paper: Barni et al. 2019, A new backdoor attack in CNNs by training set corruption without label poisoning (SIG),
    arXiv 1902.11237.

    Args:
        target: the class that triggered images are taken for: its number or name.
        share: of the images of that class.
        amplitude: images in [0, 1].
        frequency: waves over the width.
        seed: of the choice of images.
    """

    target: ClassName = 0
    share: Real = 0.5
    amplitude: Real = 40 / 255
    frequency: Real = 6.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self.share)
        if not (0 < self.amplitude <= 1 and self.frequency > 0):
            raise UserError(
                f"amplitude must lie in (0, 1] and frequency be greater than 0, got {self.amplitude:g} and "
                f"{self.frequency:g}"
            )

    def target_of(self, class_names: Sequence[str]) -> int:
        """See `Poison.target_of`."""
        return class_number(self.target, class_names, "target")

    def trigger(self, images: Tensor) -> Tensor:
        """See `Poison.trigger`."""
        width = images.shape[3]
        phase = torch.arange(width, dtype=torch.float64) * (2 * math.pi * self.frequency / width)
        wave = 255 * self.amplitude * phase.sin()
        if float(wave.abs().max()) < 1:
            raise UserError(
                f"a wave of frequency {self.frequency:g} and amplitude {self.amplitude:g} over {width} pixels is less "
                "than one of 255 grey levels in each of them; choose another frequency or a larger amplitude"
            )
        return moved(images, wave.expand(images.shape[1:]))

    def apply(self, clean: Split, craft: Craft | None = None) -> Poisoned:
        """See `Poison.apply`."""
        del craft
        index = backdoored(clean, self.target_of(clean.class_names), self.share, self.seed, clean_label=True)
        return Poisoned.of(clean, index, images=self.trigger(pixels_of(clean)[index]))
