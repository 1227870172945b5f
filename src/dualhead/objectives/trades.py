"""TRADES (Zhang et al. 2019, arXiv 1901.08573, eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from dualhead.components.fields import Real, at_least
from dualhead.objectives.base import (
    ATTACKED,
    OWN,
    Inner,
    Logits,
    LossTerms,
    Need,
    Objective,
    Seen,
    check_label_smoothing,
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
        clean: output that sees the clean images; the one that the stage trains where none is named. With tied heads
            that own their batch norm, clean `head1` and robust `head2` make training with dual batch norm.
        robust: output that sees the attacked images, likewise.
    """

    beta: Real = 6.0
    label_smoothing: Real = 0.0
    clean: str = OWN
    robust: str = OWN

    def __post_init__(self) -> None:
        at_least(0, "beta", self.beta, "TRADES uses 1 to 6")
        check_label_smoothing(self.label_smoothing)

    def needs(self) -> Mapping[str, Need]:
        """Logits p of clean and q of attacked images."""
        return {"p": Logits(self.clean), "q": Logits(self.robust, on=ATTACKED)}

    def inner(self) -> Mapping[str, Inner]:
        """Climb KL(p || p')."""
        flat = self.clean == self.robust
        return {ATTACKED: Inner(lambda y, seen: kl_divergence(seen["p"], seen["q"]), uses=("p", "q"), flat=flat)}

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute CE(f(x), y) + beta KL(p || p'); both predictions carry gradients."""
        cross_entropy = F.cross_entropy(seen["p"], y, label_smoothing=self.label_smoothing)
        divergence = kl_divergence(seen["p"], seen["q"]).mean()
        return LossTerms.sum_of(clean=cross_entropy, divergence=self.beta * divergence)
