"""ELLE: the loss drawn to a straight line between random points of the ball (Abad Rocamora et al. 2024, ICLR)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final

from torch import Tensor

from dualhead.attacks import RandomPoint
from dualhead.components.fields import Real, at_least
from dualhead.components.sections import component
from dualhead.data import Stream, streams
from dualhead.errors import UserError
from dualhead.objectives.base import (
    Around,
    Images,
    Inner,
    Logits,
    LossTerms,
    Need,
    Objective,
    Seen,
    cross_entropies,
    objectives,
)
from dualhead.objectives.sat import SAT

SAT_ALONE, UNIFORM = SAT(), streams.build("uniform")
DEVIATIONS: Final = 2.0
"""Standard deviations above the mean from which on an error sets the weight."""
LEAST_ERRORS: Final = 3
"""Errors of earlier steps before the first is judged."""


@objectives.register("elle")
@dataclass(frozen=True)
class ELLE(Around):
    """A base method's loss, and how far the loss is from linear between two random points of the ball.

    With a and b uniform in the ball around x, s uniform in [0, 1], c = (1 - s) a + s b and l the cross-entropy:

        L_base + lambda * mean (l(c) - (1 - s) l(a) - s l(b))^2

    lambda starts at 0. A step whose error exceeds the mean of all errors before it by two standard deviations sets it
    to `weight` from the next step on, and every other step multiplies it by `decay` (ELLE-A). With `adaptive: false` it
    is `weight` throughout (ELLE). The method is this around `sat` with `attack: fgsm`. It costs three passes forward
    and back, and no second derivative. The points are clipped to the box [0, 1], which the published code
    does not do. With `adaptive` the host reads the error after each step.

    When: for single-step training at a large eps, as `grad_align`, where second derivatives are slow or not to be had.

    Paper: Abad Rocamora et al. 2024, Efficient Local Linearity Regularization to Overcome Catastrophic Overfitting,
    arXiv 2401.11618; how lambda adapts is as in the published code.

    Args:
        base: the base method, an adversarial one of one output.
        weight: of the term, at least 0; 4000 is published for CIFAR-10 with `adaptive`.
        adaptive: whether lambda adapts.
        decay: factor of lambda after each step that does not set it, in (0, 1].
    """

    base: Annotated[Objective, *component(objectives)] = SAT_ALONE
    weight: Real = 4000.0
    adaptive: bool = True
    decay: Real = 0.99
    # The loss alone reads it, so that a new one needs no new plan of passes.
    _weight_now: float = field(default=0.0, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        at_least(0, "weight", self.weight, "4000 is as published")
        if not 0 < self.decay <= 1:
            raise UserError(f"decay must lie in (0, 1], got {self.decay:g}; 0.99 is as published")
        self.require_attack(one_output=True)
        self.refuse_itself()
        if self.base.window() or self.base.begin():
            raise UserError("elle has a state of its own, and so has its base method; use a base method without")
        object.__setattr__(self, "_weight_now", 0.0 if self.adaptive else self.weight)

    @property
    def judged(self) -> str:
        """As the base method."""
        return self.base.judged

    def streams(self) -> Mapping[str, Stream]:
        """Numbers in [0, 1], the first of which is an image's s."""
        return {**self.base.streams(), "share": UNIFORM}

    def needs(self) -> Mapping[str, Need]:
        """Return the base method's needs, logits at the three points, and the numbers that say where c lies."""
        points = {name: Logits(on=name) for name in ("a", "b", "c")}
        return {**self.base.needs(), **points, "share": Images("share")}

    def inner(self) -> Mapping[str, Inner]:
        """Return the base method's attack, and two random points of the ball."""
        points = {name: Inner(lambda y, seen: y, uses=(), attack=RandomPoint()) for name in ("a", "b")}
        return {**self.base.inner(), **points}

    def views(self, images: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Mix the two points."""
        share = _first(images["share"])
        share = share.reshape(-1, *(1 for _ in images["a"].shape[1:]))
        return {**self.base.views(images), "c": (1.0 - share) * images["a"] + share * images["b"]}

    def window(self) -> int:
        """Each step, if lambda adapts."""
        return 1 if self.adaptive else 0

    def begin(self) -> Mapping[str, float]:
        """Return lambda, and of the errors so far their number, mean and sum of squared deviations."""
        return {"lambda": 0.0, "errors": 0.0, "mean": 0.0, "squares": 0.0} if self.adaptive else {}

    def at(self, epoch: int, state: Mapping[str, float]) -> Objective:
        """Return it with the lambda that has been reached."""
        now = copy.copy(self)
        object.__setattr__(now, "base", self.base.at(epoch, {}))
        object.__setattr__(now, "_weight_now", float(state.get("lambda", self._weight_now)))
        return now

    def advance(self, state: Mapping[str, float], means: Mapping[str, float]) -> Mapping[str, float]:
        """Set lambda where the error of the step stood out from those before it, else let it decay."""
        error, errors, mean, squares = means["linear_error"], state["errors"], state["mean"], state["squares"]
        stands_out = errors >= LEAST_ERRORS and error > mean + DEVIATIONS * math.sqrt(squares / errors)
        moved = mean + (error - mean) / (errors + 1.0)  # Welford's recurrence
        return {
            "lambda": self.weight if stands_out else self.decay * state["lambda"],
            "errors": errors + 1.0,
            "mean": moved,
            "squares": squares + (error - mean) * (error - moved),
        }

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the base method's terms, and `linearity`; figures are `linear_error` and `lambda`."""
        base, share = self.base.loss(y, seen), _first(seen["share"])
        a, b, c = (cross_entropies(seen[name], y) for name in ("a", "b", "c"))
        error = (c - (1.0 - share) * a - share * b).square().mean()
        figures = {"linear_error": error.detach(), "lambda": error.new_full((), self._weight_now)}
        return base.plus(linearity=self._weight_now * error).with_figures(**figures)


def _first(images: Tensor) -> Tensor:
    """The first value of each image, [B]."""
    return images.flatten(1)[:, 0]
