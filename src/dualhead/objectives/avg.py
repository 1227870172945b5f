"""AVG: the mean loss over several threats (Tramer and Boneh 2019, arXiv 1904.13000, section 4)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import PlainValidator
from torch import Tensor

from dualhead.components.sections import component
from dualhead.objectives.base import LossTerms, Objective, Seen, objectives
from dualhead.objectives.sat import SAT
from dualhead.objectives.several import USUAL, Contender, Several

_SAT = SAT()


@objectives.register("avg")
@dataclass(frozen=True)
class Avg(Several):
    """The mean of a base method's losses under several threats; each image is attacked within all of them.

    When: where the average over threats counts rather than the union; it costs all attacks and all losses.

    Paper: Tramer and Boneh 2019, Adversarial Training and Robustness for Multiple Perturbations, arXiv 1904.13000,
    section 4.

    Args:
        base: the base method, one with one attack.
        among: the threats, `[Linf:8/255, {norm: L1, eps: 12, attack: pgd-20}]`, two or more; without `attack` the
            stage's is used.
    """

    base: Annotated[Objective, *component(objectives)] = _SAT
    among: Annotated[tuple[Contender, ...], PlainValidator(lambda specs: specs)] = USUAL

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the mean; each term, figure and constraint of the base method is a mean over the threats."""
        each = [self.base.loss(y, self.under(place, seen)) for place in range(len(self.among))]

        def mean(values: Iterable[Tensor]) -> Tensor:
            return sum(values, start=each[0].total * 0.0) / len(each)

        terms = {name: mean(one.terms[name] for one in each) for name in each[0].terms}
        figures = {name: mean(one.figures[name] for one in each) for name in each[0].figures}
        totals = {f"loss_{label}": one.total for label, one in zip(self.labels, each, strict=True)}
        constraints = [one.constraint for one in each if one.constraint is not None]
        loss = LossTerms.sum_of(**terms).with_figures(**figures, **totals)
        return replace(loss, constraint=mean(constraints)) if constraints else loss
