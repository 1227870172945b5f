"""Hybrid training whose weights follow the accuracy on clean images: the balance of AR-AT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from dualhead.components.fields import Real
from dualhead.errors import UserError
from dualhead.objectives.base import (
    ATTACKED,
    EPOCH,
    OWN,
    Inner,
    Logits,
    LossTerms,
    Need,
    Objective,
    Seen,
    cross_entropies,
    objectives,
)


@objectives.register("balanced")
@dataclass(frozen=True)
class Balanced(Objective):
    """w CE(f(x'), y) + (1 - w) CE(f(x), y), w the accuracy on clean images over the epoch before.

    The better clean images are classified, the more the attacked ones weigh. The accuracy is that of the training
    steps themselves, over all images and processes: augmented, and in training mode. The published code measures it
    anew after each epoch, in evaluation mode, on the first thousand training images.

    When: as the base of `align` on tied heads, which together are AR-AT.

    Paper: Waseda et al. 2025, Rethinking Invariance Regularization in Adversarial Training, arXiv 2402.14648; the rule
    is that of its code.

    Args:
        weight: w of the first epoch, in [0, 1]: the accuracy of chance among ten classes.
        clean: output that sees the clean images; the one that the stage trains where none is named.
        robust: output that sees the attacked images, likewise.
    """

    weight: Real = 0.1
    clean: str = OWN
    robust: str = OWN

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise UserError(f"weight must lie in [0, 1], got {self.weight:g}; it is the accuracy to begin with")

    def needs(self) -> Mapping[str, Need]:
        """Logits p of clean and q of attacked images."""
        return {"p": Logits(self.clean), "q": Logits(self.robust, on=ATTACKED)}

    def inner(self) -> Mapping[str, Inner]:
        """Climb CE(f(x'), y)."""
        return {ATTACKED: Inner(lambda y, seen: cross_entropies(seen["q"], y), uses=("q",))}

    def window(self) -> int:
        """An epoch."""
        return EPOCH

    def begin(self) -> Mapping[str, float]:
        """The weight of the first epoch."""
        return {"weight": self.weight}

    def at(self, epoch: int, state: Mapping[str, float]) -> Objective:
        """Return it with the weight of this epoch."""
        del epoch
        return replace(self, weight=state["weight"]) if state else self

    def advance(self, state: Mapping[str, float], means: Mapping[str, float]) -> Mapping[str, float]:
        """Weigh by the accuracy of the epoch that has ended."""
        del state
        return {"weight": min(1.0, means["clean_accuracy"])}

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the weighted sum, and the accuracy on clean images."""
        p, q = seen["p"], seen["q"]
        labels = y if y.dim() == 1 else y.argmax(1)
        terms = LossTerms.sum_of(
            clean=(1.0 - self.weight) * F.cross_entropy(p, y), adversarial=self.weight * F.cross_entropy(q, y)
        )
        right = (p.detach().argmax(1) == labels).float().mean()
        return terms.with_figures(clean_accuracy=right, adversarial_weight=right.new_full((), self.weight))
