"""The Square attack, which sees no gradient: random squares that are kept where the margin grows.

Andriushchenko et al. 2020, Square Attack: a query-efficient black-box adversarial attack via random search. Constants
follow AutoAttack's code, which leaves the schedule of sizes unscaled. Unlike there, each image has squares of its own.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dualhead.attacks.base import State, attacks, require_at_least_one
from dualhead.attacks.proposals import Proposals
from dualhead.components.fields import Real, unless_given
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats import Norm, Threat, norm_of, project_l1

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""The share of the image that a square covers is halved after these numbers of squares."""


def sides(p_init: float, height: int, width: int, norm: Norm) -> list[int]:
    """The side of a square after no, one, two, ... halvings; except under Linf odd, and 3 or more where that fits."""
    lengths = [round(math.sqrt(p_init * 2.0**-halvings * height * width)) for halvings in range(len(_HALVINGS) + 1)]
    if norm != "Linf":
        lengths = [max(length, 3) | 1 for length in lengths]
    return [min(max(length, 1), height, width) for length in lengths]


def bump(side: int, norm: Norm = "L2") -> Tensor:
    """The window [side, side] of norm 1: a hill above a pit, each made of nested rectangles (section 3.4).

    Under L1 the rectangles fade with the fourth power of their number, under L2 with the second.
    """
    power, order = (-2.0, 2) if norm == "L2" else (-4.0, 1)

    def hill(height: int) -> Tensor:
        rows = (torch.arange(height) - height // 2).abs()[:, None]
        columns = (torch.arange(side) - side // 2).abs()[None]
        rings = torch.arange(1, max(height, side) // 2 + 2, dtype=torch.float64) ** power
        above = rings.flip(0).cumsum(0).flip(0)  # a ring also carries all that lie outside it
        shape = above[torch.maximum(rows, columns)]
        return shape / _norm(shape, (0, 1), order).clamp_min(1e-12)

    whole = torch.cat((hill(side // 2), -hill(side - side // 2)))
    return whole / _norm(whole, (0, 1), order)


@functools.cache
def _schedule(p_init: float, height: int, width: int, norm: Norm, device: torch.device) -> tuple[Tensor, Tensor]:
    """After how many squares the share is halved, and the sides, on a device: copied there once."""
    return torch.tensor(_HALVINGS, device=device), torch.tensor(sides(p_init, height, width, norm), device=device)


@functools.cache
def _bump_table(p_init: float, height: int, width: int, norm: Norm, device: torch.device) -> Tensor:
    """float32 [halvings, 2, S, S]: for each side the window and its transpose, in the upper left corner of S by S."""
    lengths = sides(p_init, height, width, norm)
    table = torch.zeros(len(lengths), 2, max(lengths), max(lengths))
    for k, side in enumerate(lengths):
        table[k, 0, :side, :side] = bump(side, norm).float()
        table[k, 1, :side, :side] = bump(side, norm).T.float()
    return table.to(device)


def _sign(uniform: Tensor) -> Tensor:
    """-1 or 1 from numbers in [0, 1)."""
    return torch.where(uniform < 0.5, -1.0, 1.0)


def _norm(delta: Tensor, dims: tuple[int, ...], order: int = 2) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(delta, order, dim=dims, keepdim=True)
    return length


@attacks.register("square", numbers=("queries",))
@dataclass(frozen=True)
class Square(Proposals):
    """Random search over squares, on the margin loss.

    When: to check for masked gradients: it needs none, so it should find nothing that the others miss.

    Paper: Andriushchenko et al. 2020, Square Attack: a query-efficient black-box adversarial attack via random search,
    arXiv 1912.00049.

    Args:
        queries: squares tried after the start, at least 1; the short form `square-1000` sets it.
        p_init: share of the image that the first squares cover, in (0, 1].
        restarts: independent searches, at least 1.
        target: the answer wanted, `next` (the class after the label's), `least likely` or a class; None for any wrong
            one.
    """

    norms = ("Linf", "L2", "L1")

    queries: int = 5000
    p_init: Real = 0.8
    restarts: int = 1
    target: int | str | None = unless_given()

    def __post_init__(self) -> None:
        require_at_least_one(self, "queries", "restarts")
        self.settle_target(self)
        if not 0 < self.p_init <= 1:
            raise UserError(f"p_init must lie in (0, 1], got {self.p_init:g}; the published value is 0.8")

    def max_steps(self) -> int:
        """The look at the start, and the squares."""
        return self.queries + 1

    def begin(self, x: Tensor, y: Tensor, clean: Tensor, job: Tensor, threat: Threat, streams: Streams) -> State:
        """See `Search.begin`.

        Raises:
            UserError: if x does not hold images [B, C, H, W].
        """
        if x.ndim != 4:
            raise UserError(f"square needs images of shape [B, C, H, W], got {list(x.shape)}")
        return super().begin(x, y, clean, job, threat, streams)

    def first(self, x: Tensor, threat: Threat, streams: Streams) -> Tensor:
        """Return the published starts: stripes under Linf, tiles else."""
        return _stripes(x, threat, streams) if norm_of(threat) == "Linf" else _tiles(x, threat, streams)

    def propose(self, x: Tensor, best: Tensor, number: Tensor, streams: Streams, threat: Threat) -> Tensor:
        """Return `best` with one more square."""
        channels, height, width = x.shape[1:]
        bounds, lengths = _schedule(self.p_init, height, width, norm_of(threat), x.device)
        halvings = torch.bucketize(number, bounds)
        side = lengths[halvings]
        drawn = streams.fork(number).uniform(5 + channels)
        signs = _sign(drawn[:, 5:, None, None])
        # As in the published code, the last position that would fit is left out.
        space = torch.stack((height - side, width - side, height - side, width - side), 1)
        corners = (drawn[:, :4] * space).to(torch.int64)
        if norm_of(threat) == "Linf":
            inside = _inside(corners[:, :2], side, height, width)
            return torch.where(inside, (x + threat.eps * signs).clamp_(0.0, 1.0), best)
        table = _bump_table(self.p_init, height, width, norm_of(threat), x.device)
        first = _inside(corners[:, :2], side, height, width)
        second = _inside(corners[:, 2:], side, height, width)
        window = _placed(table, halvings * 2 + (drawn[:, 4] > 0.5), corners[:, :2], first)
        moved = _moved_mass if norm_of(threat) == "L2" else _moved_mass_l1
        return moved(x, best, window * signs, first, second, threat.eps)


def _inside(corner: Tensor, side: Tensor, height: int, width: int) -> Tensor:
    """Which pixels lie in squares with upper left corners [B, 2] and sides [B]: bool [B, 1, H, W]."""
    rows = torch.arange(height, device=side.device) - corner[:, :1]
    columns = torch.arange(width, device=side.device) - corner[:, 1:]
    high, wide = ((offset >= 0) & (offset < side[:, None]) for offset in (rows, columns))
    return (high[:, :, None] & wide[:, None])[:, None]


def _placed(table: Tensor, which: Tensor, corner: Tensor, inside: Tensor) -> Tensor:
    """Each slot's window, the given one of [..., S, S], at its corner in an image of zeros: [B, 1, H, W]."""
    size, (height, width) = table.shape[-1], inside.shape[2:]
    rows = (torch.arange(height, device=corner.device) - corner[:, :1]).clamp_(0, size - 1)
    columns = (torch.arange(width, device=corner.device) - corner[:, 1:]).clamp_(0, size - 1)
    place = (which * size * size)[:, None, None] + rows[:, :, None] * size + columns[:, None]
    return table.reshape(-1)[place][:, None] * inside


def _moved_mass(x: Tensor, best: Tensor, window: Tensor, first: Tensor, second: Tensor, eps: float) -> Tensor:
    """The L2 proposal (algorithm 3): the perturbation in the second square is spent on a bump in the first."""
    delta = best - x
    in_first = delta * first
    whole = _norm(delta, (1, 2, 3))
    windows = _norm(delta * (first | second), (2, 3))
    shape = window + in_first / (1e-12 + _norm(in_first, (2, 3)))
    unspent = (eps**2 - whole**2).clamp_min(0.0) / x.shape[1]
    bumped = shape * first * (unspent + windows**2).sqrt() / (1e-12 + _norm(shape * first, (2, 3)))
    changed = torch.where(first, bumped, delta * ~second)
    return (x + changed * (eps / (1e-12 + _norm(changed, (1, 2, 3))))).clamp_(0.0, 1.0)


def _moved_mass_l1(x: Tensor, best: Tensor, window: Tensor, first: Tensor, second: Tensor, eps: float) -> Tensor:
    """The L1 proposal, as in the published code: like that under L2, and then brought to ball and box.

    What the windows hold counts once for each channel, which asks for more than the budget; the projection sees to it.
    """
    delta = best - x
    in_first = delta * first
    windows = _norm(delta * (first | second), (2, 3), 1)
    shape = (window + in_first / (1e-12 + _norm(in_first, (2, 3), 1))) * first
    unspent = (eps - _norm(delta, (1, 2, 3), 1)).clamp_min(0.0) / x.shape[1]
    bumped = shape / (1e-12 + _norm(shape, (2, 3), 1)) * (unspent + windows) * x.shape[1]
    return _within_l1(x, torch.where(first, bumped, delta * ~second), eps)


def _within_l1(x: Tensor, delta: Tensor, eps: float) -> Tensor:
    return (x + project_l1(delta, x, eps * (1.0 - 1e-6))).clamp_(0.0, 1.0)


def _stripes(x: Tensor, threat: Threat, streams: Streams) -> Tensor:
    """The Linf start: vertical stripes, one pixel wide, of -eps or eps in each channel."""
    signs = _sign(streams.fork("stripes").uniform(x.shape[1], x.shape[3])).to(x.dtype)
    return (x + threat.eps * signs[:, :, None]).clamp_(0.0, 1.0)


def _tiles(x: Tensor, threat: Threat, streams: Streams) -> Tensor:
    """The start under L2 and L1: bumps on a grid of 5 rows; signs drawn for each channel, transposing for each tile."""
    batch, channels, height, width = x.shape
    side = min(max(height // 5, 1), width)
    top = max(height - side * 5, 0) // 2
    left = min(top, width - side)
    rows, columns = min((height - top) // side, height // side), min((width - left) // side, width // side)
    drawn = streams.fork("tiles").uniform(rows * columns, 1 + channels)
    signs = _sign(drawn[:, :, 1:]).to(x.dtype)
    tile = bump(side, norm_of(threat)).to(x.device, x.dtype)
    turned = torch.where(drawn[:, :, :1, None] > 0.5, tile.T, tile)  # [B, tiles, side, side]
    tiles = turned[:, :, None] * signs[..., None, None]  # [B, tiles, C, side, side]
    grid = tiles.reshape(batch, rows, columns, channels, side, side).permute(0, 3, 1, 4, 2, 5)
    delta = torch.zeros_like(x)
    delta[:, :, top : top + rows * side, left : left + columns * side] = grid.reshape(
        batch, channels, rows * side, columns * side
    )
    if norm_of(threat) == "L1":
        return _within_l1(x, delta, threat.eps)
    return (x + delta * (threat.eps / (1e-12 + _norm(delta, (1, 2, 3))))).clamp_(0.0, 1.0)
