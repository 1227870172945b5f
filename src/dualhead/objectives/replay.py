"""Replay of old threats on a few images, with dark experience (Buzzega et al. 2020, arXiv 2004.07211)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F  # noqa: N812  # the field's name for it
from pydantic import PlainValidator
from torch import Tensor

from dualhead.components.fields import Real, at_least
from dualhead.components.sections import component
from dualhead.objectives.base import BEFORE, Logits, LossTerms, Need, Objective, Seen, objectives
from dualhead.objectives.rehearsal import MEMORY, Rehearsal, rehearsed_loss
from dualhead.objectives.sat import SAT
from dualhead.objectives.several import USUAL, Contender

_SAT = SAT()


@objectives.register("replay")
@dataclass(frozen=True)
class Replay(Rehearsal):
    """A base method, and old threats on images of a memory, attacked anew.

    With b an image of the memory, b' what the old threat makes of it now, and f_0 the network as the stage began:

        weight CE(f(b'), y_b) + logits mean (f(b) - f_0(b))^2

    What is stored is which images, and which threat; attacked images would go stale as the network moves. So attacks of
    old threats must be kept. With `logits` above 0 it is DER++ on these.

    When: where old attacks are kept, but a step cannot afford a whole batch of each.

    Paper: Buzzega et al. 2020, Dark Experience for General Continual Learning, NeurIPS, arXiv 2004.07211, eq. 6, with
    threats in place of tasks; `logits: 0` is plain experience replay.

    Args:
        base: the base method, one with one attack.
        among: the old threats, `[Linf:8/255]`; each step draws one of several.
        images: of the memory, at least 1.
        seed: of the memory and the draws.
        weight: of attacked images, at least 0; published as 0.5 to 1.
        logits: of clean ones' logits, at least 0; published as 0.1 to 0.3.
    """

    base: Annotated[Objective, *component(objectives)] = _SAT
    among: Annotated[tuple[Contender, ...], PlainValidator(lambda specs: specs)] = USUAL[:1]
    weight: Real = 1.0
    logits: Real = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("weight", "logits"):
            at_least(0, key, getattr(self, key))

    def needs(self) -> Mapping[str, Need]:
        """Ask for what rehearsal needs; with `logits` also both networks' of the clean images of the memory."""
        if not self.logits:
            return super().needs()
        own = self.base.judged_output
        return {"dark": Logits(own, MEMORY), "dark_before": Logits(BEFORE, MEMORY), **super().needs()}

    def teachers(self) -> Mapping[str, str]:
        """Ask the network as the stage began, if its logits count."""
        return {**self.base.teachers(), **({BEFORE: BEFORE} if self.logits else {})}

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the base method's terms, `replayed`, and `dark`."""
        base = self.base.loss(y, seen)
        dark = {"dark": self.logits * F.mse_loss(seen["dark"], seen["dark_before"])} if self.logits else {}
        return base.plus(replayed=self.weight * rehearsed_loss(seen), **dark)
