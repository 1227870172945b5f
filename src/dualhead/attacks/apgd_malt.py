"""Auto-PGD towards the classes whose boundaries are nearest by linearisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dualhead.attacks import losses
from dualhead.attacks.apgd import APGDT
from dualhead.attacks.base import Query, Search, State, attacks, per_slot, predictions, require_at_least_one
from dualhead.noise import Streams
from dualhead.threats import Threat, finite, norm_of


@attacks.register("apgd-malt", numbers=("steps",))
@dataclass(frozen=True)
class APGDMALT(APGDT):
    """Auto-PGD on the targeted difference of logits ratio, with targets by MALT, Mesoscopic Almost Linearity Targeting.

    Of the classes with the highest clean logits those come first whose boundary is nearest if the model is linear: the
    gap of the logits over the dual norm of the difference of their gradients at the clean image. That costs a pass
    forward and back for each candidate. Targets follow one another within one search. Written from the abstract: the
    authors' norm and number of candidates may differ.

    When: as `apgd-t`, with fewer targets: the right ones come first, above all with many classes.

    Paper: Melamed et al. 2024, MALT Powers Up Adversarial Attacks, arXiv 2407.02240.

    Args:
        steps: gradient steps after the start, at least 1; the short form `apgd-malt-50` sets it.
        rho: the step is halved where the loss rose in at most this share of a window's steps; in (0, 1].
        restarts: independent starts per target, at least 1.
        eot: gradients averaged per step, for models with random outputs, at least 1.
        targets: classes tried, at least 1; fewer where the model has fewer.
        candidates: classes that are ranked, at least as many as are tried; fewer where the model has fewer.
    """

    norms = ("Linf", "L2")

    candidates: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, "candidates")

    def parts(self, num_classes: int, threat: Threat, num_heads: int = 1) -> Sequence[Search]:
        """Itself, with no more targets and candidates than there are."""
        super().parts(num_classes, threat, num_heads)
        ranked = min(max(self.candidates, self.targets), num_classes - 1)
        tried = min(self.targets, num_classes - 1)
        return (replace(self, targets=tried, candidates=ranked).labelled(self.label),)

    def jobs(self, num_classes: int) -> int:
        """One per restart: each goes through all targets."""
        del num_classes
        return self.restarts

    def max_steps(self) -> int:
        """A look at each candidate's boundary, and the ascents."""
        return self.candidates + self.targets * (self.steps + 1)

    def begin(self, x: Tensor, y: Tensor, clean: Tensor, job: Tensor, threat: Threat, streams: Streams) -> State:
        """See `Search.begin`. Candidates are in the order of the clean logits."""
        others = clean.scatter(1, y[:, None], torch.inf)
        order = others.argsort(1).flip(1)[:, 1 : 1 + self.candidates]
        return {
            **super().begin(x, y, clean, torch.zeros_like(job), threat, streams),
            "keys": streams.keys.clone(),
            "job": job.clone(),
            "order": order.contiguous(),
            "distances": torch.full_like(order, torch.inf, dtype=x.dtype),
        }

    def step(self, state: State, query: Query, threat: Threat) -> State:
        """Look at the next candidate's boundary; once all are ranked, climb towards one after the other."""
        x, y, number = state["x"], state["y"], state["iteration"]
        ranking = number < self.candidates
        place = number.clamp_max(state["order"].shape[1] - 1)[:, None]
        point = torch.where(per_slot(ranking, x), x, state["iterate"])
        target = torch.where(ranking, state["order"].gather(1, place)[:, 0], state["target"])

        def climbed(z: Tensor) -> Tensor:
            return torch.where(ranking, losses.targeted_margin(z, y, target), self.loss(z, y, target))

        logits, loss, gradient = self._mean_gradient(query, point, climbed)
        distance = _linear_distance(-loss, finite(gradient), threat)
        distances = state["distances"].scatter(
            1, place, torch.where(ranking, distance, state["distances"].gather(1, place)[:, 0])[:, None]
        )
        fooled = ~ranking & (predictions(logits) != y)
        shown = fooled | (~ranking & (loss > state["best_loss"]) & ~state["found"])
        age = (number - self.candidates) % (self.steps + 1)
        after = {
            **self._climb(state, ~ranking & (age > 0), loss, gradient, threat),
            "distances": distances,
            "adversarial": torch.where(per_slot(shown, x), state["iterate"], state["adversarial"]),
            "found": state["found"] | fooled,
            "iteration": number + 1,
        }
        return self._next_target(after, threat)

    def _next_target(self, state: State, threat: Threat) -> State:
        """Slots that have ranked all candidates, or climbed towards one target, begin with the next."""
        x, done = state["x"], state["iteration"] - self.candidates
        begins = (done >= 0) & (done % (self.steps + 1) == 0)
        if x.device.type == "cpu" and not begins.any():  # elsewhere looking costs more than doing it in vain
            return state
        which = (done // (self.steps + 1)).clamp(0, min(self.targets, state["order"].shape[1]) - 1)
        nearest_first = state["order"].gather(1, state["distances"].argsort(stable=True, dim=1))
        order = torch.where((done == 0)[:, None], nearest_first, state["order"])
        stream = Streams(state["keys"]).fork(state["job"] * self.targets + which)
        start = threat.start(x, stream, "sphere")
        fresh = {
            **self._fresh_schedule(x, state["y"], threat),
            "iterate": start,
            "previous": start,
            "best": x,
            "best_gradient": torch.zeros_like(x),
            "target": order.gather(1, which[:, None])[:, 0],
        }
        return {**state, **{k: torch.where(per_slot(begins, v), v, state[k]) for k, v in fresh.items()}, "order": order}


def _linear_distance(gap: Tensor, gradient: Tensor, threat: Threat) -> Tensor:
    """Distance of the boundary by linearisation, in the threat's norm: gap [B] over the gradient's dual norm [B]."""
    slope = gradient.flatten(1)
    steepness = slope.abs().sum(1) if norm_of(threat) == "Linf" else torch.linalg.vector_norm(slope, dim=1)
    return gap / (steepness + 1e-12)
