"""SAT, standard adversarial training, also called PGD-AT (Madry et al. 2018, arXiv 1706.06083, eq. 2.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from dualhead.components.fields import Real
from dualhead.objectives.base import (
    ATTACKED,
    Inner,
    Logits,
    LossTerms,
    Need,
    Objective,
    Seen,
    check_label_smoothing,
    cross_entropies,
    objectives,
)


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

    def __post_init__(self) -> None:
        check_label_smoothing(self.label_smoothing)

    def needs(self) -> Mapping[str, Need]:
        """Logits q of attacked images."""
        return {"q": Logits(on=ATTACKED)}

    def inner(self) -> Mapping[str, Inner]:
        """Climb CE(f(x'), y)."""
        return {ATTACKED: Inner(lambda y, seen: cross_entropies(seen["q"], y), uses=("q",))}

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute CE(f(x'), y)."""
        return LossTerms.sum_of(adversarial=F.cross_entropy(seen["q"], y, label_smoothing=self.label_smoothing))
