"""Auto-PGD: projected gradient ascent with momentum that finds its own step size.

Croce and Hein 2020, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks,
algorithm 1. Where their published code departs from the paper, this follows the code, since published numbers come from
it: see `APGD._checkpoint`. Under L1 each form is the one of Croce and Hein 2021, Mind the box: see `_Sparse`.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dualhead.attacks import losses
from dualhead.attacks.base import (
    LossFn,
    Query,
    Search,
    State,
    attacks,
    class_by_rank,
    per_slot,
    require_at_least_one,
)
from dualhead.attacks.targeted import Targeted, reached
from dualhead.components.fields import Real, unless_given
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats import Threat, ThreatModel, finite, project_l1, steepest


@dataclass(frozen=True)
class APGD(Search):
    """Base of the three forms of Auto-PGD.

    Args:
        steps: gradient steps after the start, at least 1; the short form `apgd-ce-50` sets it.
        rho: the step is halved where the loss rose in at most this share of a window's steps; in (0, 1].
        restarts: independent starts, at least 1.
        eot: gradients averaged per step, for models with random outputs, at least 1.
    """

    momentum: ClassVar[float] = 0.75
    """The share of a step that is new; the rest is the step before."""

    steps: int = 100
    rho: Real = 0.75
    restarts: int = 1
    eot: int = 1

    def __post_init__(self) -> None:
        require_at_least_one(self, "steps", "restarts", "eot")
        if not 0 < self.rho <= 1:
            raise UserError(f"rho must lie in (0, 1], got {self.rho:g}; the published value is 0.75")

    def parts(self, num_classes: int, threat: Threat, num_heads: int = 1) -> Sequence[Search]:
        """Itself; under L1 the sparse form of it."""
        (search,) = super().parts(num_classes, threat, num_heads)
        if not (isinstance(threat, ThreatModel) and threat.norm == "L1"):
            return (search,)
        return (_Sparse(self.steps, self.rho, self.restarts, self.eot, self).labelled(self.label),)

    def jobs(self, num_classes: int) -> int:
        """One per restart."""
        del num_classes
        return self.restarts

    def max_steps(self) -> int:
        """The gradient steps, and the look at the start."""
        return self.steps + 1

    def aim(self, clean: Tensor, y: Tensor, job: Tensor) -> Tensor:
        """The class that a job aims at, int64 [B]; untargeted forms do not use it."""
        del clean, job
        return y

    @abstractmethod
    def loss(self, logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
        """Compute the loss that is climbed, one number per image [B]."""

    def first_step(self, threat: Threat) -> float:
        """The step size before any halving."""
        return 2.0 * threat.eps

    def begin(self, x: Tensor, y: Tensor, clean: Tensor, job: Tensor, threat: Threat, streams: Streams) -> State:
        """See `Search.begin`."""
        start = threat.start(x, streams.fork(job), "sphere")
        state = {
            "x": x,
            "y": y,
            "target": self.aim(clean, y, job).clone(),
            "iterate": start,
            "previous": start.clone(),
            "best": x.clone(),
            "best_gradient": torch.zeros_like(x),
            "adversarial": x.clone(),
            "found": torch.zeros_like(y, dtype=torch.bool),
            "iteration": torch.zeros_like(y),
            **self._fresh_schedule(x, y, threat),
        }
        return self.with_goal(state, clean, y)

    def with_goal(self, state: State, clean: Tensor, y: Tensor) -> State:
        """Return a fresh state; forms with a target put it in."""
        del clean, y
        return state

    def _fresh_schedule(self, x: Tensor, y: Tensor, threat: Threat) -> State:
        """Return the losses and step sizes of an ascent that has not begun."""
        unseen = torch.full_like(x.flatten(1)[:, 0], -torch.inf)
        first_window = torch.full_like(y, max(int(0.22 * self.steps), 1))
        return {
            "best_loss": unseen,
            "last_loss": torch.zeros_like(unseen),
            "step_size": torch.full_like(unseen, self.first_step(threat)),
            "increases": torch.zeros_like(y),
            "window": first_window,
            "window_left": first_window.clone(),
            "best_loss_at_check": unseen.clone(),
            "halved_at_check": torch.ones_like(y, dtype=torch.bool),
        }

    def _query(self, state: State, query: Query) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, loss and mean gradient at the iterate; of several random passes the last gives logits and loss."""
        y, target = state["y"], state["target"]
        return self._mean_gradient(query, state["iterate"], lambda z: self.loss(z, y, target))

    def _mean_gradient(self, query: Query, point: Tensor, of: LossFn) -> tuple[Tensor, Tensor, Tensor]:
        logits, loss, gradient = query.gradient(point, of)
        for _ in range(self.eot - 1):
            logits, loss, again = query.gradient(point, of)
            gradient = gradient + again
        return logits, loss, gradient / self.eot if self.eot > 1 else gradient

    def _checkpoint(self, state: State, started: Tensor, loss: Tensor, best_loss: Tensor) -> tuple[Tensor, State]:
        """Which slots halve their step size and go back to their best point, bool [B], and the bookkeeping after it.

        As in the published code, not the paper: the first window counts a rise from a loss of 0 to that of the first
        step, and a slot counts as halved before its first checkpoint.
        """
        increases = state["increases"] + (started & (loss > state["last_loss"]))
        left = state["window_left"] - started.to(torch.int64)
        check = left == 0
        stuck = ~state["halved_at_check"] & (state["best_loss_at_check"] >= best_loss)
        halve = check & ((increases <= self.rho * state["window"]) | stuck)
        shorter = (state["window"] - max(int(0.03 * self.steps), 1)).clamp_min(max(int(0.06 * self.steps), 1))
        window = torch.where(check, shorter, state["window"])
        return halve, {
            "last_loss": torch.where(started, loss, state["last_loss"]),
            "step_size": torch.where(halve, 0.5 * state["step_size"], state["step_size"]),
            "increases": increases * ~check,
            "window": window,
            "window_left": torch.where(check, window, left),
            "best_loss_at_check": torch.where(check | ~started, best_loss, state["best_loss_at_check"]),
            "halved_at_check": torch.where(check, halve, state["halved_at_check"]),
        }

    def step(self, state: State, query: Query, threat: Threat) -> State:
        """Look at the iterate, keep what is best, and move with momentum."""
        logits, loss, gradient = self._query(state, query)
        fooled = reached(logits, state)
        shown = fooled | ((loss > state["best_loss"]) & ~state["found"])
        return {
            **self._climb(state, state["iteration"] > 0, loss, gradient, threat),
            "adversarial": torch.where(per_slot(shown, state["x"]), state["iterate"], state["adversarial"]),
            "found": state["found"] | fooled,
            "iteration": state["iteration"] + 1,
        }

    def _climb(self, state: State, started: Tensor, loss: Tensor, gradient: Tensor, threat: Threat) -> State:
        """The next iterate of slots that have `started` (bool [B]) or are at their first.

        Going back to the best point leaves the point that the momentum is taken from, as in the published code.
        """
        x, iterate = state["x"], state["iterate"]
        better = loss > state["best_loss"]
        best = torch.where(per_slot(better, x), iterate, state["best"])
        best_gradient = torch.where(per_slot(better, x), gradient, state["best_gradient"])
        best_loss = torch.where(better, loss, state["best_loss"])
        halve, schedule = self._checkpoint(state, started, loss, best_loss)

        origin = torch.where(per_slot(halve, x), best, iterate)
        uphill = torch.where(per_slot(halve, x), best_gradient, gradient)
        target = threat.project(threat.ascend(origin, uphill, schedule["step_size"]), x)
        share = per_slot(torch.where(started, self.momentum, 1.0), x)
        moved = origin + (target - origin) * share + (origin - state["previous"]) * (1 - share)
        return {
            **state,
            **schedule,
            "iterate": threat.project(moved, x),
            "previous": origin,
            "best": best,
            "best_gradient": best_gradient,
            "best_loss": best_loss,
        }


@attacks.register("apgd-ce", numbers=("steps",))
@dataclass(frozen=True)
class APGDCE(Targeted, APGD):
    """Auto-PGD on the cross-entropy.

    When: for a gradient attack with no step size to choose; the first member of AutoAttack.

    Paper: Croce and Hein 2020, Reliable evaluation of adversarial robustness, arXiv 2003.01690.

    Args:
        steps: gradient steps after the start, at least 1; the short form `apgd-ce-50` sets it.
        rho: the step is halved where the loss rose in at most this share of a window's steps; in (0, 1].
        restarts: independent starts, at least 1.
        eot: gradients averaged per step, for models with random outputs, at least 1.
        target: for evaluation: the answer wanted, `next` (the class after the label's), `least likely` or a class;
            None for any wrong one. The loss of the target is then descended.
    """

    target: int | str | None = unless_given()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settle_target(self)

    def notes(self, num_classes: int) -> list[str]:
        """That it is targeted, if it is."""
        del num_classes
        return self.target_notes()

    def aim(self, clean: Tensor, y: Tensor, job: Tensor) -> Tensor:
        """The goal, if there is one."""
        goal = self.goal(clean, y)
        return super().aim(clean, y, job) if goal is None else goal

    def loss(self, logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy; with a target that of the target, negated."""
        return losses.cross_entropy(logits, y) if self.target is None else -losses.cross_entropy(logits, target)


@attacks.register("apgd-dlr", numbers=("steps",))
@dataclass(frozen=True)
class APGDDLR(Targeted, APGD):
    """Auto-PGD on the difference of logits ratio; on the margin below 3 classes, where the ratio is not defined.

    When: where cross-entropy fails because logits are scaled: the ratio does not depend on their scale.

    Paper: Croce and Hein 2020, Reliable evaluation of adversarial robustness, arXiv 2003.01690.

    Args:
        steps: gradient steps after the start, at least 1; the short form `apgd-dlr-50` sets it.
        rho: the step is halved where the loss rose in at most this share of a window's steps; in (0, 1].
        restarts: independent starts, at least 1.
        eot: gradients averaged per step, for models with random outputs, at least 1.
        target: for evaluation: the answer wanted, `next` (the class after the label's), `least likely` or a class;
            None for any wrong one. The numerator is then the target's margin over all other classes.
    """

    target: int | str | None = unless_given()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settle_target(self)

    def notes(self, num_classes: int) -> list[str]:
        """That the margin stands in for the ratio below 3 classes."""
        needed, name = (3, "DLR") if self.target is None else (4, "targeted DLR")
        if num_classes >= needed:
            return self.target_notes()
        lacking = f"{self.label}: {name} needs {needed} classes; with {num_classes} the margin loss was used instead"
        return [lacking, *self.target_notes()]

    def aim(self, clean: Tensor, y: Tensor, job: Tensor) -> Tensor:
        """The goal, if there is one."""
        goal = self.goal(clean, y)
        return super().aim(clean, y, job) if goal is None else goal

    def loss(self, logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
        """DLR or the margin; with a target those that are greater than 0 where it is the answer."""
        if self.target is None:
            return losses.dlr(logits, y) if logits.shape[1] >= 3 else losses.margin(logits, y)
        return losses.dlr_to(logits, target) if logits.shape[1] >= 4 else -losses.margin(logits, target)


@attacks.register("apgd-t", numbers=("steps",))
@dataclass(frozen=True)
class APGDT(APGD):
    """Auto-PGD on the targeted difference of logits ratio, towards one class after another.

    The targets are the classes that follow the true one in the order of the clean logits. Any misclassification counts.
    Below 4 classes the targeted margin stands in for the ratio, which is not defined there.

    When: if one attack is all you can afford: within AutoAttack it decides most of the images that PGD leaves.

    Paper: Croce and Hein 2020, Reliable evaluation of adversarial robustness, arXiv 2003.01690.

    Args:
        steps: gradient steps after the start, at least 1; the short form `apgd-t-50` sets it.
        rho: the step is halved where the loss rose in at most this share of a window's steps; in (0, 1].
        restarts: independent starts per target, at least 1.
        eot: gradients averaged per step, for models with random outputs, at least 1.
        targets: classes tried, at least 1; fewer where the model has fewer.
    """

    targets: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "targets")

    def notes(self, num_classes: int) -> list[str]:
        """That the margin stands in for the ratio below 4 classes."""
        if num_classes >= 4:
            return []
        return [f"{self.label}: targeted DLR needs 4 classes; with {num_classes} the margin loss was used instead"]

    def jobs(self, num_classes: int) -> int:
        """One per target and restart."""
        return min(self.targets, num_classes - 1) * self.restarts

    def aim(self, clean: Tensor, y: Tensor, job: Tensor) -> Tensor:
        """Restarts of one target follow each other."""
        return class_by_rank(clean, y, 1 + job // self.restarts)

    def loss(self, logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
        """Targeted DLR or the targeted margin."""
        return (losses.targeted_dlr if logits.shape[1] >= 4 else losses.targeted_margin)(logits, y, target)


_RADII = (3.0, 2.0, 1.0)
"""Under L1 three ascents follow one another, within balls of these multiples of eps."""


@functools.cache
def _ascents(steps: int) -> tuple[tuple[float, int], ...]:
    """Radius, in units of eps, and gradient steps of each ascent under L1; one alone where there are less than 3."""
    if steps < 3:
        return ((1.0, steps),)
    share = math.ceil(0.3 * steps)
    lengths = (share, share, max(steps - 2 * share, 0))
    return tuple(zip(_RADII, lengths, strict=True))


@dataclass(frozen=True)
class _Sparse(APGD):
    """Auto-PGD under L1: steps along the steepest values alone, whose number follows what the best point has changed.

    Croce and Hein 2021, Mind the box: l1-APGD for sparse adversarial attacks, arXiv 2103.01208, algorithm 1, with the
    three radii of AutoAttack's L1 version: each ascent begins at the best point of the one before, and the last alone
    offers examples. There is no momentum, and rho has no part in it. A value counts as changed if it differs from the
    image's; the published code counts some that it has moved there and back, since its sums round.
    """

    form: APGD = field(kw_only=False, default=None)  # type: ignore[assignment]  # always given, but fields before it have defaults

    def notes(self, num_classes: int) -> list[str]:
        """Those of the form that it is of."""
        return self.form.notes(num_classes)

    def jobs(self, num_classes: int) -> int:
        """As many as the form has."""
        return self.form.jobs(num_classes)

    def goal(self, clean: Tensor, y: Tensor) -> Tensor | None:
        """The form's."""
        return self.form.goal(clean, y)

    def with_goal(self, state: State, clean: Tensor, y: Tensor) -> State:
        """The form's."""
        return self.form.with_goal(state, clean, y)

    def aim(self, clean: Tensor, y: Tensor, job: Tensor) -> Tensor:
        """The form's."""
        return self.form.aim(clean, y, job)

    def loss(self, logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
        """The form's."""
        return self.form.loss(logits, y, target)

    def max_steps(self) -> int:
        """The gradient steps, and a look at the start of each ascent."""
        return sum(steps + 1 for _, steps in _ascents(self.steps))

    def begin(self, x: Tensor, y: Tensor, clean: Tensor, job: Tensor, threat: Threat, streams: Streams) -> State:
        """See `Search.begin`. The start is normal noise, brought to the first ball and the box."""
        noise = streams.fork(job).normal(*x.shape[1:]).to(x.dtype)
        start = (x + project_l1(noise, x, _ascents(self.steps)[0][0] * threat.eps)).clamp_(0.0, 1.0)
        unseen = torch.full_like(x.flatten(1)[:, 0], -torch.inf)
        state = {
            "x": x,
            "y": y,
            "target": self.aim(clean, y, job).clone(),
            "iterate": start,
            "best": x.clone(),
            "best_gradient": torch.zeros_like(x),
            "best_loss": unseen,
            "step_size": torch.full_like(unseen, threat.eps),
            "changed": torch.ones_like(unseen),
            "adversarial": x.clone(),
            "found": torch.zeros_like(y, dtype=torch.bool),
            "iteration": torch.zeros_like(y),
        }
        return self.with_goal(state, clean, y)

    def step(self, state: State, query: Query, threat: Threat) -> State:
        """Look at the iterate, keep what is best, and move the steepest values."""
        x, iterate = state["x"], state["iterate"]
        ascents = _ascents(self.steps)
        starts = [sum(steps + 1 for _, steps in ascents[:k]) for k in range(len(ascents))]
        number = sum((state["iteration"] >= start).to(torch.int64) for start in starts[1:]) + torch.zeros_like(
            state["y"]
        )
        of_ascent = functools.partial(torch.tensor, device=x.device)
        radii = of_ascent([threat.eps * radius for radius, _ in ascents], dtype=x.dtype)
        radius, age = radii[number], state["iteration"] - of_ascent(starts)[number]
        length = of_ascent([steps for _, steps in ascents])[number]
        period = of_ascent([max(int(0.04 * steps), 1) for _, steps in ascents])[number]

        logits, loss, gradient = self._query(state, query)
        gradient = finite(gradient)
        first, last = age == 0, number == len(ascents) - 1
        fooled = last & reached(logits, state)
        better = first | (loss > state["best_loss"])
        shown = fooled | (last & better & ~state["found"])
        best = torch.where(per_slot(better, x), iterate, state["best"])
        best_gradient = torch.where(per_slot(better, x), gradient, state["best_gradient"])

        check = ~first & (age % period == 0)
        count = (best != x).flatten(1).sum(1).to(x.dtype)
        fewer = check & (count / state["changed"] < 0.95)
        shorter = (state["step_size"] / 1.5).clamp(min=radius / 10.0, max=radius)
        step_size = torch.where(first | fewer, radius, torch.where(check, shorter, state["step_size"]))
        changed = torch.where(first | check, count, state["changed"])

        origin = torch.where(per_slot(fewer, x), best, iterate)
        uphill = torch.where(per_slot(fewer, x), best_gradient, gradient)
        size = x[0].numel()
        place = ((1.0 - changed / size / 1.5) * size).clamp(0, size - 1).to(torch.int64)
        moved = origin - x + per_slot(step_size, x) * steepest(uphill, size - place)
        over = age >= length
        moved = torch.where(per_slot(over, x), best - x, moved)
        radius = torch.where(over, radii[(number + 1).clamp_max(len(ascents) - 1)], radius)
        return {
            **state,
            "iterate": (x + project_l1(moved, x, radius)).clamp_(0.0, 1.0),
            "best": best,
            "best_gradient": best_gradient,
            "best_loss": torch.where(better, loss, state["best_loss"]),
            "step_size": step_size,
            "changed": changed,
            "adversarial": torch.where(per_slot(shown, x), iterate, state["adversarial"]),
            "found": state["found"] | fooled,
            "iteration": state["iteration"] + 1,
        }
