"""Logit pairing: an image's logits, clean and under attack, drawn together (Kannan et al. 2018, arXiv 1803.06373)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from dualhead.components.fields import Real, at_least
from dualhead.components.sections import component
from dualhead.objectives.base import ATTACKED, Around, Logits, LossTerms, Need, Objective, Seen, objectives
from dualhead.objectives.trades import TRADES

TRADES_6 = TRADES(6.0)


@objectives.register("logit_pairing")
@dataclass(frozen=True)
class LogitPairing(Around):
    """A base method's loss + weight * mean (z(x') - z(x))^2, in the base method's attack.

    When: as the control of `guidance` in `joint`, which is the same term with another head's clean logits, or as a
    regulariser of its own. Judge it by AutoAttack: pairing flattens the loss that weak attacks climb.

    Paper: Kannan et al. 2018, Adversarial Logit Pairing, arXiv 1803.06373, eq. 2, with any base method as its first
    term.

    Args:
        base: the base method, an adversarial one of one output.
        weight: at least 0; published as 0.5 on ImageNet. The mean is over images and classes.
    """

    base: Annotated[Objective, *component(objectives)] = TRADES_6
    weight: Real = 1.0

    def __post_init__(self) -> None:
        at_least(0, "weight", self.weight)
        self.require_attack(one_output=True)
        self.refuse_itself()

    def needs(self) -> Mapping[str, Need]:
        """Clean logits beside what the base method needs, which sees attacked images."""
        return {"clean": Logits(), **self.base.needs(), "attacked": Logits(on=ATTACKED)}

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the base method's terms, and `pairing`."""
        return self.base.loss(y, seen).plus(pairing=self.weight * F.mse_loss(seen["attacked"], seen["clean"]))
