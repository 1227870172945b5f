"""All points of a grid, for threats of few parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dualhead.attacks.base import Attack, Search, attacks, require_at_least_one
from dualhead.attacks.proposals import Proposals
from dualhead.components.fields import unless_given
from dualhead.noise import Streams
from dualhead.threats import Threat
from dualhead.threats.rotation import Rotation


@attacks.register("grid")
@dataclass(frozen=True)
class Grid(Attack):
    """Every combination of angles and shifts, evenly spaced, first those at the limits of the budget.

    When: against rotations, where it finds far more than gradients do.

    Paper: Engstrom et al. 2019, Exploring the Landscape of Spatial Robustness, arXiv 1712.02779: 31 angles and 5 shifts
    along each axis, 775 images.

    Args:
        angles: how many, at least 1.
        shifts: how many along each axis, at least 1.
    """

    norms = ("rotation",)

    angles: int = 31
    shifts: int = 5

    def __post_init__(self) -> None:
        require_at_least_one(self, "angles", "shifts")

    def parts(self, num_classes: int, threat: Threat, num_heads: int = 1) -> Sequence[Search]:
        """The search over the threat's grid."""
        assert isinstance(threat, Rotation), "check comes first"
        points = threat.lattice(self.angles, self.shifts)
        farthest = points.abs().amax(1).sort(descending=True, stable=True).indices
        rows = tuple(map(tuple, points[farthest].tolist()))
        return _Points(rows).labelled(self.label).parts(num_classes, threat, num_heads)


@dataclass(frozen=True)
class _Points(Proposals):
    """A look at one point after the other."""

    points: tuple[tuple[float, ...], ...] = field(repr=False)
    restarts: int = 1
    target: int | str | None = unless_given()

    def max_steps(self) -> int:
        """One for each point."""
        return len(self.points)

    def first(self, x: Tensor, threat: Threat, streams: Streams) -> Tensor:
        """Return the first point."""
        return self.propose(x, x, torch.full((len(x),), -1, device=x.device), streams, threat)

    def propose(self, x: Tensor, best: Tensor, number: Tensor, streams: Streams, threat: Threat) -> Tensor:
        """Return the point after those that were looked at, whatever is best."""
        del best, streams
        points = torch.tensor(self.points, device=x.device, dtype=x.dtype)
        chosen = points[(number + 1).clamp_max(len(points) - 1)]
        return threat.project(torch.cat((x[:, : -points.shape[1]], chosen), 1), x)
