"""A random point within the budget, for objectives that compare an image with its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dualhead.attacks.base import Attack, Climb, Search
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats import Threat


@dataclass(frozen=True)
class RandomPoint(Attack):
    """A maximiser that asks nothing: it draws a point uniformly. It is no attack to measure with, so it has no name."""

    registered_name: ClassVar[str] = "random point"

    def parts(self, num_classes: int, threat: Threat, num_heads: int = 1) -> Sequence[Search]:
        """Refuse to search.

        Raises:
            UserError: always.
        """
        raise UserError("a random point is no attack; use pgd")

    def maximise(self, climb: Climb, x: Tensor, threat: Threat, streams: Streams) -> Tensor:
        """Return a random point of the budget around each origin."""
        return threat.start(x, streams, "ball")
