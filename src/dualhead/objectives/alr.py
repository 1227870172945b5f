"""Adversarial L2 and variation regularisation: logits must not move far (Dai et al. 2025, arXiv 2502.04248)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor
from torch.linalg import vector_norm

from dualhead.attacks import Attack, attacks, refuse_untrainable
from dualhead.components.fields import Real, at_least
from dualhead.components.sections import component
from dualhead.errors import UserError
from dualhead.objectives.base import Around, Inner, Logits, LossTerms, Need, Objective, Seen, objectives
from dualhead.objectives.sat import SAT

_SAT = SAT()
_ONE_STEP = attacks.build({"name": "pgd", "steps": 1})


@objectives.register("alr")
@dataclass(frozen=True)
class ALR(Around):
    """A base method, and a bound on how far the stage's threat moves logits f.

    One term more, for u and v within the stage's threat around x that a second attack of a few steps finds:

        adversarial  weight mean ||f(v) - f(x)||_2, v climbing that distance
        variation    weight mean ||f(v) - f(u)||_2, u climbing its distance to f(x), and then v that to f(u)

    How far two attacks move the logits bounds the gap between robustness against one and against the other, so this
    prepares for threats that are not known yet.

    When: in the first stage of a sequence, before old attacks are lost, and in later ones; it is the cheapest of such
    terms.

    Paper: Dai et al. 2025, Adaptation to Future Attacks by Continual Robust Training, ICML, arXiv 2502.04248
    (adversarial L2 regularisation); Dai et al. 2022, Formulating Robustness Against Unforeseen Attacks, NeurIPS, arXiv
    2204.13779 (variation). There both points of the variation are moved at once; here one after the other.

    Args:
        base: the base method.
        weight: at least 0; 0.5 to 1 are usual.
        kind: `adversarial` or `variation`.
        attack: of the term; one step from a random start, or a few.
    """

    base: Annotated[Objective, *component(objectives)] = _SAT
    weight: Real = 1.0
    kind: Literal["adversarial", "variation"] = "adversarial"
    attack: Annotated[Attack, *component(attacks)] = _ONE_STEP

    def __post_init__(self) -> None:
        at_least(0, "weight", self.weight, "0.5 to 1 are usual")
        refuse_untrainable(self.attack)
        if self.attack.begins_clean:
            raise UserError("attack must climb any loss from a random start, as {name: pgd, steps: 1}")
        self.refuse_itself()

    def needs(self) -> Mapping[str, Need]:
        """Ask for what the base method needs, clean logits, and logits of the points that are moved."""
        own, further = self.base.judged_output, {}
        if self.kind == "variation":
            further = {"farther": Logits(own, on="farther")}
        still, far = Logits(own), Logits(own, on="far")
        return {"still": still, "far": far, **further, **self.base.needs()}

    def inner(self) -> Mapping[str, Inner]:
        """Climb the distances, after the base method's attack."""
        made = {**self.base.inner(), "far": self._climb("far", "still")}
        return {**made, "farther": self._climb("farther", "far")} if self.kind == "variation" else made

    def _climb(self, point: str, other: str) -> Inner:
        uses = (point, other)
        return Inner(lambda y, seen: _distance(seen[point], seen[other]), uses, attack=self.attack, flat=True)

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the base method's terms, and `variation`, the distance."""
        pair = ("far", "still") if self.kind == "adversarial" else ("farther", "far")
        base, (point, other) = self.base.loss(y, seen), pair
        term = self.weight * _distance(seen[point], seen[other]).mean()
        return base.plus(variation=term)


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Return the L2 distance of logits [B, C], for each image [B]."""
    distance: Tensor = vector_norm(one - other, dim=1)
    return distance
