"""Learning without forgetting: the network as the stage began teaches it (Li and Hoiem 2018, arXiv 1606.09282)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from dualhead.components.fields import Real, above, at_least
from dualhead.components.sections import component
from dualhead.objectives.base import (
    ATTACKED,
    BEFORE,
    CLEAN,
    Around,
    Logits,
    LossTerms,
    Need,
    Objective,
    Seen,
    kl_divergence,
    objectives,
)
from dualhead.objectives.sat import SAT

_SAT = SAT()


@objectives.register("lwf")
@dataclass(frozen=True)
class LwF(Around):
    """A base method, and predictions held to those of the network as the stage began.

    With p and p_0 the predictions of the network and of the network as it was, at temperature T, on clean and on
    attacked images, the base method's loss gets one term more:

        weight T^2 mean over both kinds of images of KL(p_0 || p)

    The attack is the base method's, so no attack of an earlier threat is needed.

    When: in a later stage of a sequence, where old attacks are lost.

    Paper: Li and Hoiem 2018, Learning without Forgetting, TPAMI, arXiv 1606.09282, with threats in place of tasks, and
    so with one classifier for all and on attacked images too.

    Args:
        base: the base method, an adversarial one.
        weight: at least 0.
        temperature: T, greater than 0; published as 2.
        on: `clean` images, `attacked` ones, or `both`.
    """

    base: Annotated[Objective, *component(objectives)] = _SAT
    weight: Real = 1.0
    temperature: Real = 2.0
    on: Literal["clean", "attacked", "both"] = "both"

    def __post_init__(self) -> None:
        at_least(0, "weight", self.weight)
        above(0, "temperature", self.temperature, "2 is as published")
        self.require_attack()
        self.refuse_itself()

    @property
    def _kinds(self) -> tuple[str, ...]:
        return {"clean": (CLEAN,), "attacked": (ATTACKED,), "both": (CLEAN, ATTACKED)}[self.on]

    def needs(self) -> Mapping[str, Need]:
        """Ask for what the base method needs, and on each kind of images both networks' logits."""
        own = self.base.judged_output
        asked = {f"lwf_{on}": Logits(own, on) for on in self._kinds}
        return {**self.base.needs(), **asked, **{f"lwf_{on}_before": Logits(BEFORE, on) for on in self._kinds}}

    def teachers(self) -> Mapping[str, str]:
        """Ask the network as the stage began."""
        return {**self.base.teachers(), BEFORE: BEFORE}

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the base method's terms, and `before`."""
        t = self.temperature
        each = [kl_divergence(seen[f"lwf_{on}_before"] / t, seen[f"lwf_{on}"] / t).mean() for on in self._kinds]
        base = self.base.loss(y, seen)
        term = self.weight * t * t * torch.stack(each).mean()
        return base.plus(before=term)
