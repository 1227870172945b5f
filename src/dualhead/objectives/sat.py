"""SAT, standard adversarial training, also called PGD-AT (Madry et al. 2018, arXiv 1706.06083, eq. 2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from dualhead.objectives.base import LossTerms, Objective, given, objectives


@objectives.register("sat")
@dataclass(frozen=True)
class SAT(Objective):
    """Cross-entropy on attacked images; the attack climbs the same."""

    clean: ClassVar[bool] = False

    def inner_loss(self, adv_logits: Tensor, clean_logits: Tensor | None, y: Tensor) -> Tensor:
        """CE(f(x'), y) per image."""
        del clean_logits
        return F.cross_entropy(adv_logits, y, reduction="none")

    def loss(self, clean_logits: Tensor | None, adv_logits: Tensor | None, y: Tensor) -> LossTerms:
        """CE(f(x'), y)."""
        del clean_logits
        return LossTerms.sum_of(adversarial=F.cross_entropy(given(adv_logits), y))
