"""MART, misclassification-aware adversarial training (Wang et al. 2020, ICLR, eq. 11)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from dualhead.components.fields import Real
from dualhead.errors import UserError
from dualhead.objectives.base import LossTerms, Objective, given, kl_divergence, objectives


@objectives.register("mart")
@dataclass(frozen=True)
class MART(Objective):
    """Boosted cross-entropy on attacked images, and a divergence that counts more where the clean image is in doubt.

    When: where images that are misclassified anyway should count more. Judge it by AutoAttack and not by PGD alone.

    Paper: Wang et al. 2020, Improving Adversarial Robustness Requires Revisiting Misclassified Examples, ICLR, eq. 11.

    Args:
        beta: weight of the divergence (lambda in the paper), at least 0.
    """

    beta: Real = 5.0

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise UserError(f"beta must be at least 0, got {self.beta:g}; MART uses 5 or 6")

    def inner_loss(self, adv_logits: Tensor, clean_logits: Tensor | None, y: Tensor) -> Tensor:
        """CE(f(x'), y) per image."""
        del clean_logits
        return F.cross_entropy(adv_logits, y, reduction="none")

    def loss(self, clean_logits: Tensor | None, adv_logits: Tensor | None, y: Tensor) -> LossTerms:
        """BCE(x') + beta mean[KL(p || p') (1 - p_y)], BCE = CE(x') - log(1.0001 - max of the wrong classes' p')."""
        clean, adv = given(clean_logits), given(adv_logits)
        # Not one_hot, which waits for the device to look at the labels.
        true = y if y.dim() == 2 else torch.zeros_like(adv).scatter(1, y[:, None], 1.0)
        wrong = adv.softmax(1).masked_fill(true > 0, 0.0).amax(1)
        boosted = F.cross_entropy(adv, y) - torch.log(1.0001 - wrong).mean()
        doubt = 1.0 - (clean.softmax(1) * true).sum(1)
        return LossTerms.sum_of(adversarial=boosted, divergence=self.beta * (kl_divergence(clean, adv) * doubt).mean())
