"""The attack of Carlini and Wagner 2017, Towards evaluating the robustness of neural networks.

Under Linf, as adversarial training reports it, this is projected gradient ascent on their margin loss (their own Linf
attack minimises distances instead); under L2 it is their attack: the smallest distance, plus the margin weighed by a
constant that a binary search finds, minimised by Adam on images written as tanh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dualhead.attacks import losses
from dualhead.attacks.base import Attack, Query, Search, State, attacks, per_slot, predictions, require_at_least_one
from dualhead.attacks.pgd import PGD
from dualhead.components.fields import Real, above
from dualhead.noise import Streams
from dualhead.threats import Threat, finite, norm_of

_BETA_1, _BETA_2, _TINY = 0.9, 0.999, 1e-8  # Adam's (Kingma and Ba 2015)
_UNBOUNDED = 1e10


@attacks.register("cw", numbers=("steps",))
@dataclass(frozen=True)
class CW(Attack):
    """PGD on the margin loss under Linf; Carlini and Wagner's minimisation under L2.

    When: to look where cross-entropy has no gradient left (Linf), or for smallest distances (L2).

    Paper: Carlini and Wagner 2017, Towards Evaluating the Robustness of Neural Networks, arXiv 1608.04644.

    Args:
        steps: gradient steps, for each constant tried under L2; at least 1; the short form `cw-40` sets it.
        restarts: independent starts, at least 1.
        step_size: Linf only: length of a step in the units of eps; None for 2.5 eps / steps.
        searches: L2 only: constants tried, at least 1.
        learning_rate: L2 only: Adam's. The authors take 0.01 with 10,000 steps; in 100 steps that moves a value on a
            face of the box, where tanh is flat, hardly at all, and 0.05 finds FAB's distances.
        initial_constant: L2 only: the first constant.
    """

    norms = ("Linf", "L2")

    steps: int = 100
    restarts: int = 1
    step_size: Real | None = None
    searches: int = 9
    learning_rate: Real = 0.05
    initial_constant: Real = 0.01

    def __post_init__(self) -> None:
        PGD(steps=self.steps, step_size=self.step_size, restarts=self.restarts)  # refuses what PGD refuses
        require_at_least_one(self, "searches")
        for field in ("learning_rate", "initial_constant"):
            above(0, field, getattr(self, field), "leave it out for the default")

    def parts(self, num_classes: int, threat: Threat, num_heads: int = 1) -> Sequence[Search]:
        """The one that fits the norm."""
        search: Search
        if norm_of(threat) == "Linf":
            search = PGD(self.steps, self.step_size, loss="margin", restarts=self.restarts)
        else:
            search = _Minimisation(self.steps, self.restarts, self.searches, self.learning_rate, self.initial_constant)
        return search.labelled(self.label).parts(num_classes, threat, num_heads)


@dataclass(frozen=True)
class _Minimisation(Search):
    """The L2 attack: rounds of `steps` steps of Adam, each with its own constant. See `CW`."""

    steps: int
    restarts: int
    searches: int
    learning_rate: float
    initial_constant: float

    def jobs(self, num_classes: int) -> int:
        """One per restart."""
        del num_classes
        return self.restarts

    def max_steps(self) -> int:
        """All rounds."""
        return self.steps * self.searches

    def begin(self, x: Tensor, y: Tensor, clean: Tensor, job: Tensor, threat: Threat, streams: Streams) -> State:
        """See `Search.begin`. The first job starts at the image, others at random points of the ball."""
        start = x
        if self.restarts > 1:
            start = torch.where(per_slot(job > 0, x), threat.start(x, streams.fork(job), "ball"), x)
        variable = torch.atanh((2.0 * start - 1.0) * 0.999999)
        constant = torch.full_like(x.flatten(1)[:, 0], self.initial_constant)
        return {
            "x": x,
            "y": y,
            "start": variable,
            "variable": variable.clone(),
            "mean": torch.zeros_like(x),
            "square": torch.zeros_like(x),
            "constant": constant,
            "lower": torch.zeros_like(constant),
            "upper": torch.full_like(constant, _UNBOUNDED),
            "hit": torch.zeros_like(y, dtype=torch.bool),
            "adversarial": x.clone(),
            "distance": torch.full_like(constant, torch.inf),
            "found": torch.zeros_like(y, dtype=torch.bool),
            "iteration": torch.zeros_like(y),
        }

    def step(self, state: State, query: Query, threat: Threat) -> State:
        """Look at the image, keep it if it is the nearest example, and take a step of Adam."""
        x, image = state["x"], (torch.tanh(state["variable"]) + 1.0) * 0.5
        logits, margin, gradient = query.gradient(image, lambda z: losses.margin(z, state["y"]))
        fooled = predictions(logits) != state["y"]
        delta = image - x
        distance = torch.linalg.vector_norm(delta.flatten(1), dim=1)
        nearest, within = fooled & (distance < state["distance"]), fooled & (distance <= threat.eps)
        shown = nearest | (within & ~state["found"])

        weight = torch.where(margin < 0.0, state["constant"], 0.0)
        slope = (2.0 * delta - per_slot(weight, x) * finite(gradient)) * (2.0 * image * (1.0 - image))
        mean = _BETA_1 * state["mean"] + (1.0 - _BETA_1) * slope
        square = _BETA_2 * state["square"] + (1.0 - _BETA_2) * slope * slope
        count = per_slot(state["iteration"] % self.steps + 1, x).to(x.dtype)
        rate = self.learning_rate / (1.0 - _BETA_1**count)
        variable = state["variable"] - rate * mean / ((square / (1.0 - _BETA_2**count)).sqrt() + _TINY)
        return self._next_round(
            {
                **state,
                "variable": variable,
                "mean": mean,
                "square": square,
                "hit": state["hit"] | fooled,
                "adversarial": torch.where(per_slot(shown, x), image, state["adversarial"]),
                "distance": torch.where(nearest, distance, state["distance"]),
                "found": state["found"] | within,
                "iteration": state["iteration"] + 1,
            }
        )

    def _next_round(self, state: State) -> State:
        """Slots at the end of a round get the next constant and start again."""
        over, hit, constant = state["iteration"] % self.steps == 0, state["hit"], state["constant"]
        upper = torch.where(over & hit, torch.minimum(state["upper"], constant), state["upper"])
        lower = torch.where(over & ~hit, torch.maximum(state["lower"], constant), state["lower"])
        following = torch.where(upper < _UNBOUNDED, 0.5 * (lower + upper), 10.0 * constant)
        rows = per_slot(over, state["x"])
        return {
            **state,
            "variable": torch.where(rows, state["start"], state["variable"]),
            "mean": state["mean"] * ~rows,
            "square": state["square"] * ~rows,
            "constant": torch.where(over, following, constant),
            "lower": lower,
            "upper": upper,
            "hit": hit & ~over,
        }
