"""Norms: a ball around each image, intersected with the box [0, 1] of valid images. A point is the image itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dualhead.components.fields import Real, above, parse_real
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats.base import Threat, Where

Norm = Literal["Linf", "L2", "L1"]
TYPICAL_EPS: Final[Mapping[str, str]] = {"Linf": "8/255", "L2": "0.5", "L1": "12"}
"""A radius of usual size by norm, as text; see `Threat.typical_eps`."""

_SPOKEN = {"linf": "Linf", "inf": "Linf", "l2": "L2", "2": "L2", "l1": "L1", "1": "L1"}
_SPARSE = 0.01
"""The share of an image's values that one step of steepest ascent moves under L1."""


def norm_named(name: object) -> str:
    """Return the norm that a name means, as other libraries write it too (`linf`, `L_inf`, `inf`, 2); else the name."""
    word = str(name)
    return _SPOKEN.get(word.lower().replace("_", "").replace("-", "").removesuffix(".0"), word)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *(1 for _ in like.shape[1:]))


def _l2(delta: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    return norms


def _ascending(values: Tensor) -> Tensor:
    """Values [B, n] in ascending order, sorted on a CPU by numpy: torch sorts indices too, in ten times the time."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64, torch.int64):
        return torch.from_numpy(np.sort(values.detach().numpy(), axis=1))
    return values.sort(1).values


def _descending(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one descending order, [B, 2 n], and beside each value 1 if it is of `start` and -1 if of `stop`.

    Args:
        start: at least 0, [B, n].
        stop: at least 0, [B, n].
    """
    both, count = torch.cat((start, stop), 1), start.shape[1]
    if both.device.type == "cpu" and both.dtype == torch.float32:
        # Bits of such floats are in the order of their values; shifted, they have room for the sign.
        keys = both.view(torch.int32).to(torch.int64).mul_(2)
        keys[:, :count] += 1
        keys = _ascending(keys).flip(1)
        return (keys >> 1).to(torch.int32).view(torch.float32), (keys & 1).to(both.dtype).mul_(2.0).sub_(1.0)
    places, order = both.sort(1, descending=True)
    return places, torch.where(order < count, 1.0, -1.0).to(both.dtype)


def project_l1(delta: Tensor, x: Tensor, radius: float | Tensor) -> Tensor:
    """The displacement nearest to `delta` among those within the L1 ball and, from x, within the box [0, 1].

    Each value shrinks by the same amount, stops at zero, and goes no further than its face of the box (Croce and Hein
    2021, Mind the box, arXiv 2103.01208, proposition 2.2). What is left is piecewise linear in that amount, so sorting
    the places where its slope changes gives the exact one.

    Args:
        delta: [B, ...].
        x: images [B, ...] in [0, 1].
        radius: of the ball; a number, or one per image [B].
    """
    size, centre = delta.flatten(1).abs(), x.flatten(1)
    room = torch.where(delta.flatten(1) > 0, 1.0 - centre, centre)
    if not isinstance(radius, Tensor):
        radius = torch.full((len(x),), radius, dtype=x.dtype, device=x.device)
    limit = radius.to(x.dtype)[:, None]
    capped = torch.minimum(size, room)
    # From the largest amount down: a value begins to move where the amount is its size, and stops `room` below that.
    places, turns = _descending(size, (size - room).clamp_min(0.0))
    moving = turns.cumsum(1)
    steps = torch.cat((places[:, :-1] - places[:, 1:], places[:, -1:]), 1)
    reached = (moving * steps).cumsum(1)  # the length when the amount has fallen to the next place
    last = (reached < limit).sum(1, keepdim=True).clamp_max(places.shape[1] - 1)
    before = torch.where(last > 0, reached.gather(1, (last - 1).clamp_min(0)), 0.0)
    amount = places.gather(1, last) - (limit - before) / moving.gather(1, last).clamp_min(1.0)
    # One step of Newton takes away what the running sum's rounding has left, which grows with the number of values.
    left = torch.minimum((size - amount).clamp_min(0.0), room).sum(1, keepdim=True) - limit
    free = ((size > amount) & (size - amount < room)).sum(1, keepdim=True)
    amount = amount + left / free.clamp_min(1)
    amount = torch.where(capped.sum(1, keepdim=True) <= limit, 0.0, amount.clamp_min(0.0))
    shrunk = torch.minimum((size - amount).clamp_min(0.0), room)
    return (delta.flatten(1).sign() * shrunk).reshape(delta.shape)


def finite(gradient: Tensor) -> Tensor:
    """Gradients [B, ...] with 0 for NaN, and for an infinite slope, as a root has at 0, the image's largest finite one.

    One such pixel would otherwise leave no direction for all others.
    """
    known = gradient.nan_to_num(0.0, 0.0, 0.0)
    largest = _per_sample(known.flatten(1).abs().amax(1), gradient)
    return torch.clamp(gradient.nan_to_num(0.0), -largest, largest)


@dataclass(frozen=True)
class ThreatModel(Threat):
    """A ball around each image, intersected with the box of valid images.

    Args:
        norm: `"Linf"`, `"L2"` or `"L1"`.
        eps: radius in units of images in [0, 1]; also as text, `"8/255"`. Greater than 0.

    Raises:
        UserError: for an unknown norm or an impossible radius.
    """

    norm: Norm
    eps: Real

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", norm_named(self.norm))
        if self.norm not in get_args(Norm):
            raise UserError(f"norm {self.norm!r} is not known; use one of {', '.join(get_args(Norm))}")
        object.__setattr__(self, "eps", parse_real(self.eps))
        above(0, "eps", self.eps, "for images in [0, 1] write e.g. 8/255")
        if self.norm == "Linf" and self.eps > 1:
            hint = f"did you mean {self.eps:g}/255?"
            raise UserError(f"eps {self.eps:g} exceeds 1, the whole range of an image in [0, 1]; {hint}")

    @property
    def family(self) -> str:
        """The norm."""
        return self.norm

    @property
    def kind(self) -> str:
        """The norm."""
        return self.norm

    def describe(self) -> dict[str, Any]:
        """Return the norm and the radius."""
        return {"norm": self.norm, "eps": self.eps}

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point of the ball around x, then of the box; both [B, ...], up to float rounding.

        Under L1 the nearest point of both together: see `project_l1`.
        """
        if self.norm == "L1":
            return (x + project_l1(x_adv - x, x, self.eps)).clamp_(0.0, 1.0)
        if self.norm == "Linf":
            return torch.min(torch.max(x_adv, x - self.eps), x + self.eps).clamp_(0.0, 1.0)
        delta = x_adv - x
        scale = (self.eps / _l2(delta).clamp_min(1e-12)).clamp_max(1.0)
        return (x + delta * _per_sample(scale, delta)).clamp_(0.0, 1.0)

    def confine(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """`project`, and no rounding either: `distance(result, x) <= eps` holds to the last bit, float32 [B, ...].

        A sum x + eps rounded to float32 can lie outside the ball by half a unit in the last place, which a strict
        reader of results would count as a broken budget.
        """
        if self.norm == "Linf":
            # In float64, since near 0 the float32 rounding of eps itself is many units in the last place of x_adv.
            centre = x.double()
            x_adv = x_adv.double().clamp(centre - self.eps, centre + self.eps).float().clamp_(0.0, 1.0)
            outside = (x_adv.double() - centre).abs() > self.eps
            return torch.where(outside, torch.nextafter(x_adv, x), x_adv)
        if self.norm == "L1":
            return self._confine_l1(x_adv.float(), x)
        x_adv = self.project(x_adv.float(), x)
        distance = self.distance(x_adv, x)
        # Rounding moves each of n values by at most 2**-25, so the point by sqrt(n) 2**-25; twice that is kept clear.
        room = max(self.eps - 2.0**-24 * math.sqrt(x[0].numel()), 0.0)
        scale = torch.where(distance > self.eps, room / distance.clamp_min(1e-12), torch.ones_like(distance))
        shrunk = (x.double() + (x_adv.double() - x.double()) * _per_sample(scale, x)).float()
        return torch.where(_per_sample(distance > self.eps, x), shrunk, x_adv)

    def _confine_l1(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """`confine` under L1: what lies within the ball goes to the box alone; rounding leads towards x."""
        centre = x.double()
        # Sums in float64 are off by less than this share in any order.
        wanted = centre + project_l1(x_adv.double() - centre, centre, self.eps * (1.0 - 2.0**-40))
        near = wanted.float()
        near = torch.where((near.double() - centre).abs() > (wanted - centre).abs(), torch.nextafter(near, x), near)
        x_adv = x_adv.clamp(0.0, 1.0)
        return torch.where(_per_sample(self.distance(x_adv, x) > self.eps, x), near, x_adv)

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The norm of x_adv - x, float64 [B]."""
        delta = (x_adv.double() - x.double()).flatten(1)
        if self.norm == "L1":
            return delta.abs().sum(1)
        return delta.abs().amax(1) if self.norm == "Linf" else _l2(delta)

    def ascend(self, x_adv: Tensor, gradient: Tensor, step: float | Tensor) -> Tensor:
        """One step of steepest ascent, `step` long (a number, or one per sample [B]); not projected.

        Slopes that are not finite stand in nobody's way: see `finite`. Under L1 the hundredth of the values with the
        steepest slopes share the step evenly (Tramer and Boneh 2019, arXiv 1904.13000, section 4); values that would
        leave the box have none.
        """
        if isinstance(step, Tensor):
            step = _per_sample(step, x_adv)
        if self.norm == "Linf":
            return x_adv + step * gradient.sign()
        gradient = finite(gradient)
        if self.norm == "L1":
            outward = ((x_adv >= 1.0) & (gradient > 0)) | ((x_adv <= 0.0) & (gradient < 0))
            gradient = gradient.masked_fill(outward, 0.0)
            return x_adv + step * steepest(gradient, max(round(_SPARSE * gradient[0].numel()), 1))
        return x_adv + step * gradient / _per_sample(_l2(gradient).clamp_min(1e-12), gradient)

    def start(self, origin: Tensor, streams: Streams, where: Where) -> Tensor:
        """Return `ball_point` or `sphere_point`."""
        return (self.ball_point if where == "ball" else self.sphere_point)(origin, streams)

    def ball_point(self, x: Tensor, streams: Streams) -> Tensor:
        """A uniform random point of the ball around x, clipped to the box."""
        if self.norm == "Linf":
            delta = streams.uniform(*x.shape[1:]).to(x.dtype) * 2.0 - 1.0
            return (x + self.eps * delta).clamp_(0.0, 1.0)
        if self.norm == "L1":
            return (x + self.eps * _uniform_l1(x, streams)).clamp_(0.0, 1.0)
        direction = streams.fork("direction").normal(*x.shape[1:]).to(x.dtype)
        radius = streams.fork("radius").uniform(1)[:, 0].to(x.dtype) ** (1.0 / direction[0].numel())
        scale = self.eps * radius / _l2(direction).clamp_min(1e-12)
        return (x + direction * _per_sample(scale, x)).clamp_(0.0, 1.0)

    def sphere_point(self, x: Tensor, streams: Streams) -> Tensor:
        """A random point at distance eps (before clipping to the box): AutoAttack's start."""
        if self.norm == "Linf":
            noise = streams.uniform(*x.shape[1:]).to(x.dtype) * 2.0 - 1.0
            length = noise.flatten(1).abs().amax(1)
        else:
            noise = streams.normal(*x.shape[1:]).to(x.dtype)
            length = _l2(noise) if self.norm == "L2" else noise.flatten(1).abs().sum(1)
        return (x + noise * _per_sample(self.eps / length.clamp_min(1e-12), x)).clamp_(0.0, 1.0)

    def direction(self, origin: Tensor, streams: Streams) -> Tensor:
        """Return a random corner of the ball under Linf, a uniform direction under L2; see `Threat.direction`."""
        if self.norm == "Linf":
            return self.eps * (2.0 * (streams.uniform(*origin.shape)[0] > 0.5) - 1.0)
        if self.norm == "L2":
            normal = streams.normal(*origin.shape)[0]
            made: Tensor = self.eps * normal / normal.norm()
            return made
        return super().direction(origin, streams)

    def grey_radius(self, x: Tensor) -> float:
        """Return a radius within which each of the images [B, ...] can become plain grey."""
        if self.norm == "Linf":
            return 0.5
        return float((x - 0.5).flatten(1).norm(p=2 if self.norm == "L2" else 1, dim=1).max())


def _uniform_l1(x: Tensor, streams: Streams) -> Tensor:
    """Uniform random points of the L1 ball of radius 1, shaped like x: exponential sizes, of which one is left out."""
    count = x[0].numel()
    sizes = -torch.log1p(-streams.fork("sizes").uniform(count + 1).double())
    signs = torch.where(streams.fork("signs").uniform(count) < 0.5, -1.0, 1.0).double()
    return (signs * sizes[:, :count] / sizes.sum(1, keepdim=True).clamp_min(1e-30)).to(x.dtype).reshape(x.shape)


def steepest(gradient: Tensor, count: int | Tensor) -> Tensor:
    """The signs of the `count` steepest slopes of each image, scaled to an L1 norm of 1; 0 where all slopes are 0.

    Args:
        gradient: [B, ...].
        count: a number, or one per image [B], at least 1. Slopes as steep as the last of them count too.
    """
    size = gradient.flatten(1).abs()
    if isinstance(count, int):
        count = torch.full((len(gradient),), count, device=gradient.device)
    place = size.shape[1] - count
    least = _ascending(size).gather(1, place.clamp(0, size.shape[1] - 1)[:, None])
    signs = gradient.flatten(1).sign() * (size >= least)
    return (signs / signs.abs().sum(1, keepdim=True).clamp_min(1.0)).reshape(gradient.shape)


def norm_of(threat: Threat) -> Norm:
    """Return the norm, for attacks that have declared that they need one."""
    assert isinstance(threat, ThreatModel), f"a norm is needed, and {threat.kind} has none: Attack.check comes first"
    return threat.norm
