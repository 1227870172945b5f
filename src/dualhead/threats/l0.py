"""Sparse changes: a few pixels anywhere in the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dualhead.threats.base import threats
from dualhead.threats.few_pixels import FewPixels


@threats.register("L0")
@dataclass(frozen=True)
class L0(FewPixels):
    """Any colours for a number of pixels; counted are pixels, not their channels.

    When: against an adversary who spoils single pixels. Measure with `sparse-rs` beside PGD: that sees no gradient and
    is the stronger one here.

    Paper: Croce and Hein 2019, Sparse and Imperceivable Adversarial Attacks, arXiv 1909.05040, for the projection;
    Croce et al. 2022, Sparse-RS, arXiv 2006.12834, for the threat.

    Args:
        eps: how many pixels may change; a whole number, at least 1.
    """

    typical_eps: ClassVar[str] = "24"

    def chosen(self, worth: Tensor) -> Tensor:
        """See `FewPixels.chosen`."""
        flat = worth.flatten(1)
        best = flat.topk(min(int(self.eps), flat.shape[1]), dim=1).indices
        return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, best, True).reshape(worth.shape)

    def size(self, changed: Tensor) -> Tensor:
        """See `FewPixels.size`: how many there are."""
        return changed.flatten(1).sum(1)

    def grey_radius(self, x: Tensor) -> float:
        """See `Threat.grey_radius`: all pixels."""
        return float(x.shape[-2] * x.shape[-1])
