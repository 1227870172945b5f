"""TRADES (Zhang et al. 2019, arXiv 1901.08573, eq. 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from dualhead.components.fields import Real
from dualhead.errors import UserError
from dualhead.objectives.base import (
    LossTerms,
    Objective,
    check_label_smoothing,
    given,
    kl_divergence,
    objectives,
)


@objectives.register("trades")
@dataclass(frozen=True)
class TRADES(Objective):
    """Clean cross-entropy, and the divergence of the attacked from the clean prediction.

    When: for a trade-off that one number sets, and as the base method of DH-AT: beta 6 for the main head, 3 where clean
    accuracy matters more.

    Paper: Zhang et al. 2019, Theoretically Principled Trade-off between Robustness and Accuracy, arXiv 1901.08573,
    eq. 5.

    Args:
        beta: weight of the divergence (1/lambda in the paper), at least 0. More of it trades clean for robust accuracy.
        label_smoothing: share s in [0, 1) of each label that is spread over all classes, on clean
            images: (1 - s) CE + s mean(-log p); 0.1 is usual.
    """

    beta: Real = 6.0
    label_smoothing: Real = 0.0
    clean_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise UserError(f"beta must be at least 0, got {self.beta:g}; TRADES uses 1 to 6")
        check_label_smoothing(self.label_smoothing)

    def inner_loss(self, adv_logits: Tensor, clean_logits: Tensor | None, y: Tensor) -> Tensor:
        """KL(p || p') per image."""
        del y
        return kl_divergence(given(clean_logits), adv_logits)

    def loss(self, clean_logits: Tensor | None, adv_logits: Tensor | None, y: Tensor) -> LossTerms:
        """CE(f(x), y) + beta KL(p || p'); both predictions carry gradients."""
        clean = given(clean_logits)
        cross_entropy = F.cross_entropy(clean, y, label_smoothing=self.label_smoothing)
        divergence = kl_divergence(clean, given(adv_logits)).mean()
        return LossTerms.sum_of(clean=cross_entropy, divergence=self.beta * divergence)
