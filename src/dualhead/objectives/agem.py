"""A-GEM: no update may raise the loss under old threats (Chaudhry et al. 2019, arXiv 1812.00420)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import PlainValidator
from torch import Tensor

from dualhead.components.sections import component
from dualhead.errors import UserError
from dualhead.objectives.base import LossTerms, Objective, Seen, objectives
from dualhead.objectives.rehearsal import Rehearsal, rehearsed_loss
from dualhead.objectives.sat import SAT
from dualhead.objectives.several import USUAL, Contender

_SAT = SAT()


@objectives.register("agem")
@dataclass(frozen=True)
class AGEM(Rehearsal):
    """A base method whose gradient g loses what would raise the loss under an old threat, on images of a memory.

    With r the gradient of that loss, on the memory's images attacked anew:

        g - min(g r, 0) / (r r) r

    When: where old attacks are kept, and the new threat is to be learnt as fast as the old ones allow.

    Paper: Chaudhry et al. 2019, Efficient Lifelong Learning with A-GEM, ICLR, arXiv 1812.00420, eq. 11, with threats in
    place of tasks.

    Args:
        base: the base method, one with one attack.
        among: the old threats, `[Linf:8/255]`; each step draws one of several.
        images: of the memory, at least 1.
        seed: of the memory and the draws.
    """

    base: Annotated[Objective, *component(objectives)] = _SAT
    among: Annotated[tuple[Contender, ...], PlainValidator(lambda specs: specs)] = USUAL[:1]

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the base method's loss; the rehearsed one is its constraint."""
        constraint = rehearsed_loss(seen)
        base = self.base.loss(y, seen).with_figures(rehearsed=constraint.detach())
        if base.constraint is not None:
            raise UserError("base: has a constraint of its own, and agem sets one; choose sat, trades or mart")
        return replace(base, constraint=constraint)
