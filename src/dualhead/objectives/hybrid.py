"""Hybrid adversarial training: clean and attacked images in one loss (Goodfellow et al. 2015)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from dualhead.components.fields import Real
from dualhead.errors import UserError
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
    cross_entropies,
    objectives,
)


@objectives.register("hybrid")
@dataclass(frozen=True)
class Hybrid(Objective):
    """alpha CE(f(x), y) + (1 - alpha) CE(f(x'), y); the attack climbs the second.

    When: to trade robust for clean accuracy by one number, and with two routes as hybrid training with dual batch norm
    (Xie and Yuille 2020, arXiv 1906.03787).

    Paper: Goodfellow et al. 2015, Explaining and Harnessing Adversarial Examples, arXiv 1412.6572, eq. 3, where alpha
    is 0.5 and the attack one step.

    Args:
        alpha: weight of the clean images, in [0, 1].
        label_smoothing: share s in [0, 1) of each label that is spread over all classes, (1 - s) CE + s mean(-log p);
            0.1 is usual.
        clean: output that sees the clean images; the one that the stage trains where none is named.
        robust: output that sees the attacked images, likewise.
    """

    alpha: Real = 0.5
    label_smoothing: Real = 0.0
    clean: str = OWN
    robust: str = OWN

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha must lie in [0, 1], got {self.alpha:g}; 0.5 is as published")
        check_label_smoothing(self.label_smoothing)

    def needs(self) -> Mapping[str, Need]:
        """Logits p of clean and q of attacked images."""
        return {"p": Logits(self.clean), "q": Logits(self.robust, on=ATTACKED)}

    def inner(self) -> Mapping[str, Inner]:
        """Climb CE(f(x'), y)."""
        return {ATTACKED: Inner(lambda y, seen: cross_entropies(seen["q"], y), uses=("q",))}

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the weighted sum."""
        clean, attacked = (F.cross_entropy(seen[n], y, label_smoothing=self.label_smoothing) for n in ("p", "q"))
        return LossTerms.sum_of(clean=self.alpha * clean, adversarial=(1.0 - self.alpha) * attacked)
