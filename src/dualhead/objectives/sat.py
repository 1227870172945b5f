"""SAT, standard adversarial training, also called PGD-AT (Madry et al. 2018, arXiv 1706.06083, eq. 2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from dualhead.components.fields import Real
from dualhead.objectives.base import LossTerms, Objective, check_label_smoothing, given, objectives


@objectives.register("sat")
@dataclass(frozen=True)
class SAT(Objective):
    """Cross-entropy on attacked images; the attack climbs the same.

    When: for the simplest baseline: nothing to tune but the attack, and the cheapest step of the methods that attack.

    Paper: Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv 1706.06083, eq. 2.1.

    Args:
        label_smoothing: share s in [0, 1) of each label that is spread over all classes, (1 - s) CE + s mean(-log p);
            0.1 is usual.
    """

    label_smoothing: Real = 0.0

    clean: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_label_smoothing(self.label_smoothing)

    def inner_loss(self, adv_logits: Tensor, clean_logits: Tensor | None, y: Tensor) -> Tensor:
        """CE(f(x'), y) per image."""
        del clean_logits
        return F.cross_entropy(adv_logits, y, reduction="none")

    def loss(self, clean_logits: Tensor | None, adv_logits: Tensor | None, y: Tensor) -> LossTerms:
        """CE(f(x'), y)."""
        del clean_logits
        cross_entropy = F.cross_entropy(given(adv_logits), y, label_smoothing=self.label_smoothing)
        return LossTerms.sum_of(adversarial=cross_entropy)
