"""Flow fields: every pixel takes its colour from a place nearby (Xiao et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dualhead.errors import UserError
from dualhead.threats.base import threats
from dualhead.threats.bounded import Bounded
from dualhead.threats.sampling import moved


@threats.register("flow")
@dataclass(frozen=True)
class Flow(Bounded):
    """A spatial transformation: a field of shifts, one for each pixel, with bilinear interpolation.

    When: against an adversary who bends an image rather than add noise to it. No norm of pixels bounds this.

    Paper: Xiao et al. 2018, Spatially Transformed Adversarial Examples, arXiv 1801.02612. They search for a smooth
    field; here each shift is bounded instead, as in Laidlaw et al. 2021, Perceptual Adversarial Robustness,
    arXiv 2006.12655.

    Args:
        eps: longest shift along either axis, in coordinates in which the image reaches from -1 to 1; greater than 0.
            0.05 is 0.8 pixels of 32.
    """

    def shape(self, image_shape: Sequence[int]) -> tuple[int, ...]:
        """Return [2, H, W]: the shifts down and to the right.

        Raises:
            UserError: for images that are not [C, H, W].
        """
        if len(image_shape) != 3:
            raise UserError(f"threat flow needs images of shape [C, H, W], got {list(image_shape)}")
        return (2, *image_shape[1:])

    def apply(self, x: Tensor, parameters: Tensor) -> Tensor:
        """Return the bent images [B, C, H, W]; what lies beyond the edge is the pixel at the edge."""
        height, width = x.shape[-2:]
        known = parameters.nan_to_num(0.0)
        return moved(x, known[:, 0] * (height / 2), known[:, 1] * (width / 2))
