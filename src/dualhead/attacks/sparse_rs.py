"""Sparse-RS: random search for few pixels (Croce et al. 2022).

The published schedules, rescaled to the number of queries. Unlike there, each image draws places and colours of
its own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from dualhead.attacks.base import attacks, require_at_least_one
from dualhead.attacks.proposals import Proposals
from dualhead.components.fields import Real, unless_given
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats import Threat
from dualhead.threats.few_pixels import FewPixels
from dualhead.threats.patch import Patch

_BOUNDS = (0, 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After these of 10,000 queries the share that is drawn anew is divided by the next of these numbers:"""
_PIXELS = (1, 2, 2, 4, 5, 6, 8, 10, 12, 15, 20)
_PATCHES = (1, 1, 2, 4, 8, 16, 32, 32, 64, 64, 128)


@functools.cache
def _schedule(patches: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    divisors = _PATCHES if patches else _PIXELS
    return torch.tensor(_BOUNDS, device=device), torch.tensor(divisors, device=device, dtype=torch.float32)


@attacks.register("sparse-rs", numbers=("queries",))
@dataclass(frozen=True)
class SparseRS(Proposals):
    """Random search over places and colours of few pixels, on the margin loss. Colours are corners of the box.

    Under L0 a share of the changed pixels moves elsewhere, with new colours. A patch takes a new colour in a square
    within it, or, every fifth time at first, moves.

    When: beside PGD under L0 and for patches: it needs no gradient, and projections of gradients seldom find the best
    places.

    Paper: Croce et al. 2022, Sparse-RS: a Versatile Framework for Query-Efficient Sparse Black-Box Adversarial Attacks,
    arXiv 2006.12834.

    Args:
        queries: candidates tried after the start, at least 1; the short form `sparse-rs-1000` sets it.
        alpha: share that the first candidates draw anew, in (0, 1].
        restarts: independent searches, at least 1.
        target: the answer wanted, `next` (the class after the label's), `least likely` or a class; None for any wrong
            one.
    """

    norms = ("L0", "patch")

    queries: int = 5000
    alpha: Real = 0.8
    restarts: int = 1
    target: int | str | None = unless_given()

    def __post_init__(self) -> None:
        require_at_least_one(self, "queries", "restarts")
        if not 0 < self.alpha <= 1:
            raise UserError(f"alpha must lie in (0, 1], got {self.alpha:g}; the published value is 0.8")
        self.settle_target(self)

    def max_steps(self) -> int:
        """The look at the start, and the candidates."""
        return self.queries + 1

    def first(self, x: Tensor, threat: Threat, streams: Streams) -> Tensor:
        """Return random places with random corners of the box; a patch begins with stripes, as published."""
        if not isinstance(threat, Patch):
            return threat.start(x, streams.fork("start"), "sphere")
        streams = streams.fork("start")
        colours = (streams.fork("stripes").uniform(x.shape[1], x.shape[3]) >= 0.5).to(x.dtype)[:, :, None]
        places = threat.square(self._corners(x, threat, streams), *x.shape[2:])
        return torch.where(places[:, None], colours, x)

    def propose(self, x: Tensor, best: Tensor, number: Tensor, streams: Streams, threat: Threat) -> Tensor:
        """Return `best` with some pixels, or a part of the patch, drawn anew."""
        assert isinstance(threat, FewPixels), "check comes first"
        streams, patches = streams.fork(number), isinstance(threat, Patch)
        bounds, divisors = _schedule(patches, x.device)
        share = self.alpha / divisors[torch.bucketize((number + 1) * 10000 // self.queries, bounds)]
        if isinstance(threat, Patch):
            return self._patch(x, best, number, share, streams, threat)
        return self._pixels(x, best, share, streams, threat)

    def _pixels(self, x: Tensor, best: Tensor, share: Tensor, streams: Streams, threat: FewPixels) -> Tensor:
        """Some changed pixels go back to what they were, and as many others, or what the budget has left, change."""
        channels, height, width = x.shape[1:]
        changed = threat.changed(best, x).flatten(1)
        drawn = streams.fork("order").uniform(height * width)
        budget = min(int(threat.eps), height * width)
        count = (share * budget).to(torch.int64).clamp_min(1)
        rank = torch.where(changed, drawn, 2.0).argsort(1).argsort(1)
        stays = changed & (rank >= count[:, None])
        others = torch.where(changed, 2.0, drawn).argsort(1).argsort(1)
        comes = ~changed & (others < (budget - stays.sum(1))[:, None])
        colours = (streams.fork("colours").uniform(channels, height, width) >= 0.5).to(x.dtype)
        new, old = (places.reshape(-1, 1, height, width) for places in (comes, stays))
        return torch.where(new, colours, torch.where(old, best, x))

    def _corners(self, x: Tensor, threat: Patch, streams: Streams) -> tuple[Tensor, Tensor]:
        """Random upper left corners of patches."""
        drawn = streams.fork("corner").uniform(2)
        rows, columns = (size - side + 1 for size, side in zip(x.shape[2:], threat.sides(*x.shape[2:]), strict=True))
        return (drawn[:, 0] * rows).to(torch.int64), (drawn[:, 1] * columns).to(torch.int64)

    def _patch(self, x: Tensor, best: Tensor, number: Tensor, share: Tensor, streams: Streams, threat: Patch) -> Tensor:
        """The patch with one colour in a square within it, or at another place."""
        height, width = x.shape[2:]
        sides = threat.sides(height, width)
        row, column = threat.corner((best - x).abs().sum(1))
        drawn = streams.fork("change").uniform(5)
        # Content: a square within the patch takes a corner of the box for its colour.
        side = (share.sqrt() * min(sides)).to(torch.int64).clamp_min(1)
        top = row + (drawn[:, 0] * (sides[0] - side + 1)).to(torch.int64)
        left = column + (drawn[:, 1] * (sides[1] - side + 1)).to(torch.int64)
        rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        high = (rows >= top[:, None]) & (rows < (top + side)[:, None])
        wide = (columns >= left[:, None]) & (columns < (left + side)[:, None])
        colour = (streams.fork("colour").uniform(x.shape[1]) >= 0.5).to(x.dtype)[:, :, None, None]
        coloured = torch.where((high[:, :, None] & wide[:, None])[:, None], colour, best)
        # Place: as far as still allowed, which falls to nothing.
        left_over = (1.0 - (number + 1) / self.queries).clamp_min(0.0) * 0.75
        reach = (left_over * height).to(torch.int64)
        away = ((drawn[:, 2:4] * (2 * reach + 1)[:, None]).to(torch.int64) - reach[:, None]).unbind(1)
        to_row = (row + away[0]).clamp(0, height - sides[0])
        to_column = (column + away[1]).clamp(0, width - sides[1])
        source = ((rows - (to_row - row)[:, None]) % height)[:, None, :, None].expand(x.shape)
        across = ((columns - (to_column - column)[:, None]) % width)[:, None, None].expand(x.shape)
        carried = best.gather(2, source).gather(3, across)
        moved = torch.where(threat.square((to_row, to_column), height, width)[:, None], carried, x)
        moves = ((number + 1) % (5 * (1 + (number + 1) // 1000)) == 0) & (reach > 0)
        return torch.where(moves[:, None, None, None], moved, coloured)
