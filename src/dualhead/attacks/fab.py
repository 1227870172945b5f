"""The fast adaptive boundary attack, which looks for the nearest example rather than for one within a ball.

Croce and Hein 2020, Minimally distorted adversarial examples with a fast adaptive boundary attack. Constants and order
of operations follow the published code.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dualhead.attacks import losses
from dualhead.attacks.base import (
    Query,
    Search,
    State,
    attacks,
    class_by_rank,
    per_slot,
    predictions,
    require_at_least_one,
)
from dualhead.components.fields import Real, at_least
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats import Norm, Threat, finite, norm_of

_NEWTON_STEPS: dict[Norm, int] = {"Linf": 8, "L2": 12}
"""Enough for float32's last digits where up to 0.95 of what the box allows is needed; images need far less."""


def to_hyperplane(point: Tensor, normal: Tensor, excess: Tensor, norm: Norm) -> Tensor:
    """The shortest way within the box from points to the hyperplanes on which a linear function is smaller by `excess`.

    Each value moves as far as the common multiplier asks, or as far as the box lets it, so that what is gained is a
    concave, piecewise linear function of the multiplier; Newton's method climbs it from below without sorting and
    without overshooting. Under L1 values go to their faces in the order of their weights until enough is gained. Where
    the box ends before the hyperplane, all values go to its faces.

    Args:
        point: [B, n] in [0, 1].
        normal: gradients of the functions, [B, n].
        excess: [B], of either sign.
        norm: what is shortest.

    Returns:
        Displacements [B, n].
    """
    scale = normal.abs().amax(1, keepdim=True).clamp_min(1e-30)
    needed = excess.abs()[:, None] / scale
    weight = (normal / scale).abs_()
    direction = normal.sign().mul_(torch.where(excess[:, None] < 0, 1.0, -1.0))
    limit = (direction * (0.5 - point)).add_(0.5)  # 1 - t upwards, t downwards
    if norm == "L1":
        return direction * _steepest_first(weight, limit, needed)
    reachable = torch.linalg.vecdot(weight, limit)[:, None] > needed
    if norm == "L2":  # a value moves by its weight for each unit of the multiplier; under Linf all move alike
        direction.mul_(weight)
        limit.div_(weight.clamp_min(1e-30))
        weight.square_()
    multiplier = torch.where(reachable, 0.0, 1e35)
    buffer = torch.empty_like(limit)
    for _ in range(_NEWTON_STEPS[norm]):
        gained = torch.minimum(limit, multiplier, out=buffer).mul_(weight).sum(1, keepdim=True)
        rise = torch.gt(limit, multiplier, out=buffer).mul_(weight).sum(1, keepdim=True)
        multiplier = multiplier + ((needed - gained) / rise.clamp_min_(1e-30)).clamp_(0.0, 1e35)
    return direction * torch.minimum(limit, multiplier)


def _steepest_first(weight: Tensor, limit: Tensor, needed: Tensor) -> Tensor:
    """How far values move [B, n], those of large weight first, until their weighted sum is `needed` [B, 1]."""
    weights, order = weight.sort(dim=1, descending=True, stable=True)
    gains = weights * limit.gather(1, order)
    left = needed - (gains.cumsum(1) - gains)  # before each value
    moved = torch.minimum(limit.gather(1, order), (left / weights.clamp_min(1e-30)).clamp_min(0.0))
    return torch.zeros_like(limit).scatter_(1, order, moved * (weights > 0))


def _length(delta: Tensor, norm: Norm) -> Tensor:
    if norm == "L1":
        return delta.abs().sum(1)
    return delta.abs().amax(1) if norm == "Linf" else torch.linalg.vector_norm(delta, dim=1)


def _dual_length(gradient: Tensor, norm: Norm) -> Tensor:
    if norm == "L1":
        return gradient.abs().amax(1)
    return gradient.abs().sum(1) if norm == "Linf" else torch.linalg.vector_norm(gradient, dim=1)


@dataclass(frozen=True)
class _FAB(Search):
    """Base of both forms of FAB.

    Args:
        steps: iterations, at least 1; the short form `fab-50` sets it.
        restarts: the first starts at the image, others at random points at eps / 2; at least 1.
        alpha_max: largest weight of the step taken from the clean image, in (0, 1].
        eta: how far a step goes towards the hyperplane and beyond it, at least 1.
        beta: how much of its distance an example keeps when it goes back towards the image, in (0, 1).
        minimise: run all targets and restarts to the end for the smallest distance, which the state keeps as
            `distance`, instead of stopping at the first example within eps.
    """

    norms = ("Linf", "L2", "L1")

    steps: int = 100
    restarts: int = 1
    alpha_max: Real = 0.1
    eta: Real = 1.05
    beta: Real = 0.9
    minimise: bool = False

    def __post_init__(self) -> None:
        require_at_least_one(self, "steps", "restarts")
        if not 0 < self.alpha_max <= 1:
            raise UserError(f"alpha_max must lie in (0, 1], got {self.alpha_max:g}; the published value is 0.1")
        at_least(1, "eta", self.eta, "the published value is 1.05")
        if not 0 < self.beta < 1:
            raise UserError(f"beta must lie in (0, 1), got {self.beta:g}; the published value is 0.9")

    @abstractmethod
    def tries(self, num_classes: int) -> int:
        """Targets times restarts."""

    @abstractmethod
    def boundary(self, state: State, query: Query, norm: Norm) -> tuple[Tensor, Tensor]:
        """Difference of logits [B] and its gradient [B, ...] at the iterate, for the boundary to go to."""

    def target(self, clean: Tensor, y: Tensor, number: Tensor) -> Tensor:
        """The class that a try aims at, int64 [B]; the untargeted form does not use it."""
        del clean, number
        return y

    def jobs(self, num_classes: int) -> int:
        """One per target and restart; with `minimise` one that goes through all of them."""
        return 1 if self.minimise else self.tries(num_classes)

    def begin(self, x: Tensor, y: Tensor, clean: Tensor, job: Tensor, threat: Threat, streams: Streams) -> State:
        """See `Search.begin`."""
        state = {
            "x": x,
            "y": y,
            "clean": clean,
            "keys": streams.keys.clone(),
            "adversarial": x.clone(),
            "distance": torch.full_like(x.flatten(1)[:, 0], torch.inf),
            "found": torch.zeros_like(y, dtype=torch.bool),
            "iteration": torch.zeros_like(y),
        }
        return {**state, **self._start(state, job, threat)}

    def _start(self, state: State, number: Tensor, threat: Threat) -> State:
        """Iterate and target with which the given try starts, for all slots."""
        x = state["x"].clone()
        if self.restarts > 1:
            half_way = threat.within(threat.eps / 2)
            random = half_way.start(x, Streams(state["keys"]).fork(number), "sphere")
            x = torch.where(per_slot(number % self.restarts > 0, x), random, x)
        return {"iterate": x, "target": self.target(state["clean"], state["y"], number).clone()}

    def _next_try(self, state: State, threat: Threat) -> State:
        """With `minimise`: the state in which slots that are done with one try have begun the next."""
        number = state["iteration"] // self.steps
        done = (state["iteration"] % self.steps == 0) & (number > 0)
        fresh = self._start(state, number, threat)
        return {**state, **{k: torch.where(per_slot(done, v), v, state[k]) for k, v in fresh.items()}}

    def step(self, state: State, query: Query, threat: Threat) -> State:
        """Step towards the boundary's linearisation; where that is crossed, keep the nearest and go back inside."""
        if self.minimise:
            state = self._next_try(state, threat)
        x, iterate, norm = state["x"], state["iterate"], norm_of(threat)
        difference, gradient = self.boundary(state, query, norm)
        origin, here, normal = x.flatten(1), iterate.flatten(1), gradient.flatten(1)
        way = to_hyperplane(here, normal, difference, norm)
        way_from_x = to_hyperplane(origin, normal, difference + torch.linalg.vecdot(normal, origin - here), norm)
        near, far = _length(way, norm).clamp_min(1e-8), _length(way_from_x, norm).clamp_min(1e-8)
        alpha = (near / (near + far)).clamp_max(self.alpha_max)[:, None]
        moved = (here + self.eta * way) * (1 - alpha) + (origin + self.eta * way_from_x) * alpha
        candidate = moved.clamp_(0.0, 1.0).reshape(x.shape)

        fooled = predictions(query.logits(candidate)) != state["y"]
        distance = _length(candidate.flatten(1) - origin, norm)
        nearest = fooled & (distance < state["distance"])
        within = fooled & (distance <= threat.eps)
        shown = nearest if self.minimise else nearest | (within & ~state["found"])
        best = torch.where(nearest, distance, state["distance"])
        last = state["iteration"] + 1 >= self.max_steps()
        return {
            **state,
            "iterate": torch.where(per_slot(fooled, x), x + self.beta * (candidate - x), candidate),
            "adversarial": torch.where(per_slot(shown, x), candidate, state["adversarial"]),
            "distance": best,
            "found": last & (best <= threat.eps) if self.minimise else state["found"] | within,
            "iteration": state["iteration"] + 1,
        }


@attacks.register("fab", numbers=("steps",))
@dataclass(frozen=True)
class FAB(_FAB):
    """FAB towards the nearest of all boundaries: a backward pass for every class but one in each step.

    When: for the distance to the nearest boundary rather than a verdict at one eps, with few classes: each adds a
    backward pass.

    Paper: Croce and Hein 2020, Minimally distorted adversarial examples, arXiv 1907.02044.

    Args:
        steps: iterations, at least 1; the short form `fab-50` sets it.
        restarts: the first starts at the image, others at random points at eps / 2; at least 1.
        alpha_max: largest weight of the step taken from the clean image, in (0, 1].
        eta: how far a step goes towards the hyperplane and beyond it, at least 1.
        beta: how much of its distance an example keeps when it goes back towards the image, in (0, 1).
        minimise: run all restarts to the end for the smallest distance, which the state keeps as `distance`, instead of
            stopping at the first example within eps.
    """

    def tries(self, num_classes: int) -> int:
        """The restarts."""
        del num_classes
        return self.restarts

    def max_steps(self) -> int:
        """The iterations; with `minimise` those of all restarts."""
        return self.steps * (self.restarts if self.minimise else 1)

    def boundary(self, state: State, query: Query, norm: Norm) -> tuple[Tensor, Tensor]:
        """The boundary that is nearest by linearisation."""
        y = state["y"]

        def differences(logits: Tensor) -> Iterator[Tensor]:
            num_classes = logits.shape[1]
            return (losses.targeted_margin(logits, y, (y + k) % num_classes) for k in range(1, num_classes))

        nearest: tuple[Tensor, Tensor, Tensor] | None = None
        for difference, slope in query.gradients(state["iterate"], differences):
            gradient = finite(slope)
            distance = difference.abs() / (_dual_length(gradient.flatten(1), norm) + 1e-12)
            if nearest is None:
                nearest = distance, difference, gradient
                continue
            nearer = distance < nearest[0]
            nearest = (
                torch.where(nearer, distance, nearest[0]),
                torch.where(nearer, difference, nearest[1]),
                torch.where(per_slot(nearer, gradient), gradient, nearest[2]),
            )
        assert nearest is not None  # there are at least two classes
        return nearest[1], nearest[2]


@attacks.register("fab-t", numbers=("steps",))
@dataclass(frozen=True)
class FABT(_FAB):
    """FAB towards one class after another, in the order of the clean logits; any misclassification counts.

    When: as `fab`, with many classes: a step costs the same for any number of them.

    Paper: Croce and Hein 2020, Minimally distorted adversarial examples, arXiv 1907.02044.

    Args:
        steps: iterations, at least 1; the short form `fab-t-50` sets it.
        restarts: per target; the first starts at the image, others at random points at eps / 2; at least 1.
        alpha_max: largest weight of the step taken from the clean image, in (0, 1].
        eta: how far a step goes towards the hyperplane and beyond it, at least 1.
        beta: how much of its distance an example keeps when it goes back towards the image, in (0, 1).
        minimise: run all targets and restarts to the end for the smallest distance, which the state keeps as
            `distance`, instead of stopping at the first example within eps.
        targets: classes tried, at least 1; fewer where the model has fewer.
    """

    targets: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "targets")

    def parts(self, num_classes: int, threat: Threat, num_heads: int = 1) -> Sequence[Search]:
        """Itself, with no more targets than there are."""
        super().parts(num_classes, threat, num_heads)
        return (replace(self, targets=min(self.targets, num_classes - 1)).labelled(self.label),)

    def tries(self, num_classes: int) -> int:
        """Targets times restarts."""
        return min(self.targets, num_classes - 1) * self.restarts

    def max_steps(self) -> int:
        """The iterations; with `minimise` those of all targets and restarts."""
        return self.steps * (self.targets * self.restarts if self.minimise else 1)

    def target(self, clean: Tensor, y: Tensor, number: Tensor) -> Tensor:
        """Restarts of one target follow each other."""
        return class_by_rank(clean, y, (1 + number // self.restarts).clamp_max(clean.shape[1] - 1))

    def boundary(self, state: State, query: Query, norm: Norm) -> tuple[Tensor, Tensor]:
        """The boundary to the target."""
        del norm
        y, target = state["y"], state["target"]
        _, difference, gradient = query.gradient(
            state["iterate"], lambda logits: losses.targeted_margin(logits, y, target)
        )
        return difference, finite(gradient)
