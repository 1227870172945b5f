"""Random search in the space of any threat."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dualhead.attacks.base import attacks, per_slot, require_at_least_one
from dualhead.attacks.proposals import Proposals
from dualhead.components.fields import Real, unless_given
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats import Bounded, Threat


@attacks.register("random-search", numbers=("queries",))
@dataclass(frozen=True)
class RandomSearch(Proposals):
    """Random search that redraws a share of a point's values, on the margin loss; the share falls as it goes on.

    When: to check for masked gradients under threats that have no Square, such as flows or recolouring. Under a norm
    take `square`, for few pixels `sparse-rs`.

    Paper: this project's own, in the manner of Andriushchenko et al. 2020, Square Attack, arXiv 1912.00049.

    Args:
        queries: candidates tried after the start, at least 1; the short form `random-search-1000` sets it.
        share: of the values that the first candidates draw anew, in (0, 1]; it falls to a 64th of that, by halves.
        restarts: independent searches, at least 1.
        target: the answer wanted, `next` (the class after the label's), `least likely` or a class; None for any wrong
            one.
    """

    queries: int = 1000
    share: Real = 0.5
    restarts: int = 1
    target: int | str | None = unless_given()

    def __post_init__(self) -> None:
        require_at_least_one(self, "queries", "restarts")
        if not 0 < self.share <= 1:
            raise UserError(f"share must lie in (0, 1], got {self.share:g}")
        self.settle_target(self)

    def max_steps(self) -> int:
        """The look at the start, and the candidates."""
        return self.queries + 1

    def first(self, x: Tensor, threat: Threat, streams: Streams) -> Tensor:
        """Return random points."""
        return threat.start(x, streams.fork("start"), "ball")

    def propose(self, x: Tensor, best: Tensor, number: Tensor, streams: Streams, threat: Threat) -> Tensor:
        """Return `best` with some values of another random point, every other time one at all of the budget."""
        halvings = torch.log2(1.0 + 127.0 * number.clamp_min(0) / self.queries).floor()
        drawn = streams.fork(number)
        # Of few parameters one at least is drawn anew, more or less.
        free = math.prod(threat.shape(threat.image_shape)) if isinstance(threat, Bounded) else x[0].numel()
        share = (self.share * 2.0**-halvings).clamp_min(1.0 / free).to(best.dtype)
        anew = drawn.fork("which").uniform(math.prod(best.shape[1:])).reshape(best.shape) < per_slot(share, best)
        inside, outside = (threat.start(x, drawn.fork("point"), where) for where in ("ball", "sphere"))
        point = torch.where(per_slot(number % 2 == 0, best), inside, outside)
        return threat.project(torch.where(anew, point, best), x)
