"""MSD: one ascent within the union of several norms (Maini, Wong and Kolter 2020, arXiv 1909.04068)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import PlainValidator
from torch import Tensor

from dualhead.attacks import SteepestOfSeveral
from dualhead.components.fields import Real, above, at_least
from dualhead.components.sections import component
from dualhead.errors import UserError
from dualhead.objectives.base import ATTACKED, Around, Inner, LossTerms, Objective, Seen, objectives
from dualhead.objectives.sat import SAT
from dualhead.objectives.several import USUAL, Contender, contenders, refuse_base
from dualhead.threats import Threat, ThreatModel

_SAT = SAT()


@objectives.register("msd")
@dataclass(frozen=True)
class MSD(Around):
    """A base method on images that one ascent finds in the union of several norms' balls.

    Each step of the ascent tries the steepest step of each norm from the same gradient, projected onto that norm's
    ball, and keeps, for each image, the one where the loss is highest; the best point of all steps is trained on. It
    stands in place of the stage's attack. Where the loss has no slope at x, as TRADES', it begins at x + 0.001 N(0, 1).

    When: for the union of norms, where its cost, a forward pass more for each norm and step, can be paid.

    Paper: Maini, Wong and Kolter 2020, Adversarial Robustness Against the Union of Multiple Perturbation Models,
    arXiv 1909.04068. Their L1 step moves 5 to 20 values, drawn anew each time; here the hundredth of the values.

    Args:
        base: the base method, one with one attack.
        among: the norms, `[Linf:8/255, L2:0.5, L1:12]`, two or more.
        steps: of the ascent, at least 1; published as 50.
        step_factor: length of a step as a multiple of eps / steps, greater than 0; published as 5.
    """

    base: Annotated[Objective, *component(objectives)] = _SAT
    among: Annotated[tuple[Contender, ...], PlainValidator(lambda specs: specs)] = USUAL
    steps: int = 10
    step_factor: Real = 2.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "among", contenders(self.among))
        refuse_base(self.base)
        for place, contender in enumerate(self.among):
            if not isinstance(contender.threat, ThreatModel):
                raise UserError(
                    f"among.{place}: msd steps along norms, and {contender.threat.kind} is none; use any_of"
                )
            if contender.attack is not None:
                raise UserError(f"among.{place}.attack: msd is the attack; leave it out")
        at_least(1, "steps", self.steps)
        above(0, "step_factor", self.step_factor, "2.5 is usual")

    def inner(self) -> Mapping[str, Inner]:
        """Return the base method's attack with this ascent."""
        threats = tuple(contender.threat for contender in self.among)
        inner = self.base.inner()[ATTACKED]
        ascent = SteepestOfSeveral(threats, self.steps, self.step_factor, "gaussian" if inner.flat else "clean")
        return {ATTACKED: replace(inner, attack=ascent, threat=threats[0])}

    def threats(self) -> Sequence[Threat | None]:
        """All norms that it steps along."""
        return tuple(dict.fromkeys(contender.threat for contender in self.among))

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the base method's loss."""
        return self.base.loss(y, seen)
