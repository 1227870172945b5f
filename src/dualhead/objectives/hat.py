"""HAT: a standard model says how far robustness should reach (Rade and Moosavi-Dezfooli 2022, ICLR)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from dualhead.components.fields import Real, above, at_least
from dualhead.components.sections import component
from dualhead.errors import UserError
from dualhead.objectives.base import ATTACKED, CLEAN, Around, Logits, LossTerms, Need, Objective, Seen, objectives
from dualhead.objectives.trades import TRADES

TRADES_2_5 = TRADES(2.5)


@objectives.register("hat")
@dataclass(frozen=True)
class HAT(Around):
    """Beyond the ball, images take the label that a model trained without attacks gives the attacked image.

    With x' the attacked image and f_std that model, the base method's loss gets one term more (section 4 of the paper):

        gamma CE(f(x + stretch (x' - x)), argmax f_std(x'))

    Adversarial training pushes its decision boundary further from the images than the ball asks for, which costs clean
    accuracy; here it is held back where a standard model says that the image has become another class. HAT is this
    beside TRADES with beta 2.5. Images beyond [0, 1] are left so, as published. It costs 4 forward equivalents a step.

    When: where clean accuracy matters and a model trained without attacks is at hand, as an earlier stage.

    Paper: Rade and Moosavi-Dezfooli 2022, Reducing Excessive Margin to Achieve a Better Accuracy vs. Robustness
    Trade-off, ICLR, section 4.

    Args:
        weights: of f_std: the name of an earlier stage of the recipe, or a run or exported model.
        base: the base method, an adversarial one.
        gamma: weight of the term, at least 0.
        stretch: how far out, as a multiple of the perturbation, greater than 1.
    """

    weights: str
    base: Annotated[Objective, *component(objectives)] = TRADES_2_5
    gamma: Real = 0.5
    stretch: Real = 2.0

    def __post_init__(self) -> None:
        at_least(0, "gamma", self.gamma)
        above(1, "stretch", self.stretch, "2 is as published")
        if ATTACKED not in self.base.inner():
            raise UserError("hat labels attacked images, and its base method has none; use sat, trades or mart")
        self.refuse_itself("one standard model is asked, so name it once")

    def needs(self) -> Mapping[str, Need]:
        """Return the base method's needs, the logits of f_std on attacked images, and logits beyond these."""
        beyond = Logits(self.base.judged_output, on="beyond")
        return {**self.base.needs(), "label": Logits("helper", on=ATTACKED), "beyond": beyond}

    def teachers(self) -> Mapping[str, str]:
        """Ask f_std."""
        return {**self.base.teachers(), "helper": self.weights}

    def views(self, images: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Stretch the perturbation."""
        return {**self.base.views(images), "beyond": images[CLEAN] + self.stretch * (images[ATTACKED] - images[CLEAN])}

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the base method's terms, and `helper`."""
        term = self.gamma * F.cross_entropy(seen["beyond"], seen["label"].argmax(1))
        return self.base.loss(y, seen).plus(helper=term)
