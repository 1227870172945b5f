"""An adaptive attack on what weighs the heads: it steers an image to one head or router, and fools the model there.

Where a gate decides who answers, the gate is a second way in (Tramer et al. 2020, On Adaptive Attacks to Adversarial
Example Defenses): an adversary may first make it choose the weakest. The choice of losses is this project's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dualhead.attacks import losses
from dualhead.attacks.apgd import APGDCE
from dualhead.attacks.base import Attack, Query, Search, State, attacks, per_slot, predictions
from dualhead.components.fields import Real
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats import Threat


@attacks.register("steered", numbers=("steps",))
@dataclass(frozen=True)
class Steered(Attack):
    """For each head and router an ascent to where it decides, then one that fools it there, then one on the whole.

    A model with gates (aggregator `after_dder`) shows the logits u of each head and router so that log sum exp u is the
    logarithm of its share of the answer. For each of them in turn, APGD climbs

        1. log sum exp u,    2. log sum exp u + cross-entropy of u,    3. the cross-entropy of the model's own logits

    2 from the highest share, 3 from the point that came nearest to fooling the model. Every point that is visited is
    tried on the model, which alone decides. Where heads are shown as they are, shares mean nothing, and `multihead` is
    the better attack.

    When: beside `multihead`, whenever gates decide who answers; count an image as robust if it stands both.

    Paper: Tramer et al. 2020, On Adaptive Attacks to Adversarial Example Defenses, arXiv 2002.08347, asks for such an
    attack; the choice of losses is this project's own.

    Args:
        steps: gradient steps of each of the three ascents, at least 1; the short form `steered-20` sets it.
        restarts: tries from independent starts for each head and router, at least 1.
        rho: see `apgd-ce`.
    """

    needs_heads = True

    steps: int = 50
    restarts: int = 1
    rho: Real = 0.75

    def __post_init__(self) -> None:
        APGDCE(self.steps, self.rho, self.restarts)  # refuses what it refuses

    def parts(self, num_classes: int, threat: Threat, num_heads: int = 1) -> Sequence[Search]:
        """The search, with a job for each head and router and each restart.

        Raises:
            UserError: if the model has one head.
        """
        if num_heads < 2:
            raise UserError(
                "steered needs a model that shows the logits of 2 heads or more; use autoattack for this one"
            )
        search = _Steering(steps=self.steps, rho=self.rho, restarts=self.restarts, members=num_heads)
        return search.labelled(self.label).parts(num_classes, threat, num_heads)


@dataclass(frozen=True)
class _Steering(APGDCE):
    """The three ascents within one slot, for the head or router of its job."""

    members: int = 2

    def parts(self, num_classes: int, threat: Threat, num_heads: int = 1) -> Sequence[Search]:
        """Itself under every threat: it has no sparse form."""
        return Search.parts(self, num_classes, threat, num_heads)

    def jobs(self, num_classes: int) -> int:
        """One for each head, router and restart."""
        del num_classes
        return self.members * self.restarts

    def max_steps(self) -> int:
        """Those of the three ascents, each with the look at its start."""
        return 3 * (self.steps + 1)

    def begin(self, x: Tensor, y: Tensor, clean: Tensor, job: Tensor, threat: Threat, streams: Streams) -> State:
        """See `Search.begin`. Restarts of one head or router follow each other."""
        begun = super().begin(x, y, clean, job, threat, streams)
        least = torch.full_like(x.flatten(1)[:, 0], -torch.inf)
        return {**begun, "member": torch.div(job, self.restarts, rounding_mode="floor"), "margin": least}

    def step(self, state: State, query: Query, threat: Threat) -> State:
        """Climb the ascent's loss, and try the iterate on the model."""
        x, y, iterate = state["x"], state["y"], state["iterate"]
        number, age = state["iteration"] // (self.steps + 1), state["iteration"] % (self.steps + 1)

        def climbed(outputs: Tensor) -> Tensor:
            rows = torch.arange(len(outputs), device=outputs.device)
            member = outputs[rows, state["member"]]
            share = member.logsumexp(1)
            fooling = share + losses.cross_entropy(member, y)
            whole = losses.cross_entropy(outputs[:, -1], y)
            return torch.where(number == 0, share, torch.where(number == 1, fooling, whole))

        outputs, loss, gradient = query.outputs_gradient(iterate, climbed)
        margin, fooled = losses.margin(outputs[:, -1], y), predictions(outputs[:, -1]) != y
        shown = fooled | (margin > state["margin"])
        moved: State = {
            **self._climb(state, age > 0, loss, gradient, threat),
            "adversarial": torch.where(per_slot(shown, x), iterate, state["adversarial"]),
            "margin": torch.where(shown, margin, state["margin"]),
            "found": state["found"] | fooled,
            "iteration": state["iteration"] + 1,
        }
        return self._next_ascent(moved, age == self.steps, number == 0, threat)

    def _next_ascent(self, state: State, over: Tensor, steered: Tensor, threat: Threat) -> State:
        """Slots whose ascent is over begin the next: at the highest share, later at the point nearest to fooling."""
        start = torch.where(per_slot(steered, state["x"]), state["best"], state["adversarial"])
        fresh = {**self._fresh_schedule(state["x"], state["y"], threat), "iterate": start, "previous": start}
        return {**state, **{k: torch.where(per_slot(over, v), v, state[k]) for k, v in fresh.items()}}
