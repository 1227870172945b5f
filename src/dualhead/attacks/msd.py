"""Multi steepest descent: one ascent whose steps each follow the norm under which the loss grows most.

Maini, Wong and Kolter 2020, Adversarial Robustness Against the Union of Multiple Perturbation Models, arXiv 1909.04068,
algorithm 1. It climbs within a union of balls, so it serves the objective `msd`, and no single threat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dualhead.attacks.base import Attack, Climb, Search, per_slot, slope
from dualhead.attacks.pgd import beside
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats import Threat


@dataclass(frozen=True)
class SteepestOfSeveral(Attack):
    """The ascent, for training.

    Args:
        threats: norms, each with its budget.
        steps: gradient steps, at least 1.
        factor: length of a step, as a multiple of eps / steps.
        start: `clean`, the images themselves, or `gaussian`, beside them, for losses that have no slope there.
    """

    registered_name = "msd"
    norms = ("Linf", "L2", "L1")

    threats: tuple[Threat, ...]
    steps: int
    factor: float
    start: Literal["clean", "gaussian"] = "clean"

    @property
    def begins_clean(self) -> bool:
        """If `start` says so."""
        return self.start == "clean"

    def parts(self, num_classes: int, threat: Threat, num_heads: int = 1) -> Sequence[Search]:
        """Refuse: it is for training.

        Raises:
            UserError: always.
        """
        del num_classes, threat, num_heads
        raise UserError("msd is for training; evaluate under each of its norms, with --threat given more than once")

    def maximise(self, climb: Climb, x: Tensor, threat: Threat, streams: Streams) -> Tensor:
        """Return the point where the value was highest of all that were seen, within one of the balls.

        See `Maximiser.maximise`. A step costs a forward and a backward pass, and a forward pass for each norm.
        """
        best = here = beside(x, threat, streams) if self.start == "gaussian" else x.clone()
        highest = torch.full_like(x.flatten(1)[:, 0], -torch.inf)
        for _ in range(self.steps):
            gradient, following = slope(climb, here), here
            reached = torch.full_like(highest, -torch.inf)
            for norm in self.threats:
                point = norm.project(norm.ascend(here, gradient, self.factor * norm.eps / self.steps), x)
                with torch.no_grad():
                    value = climb(point).to(highest.dtype)
                higher = value > reached
                following = torch.where(per_slot(higher, x), point, following)
                reached = torch.where(higher, value, reached)
            here = following
            better = reached > highest
            best = torch.where(per_slot(better, x), here, best)
            highest = torch.where(better, reached, highest)
        return best
