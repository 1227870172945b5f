"""Plain training on clean images: what is attacked successfully everywhere, and the baseline to show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from dualhead.components.fields import Real
from dualhead.objectives.base import LossTerms, Objective, check_label_smoothing, given, objectives


@objectives.register("natural")
@dataclass(frozen=True)
class Natural(Objective):
    """Cross-entropy on clean images; no attack is run.

    When: as a control without robustness, or to warm up before adversarial training that would not begin to learn from
    random weights, as with many classes.

    Paper: none; the usual training of classifiers.

    Args:
        label_smoothing: share s in [0, 1) of each label that is spread over all classes, (1 - s) CE + s mean(-log p);
            0.1 is usual.
    """

    label_smoothing: Real = 0.0

    adversarial: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_label_smoothing(self.label_smoothing)

    def inner_loss(self, adv_logits: Tensor, clean_logits: Tensor | None, y: Tensor) -> Tensor:
        """Cross-entropy, for whoever attacks a model trained so."""
        del clean_logits
        return F.cross_entropy(adv_logits, y, reduction="none")

    def loss(self, clean_logits: Tensor | None, adv_logits: Tensor | None, y: Tensor) -> LossTerms:
        """CE(f(x), y)."""
        del adv_logits
        cross_entropy = F.cross_entropy(given(clean_logits), y, label_smoothing=self.label_smoothing)
        return LossTerms.sum_of(clean=cross_entropy)
