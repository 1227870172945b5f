"""An adaptive attack on models with several heads and an aggregate of them.

What an aggregate hides from its own gradient, its parts may show: an aggregate that saturates passes no gradient on,
and two heads that must both be fooled are easier to fool one after the other. So the ascent climbs the loss of the
aggregate, of each head, and of weighted sums of all of them, each from the best point of the one before, and every
point that it visits is tried on the aggregate, which alone decides. This adapts the attack to the defence in the sense
of Tramer et al. 2020, On adaptive attacks to adversarial example defenses; the choice of losses is this project's own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dualhead.attacks import losses
from dualhead.attacks.apgd import APGD, APGDCE, APGDT
from dualhead.attacks.base import Attack, Query, Search, State, attacks, per_slot, predictions, require_at_least_one
from dualhead.components.fields import Real
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats import Threat


@attacks.register("multihead", numbers=("steps",))
@dataclass(frozen=True)
class MultiHead(Attack):
    """Ascents on the losses of heads and aggregate, warm-started from one another.

    Three searches, each a chain of ascents: APGD on the cross-entropy, APGD on the targeted difference of logits ratio,
    and PGD on the margin.

    When: beside AutoAttack, whenever heads are merged: it attacks the merging itself.

    Paper: Tramer et al. 2020, On Adaptive Attacks to Adversarial Example Defenses, arXiv 2002.08347, asks for such an
    attack; the choice of losses is this project's own.

    Args:
        steps: gradient steps of each ascent in a chain, at least 1; the short form `multihead-20` sets it.
        targets: classes that targeted chains aim at, in the order of the aggregate's clean logits; at least 1.
        restarts: chains from independent starts, at least 1.
        rho: see `apgd-ce`.
    """

    needs_heads = True

    steps: int = 50
    targets: int = 3
    restarts: int = 1
    rho: Real = 0.75

    def __post_init__(self) -> None:
        require_at_least_one(self, "targets")
        APGDCE(self.steps, self.rho, self.restarts)  # refuses what it refuses

    def _chains(self, num_heads: int) -> tuple[Search, ...]:
        common = {"steps": self.steps, "rho": self.rho, "restarts": self.restarts, "num_heads": num_heads}
        return (
            _CrossEntropyChain(**common).labelled("apgd-ce"),  # type: ignore[arg-type]  # fields of several types
            _TargetedChain(**common, targets=self.targets).labelled("apgd-t"),  # type: ignore[arg-type]  # likewise
            _MarginChain(**common).labelled("pgd"),  # type: ignore[arg-type]  # likewise
        )

    def parts(self, num_classes: int, threat: Threat, num_heads: int = 1) -> Sequence[Search]:
        """The three chains.

        Raises:
            UserError: if the model has one head.
        """
        if num_heads < 2:
            raise UserError(
                "multihead needs a model that shows the logits of 2 heads or more; use autoattack for this one"
            )
        return [part for chain in self._chains(num_heads) for part in chain.parts(num_classes, threat, num_heads)]

    def notes(self, num_classes: int) -> list[str]:
        """Those of the chains."""
        return [note for chain in self._chains(2) for note in chain.notes(num_classes)]


@functools.cache
def _weights(num_heads: int, device: torch.device) -> Tensor:
    """The weight of each head's loss and, last, of the aggregate's, in each ascent of a chain: [ascents, H + 1].

    The aggregate; each head; all heads; all heads and the aggregate; weights of the sample's own; the aggregate again.
    A row of zeros stands for the sample's own.
    """
    alone = torch.eye(num_heads + 1)
    heads = torch.cat((torch.full((num_heads,), 1.0 / num_heads), torch.zeros(1)))
    everything = torch.full((num_heads + 1,), 1.0 / (num_heads + 1))
    own = torch.zeros(num_heads + 1)
    return torch.stack((alone[-1], *alone[:-1], heads, everything, own, alone[-1])).to(device)


@dataclass(frozen=True)
class _Chain(APGD):
    """Ascents in turn within one slot: each begins at the point that came nearest to fooling the aggregate."""

    num_heads: int = 2

    def parts(self, num_classes: int, threat: Threat, num_heads: int = 1) -> Sequence[Search]:
        """Itself under every threat: it has no sparse form."""
        return Search.parts(self, num_classes, threat, num_heads)

    def max_steps(self) -> int:
        """Those of all ascents, each with the look at its start."""
        return (self.num_heads + 5) * (self.steps + 1)

    def begin(self, x: Tensor, y: Tensor, clean: Tensor, job: Tensor, threat: Threat, streams: Streams) -> State:
        """See `Search.begin`. Own weights are uniform over those that sum to one."""
        own = -torch.log1p(-streams.fork(job).fork("weights").uniform(self.num_heads + 1)) + 1e-6
        return {
            **super().begin(x, y, clean, job, threat, streams),
            "own_weights": (own / own.sum(1, keepdim=True)).to(x.dtype),
            "margin": torch.full_like(x.flatten(1)[:, 0], -torch.inf),
        }

    def step(self, state: State, query: Query, threat: Threat) -> State:
        """Climb the ascent's weighted sum of losses, and try the iterate on the aggregate."""
        x, y, iterate = state["x"], state["y"], state["iterate"]
        number, age = state["iteration"] // (self.steps + 1), state["iteration"] % (self.steps + 1)
        table = _weights(self.num_heads, x.device).to(x.dtype)
        weights = table[number.clamp_max(len(table) - 1)]
        weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, state["own_weights"])
        count = self.num_heads + 1

        def weighted(outputs: Tensor) -> Tensor:
            labels, targets = (state[key].repeat_interleave(count) for key in ("y", "target"))
            each = self.loss(outputs.flatten(0, 1), labels, targets)
            return (each.reshape(-1, count) * weights).sum(1)

        outputs, loss, gradient = query.outputs_gradient(iterate, weighted)
        margin, fooled = losses.margin(outputs[:, -1], y), predictions(outputs[:, -1]) != y
        shown = fooled | (margin > state["margin"])
        climbed: State = {
            **self._climb(state, age > 0, loss, gradient, threat),
            "adversarial": torch.where(per_slot(shown, x), iterate, state["adversarial"]),
            "margin": torch.where(shown, margin, state["margin"]),
            "found": state["found"] | fooled,
            "iteration": state["iteration"] + 1,
        }
        return self._next_ascent(climbed, age == self.steps, threat)

    def _next_ascent(self, state: State, over: Tensor, threat: Threat) -> State:
        """Slots whose ascent is over begin the next at the best point."""
        nearest = state["adversarial"]
        fresh = {**self._fresh_schedule(state["x"], state["y"], threat), "iterate": nearest, "previous": nearest}
        return {**state, **{k: torch.where(per_slot(over, v), v, state[k]) for k, v in fresh.items()}}


@dataclass(frozen=True)
class _CrossEntropyChain(_Chain, APGDCE):
    """APGD on the cross-entropy."""


@dataclass(frozen=True)
class _TargetedChain(_Chain, APGDT):
    """APGD on the targeted difference of logits ratio."""


@dataclass(frozen=True)
class _MarginChain(_Chain):
    """PGD on the margin: APGD without momentum whose step size stays."""

    momentum: ClassVar[float] = 1.0

    def first_step(self, threat: Threat) -> float:
        """As in `pgd`."""
        return 2.5 * threat.eps / self.steps

    def loss(self, logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
        """The margin."""
        del target
        return losses.margin(logits, y)

    def _checkpoint(self, state: State, started: Tensor, loss: Tensor, best_loss: Tensor) -> tuple[Tensor, State]:
        """There are none."""
        del loss, best_loss
        return torch.zeros_like(started), {"step_size": state["step_size"]}
