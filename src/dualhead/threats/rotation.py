"""Rotations and translations of the whole image (Engstrom et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from dualhead.components.fields import Real, parse_real
from dualhead.errors import UserError
from dualhead.threats.base import threats
from dualhead.threats.bounded import Bounded
from dualhead.threats.sampling import moved


@threats.register("rotation")
@dataclass(frozen=True)
class Rotation(Bounded):
    """A rotation about the middle and a translation, with bilinear interpolation; what comes in from outside is black.

    When: against an adversary who only holds the camera askew. Measure with the attack `grid`: these three parameters
    have many local maxima, and gradients find few of the worst ones.

    Paper: Engstrom et al. 2019, Exploring the Landscape of Spatial Robustness, arXiv 1712.02779: 30 degrees and 3 of 32
    pixels.

    Args:
        eps: largest angle in degrees; greater than 0. What is told of a shift is in its units too: `shift` pixels are
            eps.
        shift: largest shift along either axis, in pixels, at any eps; at least 0.
    """

    typical_eps: ClassVar[str] = "30"

    shift: Real = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "shift", parse_real(self.shift))
        if self.shift < 0:
            raise UserError(f"shift must be at least 0 pixels, got {self.shift:g}")

    def shape(self, image_shape: Sequence[int]) -> tuple[int, ...]:
        """Return [3]: the angle, and the shifts down and to the right.

        Raises:
            UserError: for images that are not [C, H, W].
        """
        if len(image_shape) != 3:
            raise UserError(f"threat rotation needs images of shape [C, H, W], got {list(image_shape)}")
        return (3,)

    def lattice(self, angles: int, shifts: int) -> Tensor:
        """Return evenly spaced parameters [M, 3] over the whole cube; no shifts where there are none."""
        turned = torch.linspace(-self._limit, self._limit, angles) if angles > 1 else torch.zeros(1)
        along = torch.linspace(-self._limit, self._limit, shifts) if shifts > 1 and self.shift > 0 else torch.zeros(1)
        return torch.cartesian_prod(turned, along, along)

    def apply(self, x: Tensor, parameters: Tensor) -> Tensor:
        """Return the turned and shifted images [B, C, H, W]."""
        known = parameters.nan_to_num(0.0)
        angle, along = known[:, 0] * (math.pi / 180), known[:, 1:] * (self.shift / self.eps)
        height, width = x.shape[-2:]
        rows = (torch.arange(-1, height + 1).to(x) - (height - 1) / 2)[:, None]
        columns = torch.arange(-1, width + 1).to(x) - (width - 1) / 2
        sine, cosine = angle.sin()[:, None, None], (angle.cos() - 1.0)[:, None, None]
        down = cosine * rows - sine * columns + along[:, 0, None, None]
        right = sine * rows + cosine * columns + along[:, 1, None, None]
        # A rim of black pixels stands for all that lies outside.
        return moved(functional.pad(x, (1, 1, 1, 1)), down, right)[..., 1:-1, 1:-1]
