"""MART, misclassification-aware adversarial training (Wang et al. 2020, ICLR, eq. 11)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
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
    cross_entropies,
    kl_divergence,
    objectives,
)


@objectives.register("mart")
@dataclass(frozen=True)
class MART(Objective):
    """Boosted cross-entropy on attacked images, and a divergence that counts more where the clean image is in doubt.

    When: where images that are misclassified anyway should count more. Judge it by AutoAttack and not by PGD alone.

    Paper: Wang et al. 2020, Improving Adversarial Robustness Requires Revisiting Misclassified Examples, ICLR, eq. 11.

    Args:
        beta: weight of the divergence (lambda in the paper), at least 0.
        clean: output that sees the clean images; the one that the stage trains where none is named.
        robust: output that sees the attacked images, likewise.
    """

    beta: Real = 5.0
    clean: str = OWN
    robust: str = OWN

    def __post_init__(self) -> None:
        at_least(0, "beta", self.beta, "MART uses 5 or 6")

    def needs(self) -> Mapping[str, Need]:
        """Logits p of clean and q of attacked images."""
        return {"p": Logits(self.clean), "q": Logits(self.robust, on=ATTACKED)}

    def inner(self) -> Mapping[str, Inner]:
        """Climb CE(f(x'), y)."""
        return {ATTACKED: Inner(lambda y, seen: cross_entropies(seen["q"], y), uses=("q",))}

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute BCE + beta mean[KL(p || p') (1 - p_y)], BCE = CE(x') - log(1.0001 - max of the wrong classes' p')."""
        clean, adv = seen["p"], seen["q"]
        # Not one_hot, which waits for the device to look at the labels.
        true = y if y.dim() == 2 else torch.zeros_like(adv).scatter(1, y[:, None], 1.0)
        wrong = adv.softmax(1).masked_fill(true > 0, 0.0).amax(1)
        boosted = F.cross_entropy(adv, y) - torch.log(1.0001 - wrong).mean()
        doubt = 1.0 - (clean.softmax(1) * true).sum(1)
        return LossTerms.sum_of(adversarial=boosted, divergence=self.beta * (kl_divergence(clean, adv) * doubt).mean())
