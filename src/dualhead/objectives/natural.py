"""Plain training on clean images: what is attacked successfully everywhere, and the baseline to show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from dualhead.components.fields import Real
from dualhead.objectives.base import Logits, LossTerms, Need, Objective, Seen, check_label_smoothing, objectives


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

    def __post_init__(self) -> None:
        check_label_smoothing(self.label_smoothing)

    def needs(self) -> Mapping[str, Need]:
        """Clean logits p."""
        return {"p": Logits()}

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute CE(f(x), y)."""
        return LossTerms.sum_of(clean=F.cross_entropy(seen["p"], y, label_smoothing=self.label_smoothing))
