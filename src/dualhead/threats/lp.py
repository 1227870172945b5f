"""Norms: a ball around each image, intersected with the box [0, 1] of valid images. A point is the image itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dualhead.components.fields import Real, parse_real
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats.base import Threat, Where

Norm = Literal["Linf", "L2"]


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *(1 for _ in like.shape[1:]))


def _l2(delta: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    return norms


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
        norm: `"Linf"` or `"L2"`.
        eps: radius in units of images in [0, 1]; also as text, `"8/255"`. Greater than 0.

    Raises:
        UserError: for an unknown norm or an impossible radius.
    """

    norm: Norm
    eps: Real

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise UserError(f"norm {self.norm!r} is not known; use one of {', '.join(get_args(Norm))}")
        object.__setattr__(self, "eps", parse_real(self.eps))
        if self.eps <= 0:
            raise UserError(f"eps must be greater than 0, got {self.eps:g}; for images in [0, 1] write e.g. 8/255")
        if self.norm == "Linf" and self.eps > 1:
            hint = f"did you mean {self.eps:g}/255?"
            raise UserError(f"eps {self.eps:g} exceeds 1, the whole range of an image in [0, 1]; {hint}")

    @property
    def kind(self) -> str:
        """The norm."""
        return self.norm

    def describe(self) -> dict[str, Any]:
        """Return the norm and the radius."""
        return {"norm": self.norm, "eps": self.eps}

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point of the ball around x, then of the box; both [B, ...], up to float rounding."""
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
        x_adv = self.project(x_adv.float(), x)
        distance = self.distance(x_adv, x)
        # Rounding moves each of n values by at most 2**-25, so the point by sqrt(n) 2**-25; twice that is kept clear.
        room = max(self.eps - 2.0**-24 * math.sqrt(x[0].numel()), 0.0)
        scale = torch.where(distance > self.eps, room / distance.clamp_min(1e-12), torch.ones_like(distance))
        shrunk = (x.double() + (x_adv.double() - x.double()) * _per_sample(scale, x)).float()
        return torch.where(_per_sample(distance > self.eps, x), shrunk, x_adv)

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The norm of x_adv - x, float64 [B]."""
        delta = (x_adv.double() - x.double()).flatten(1)
        return delta.abs().amax(1) if self.norm == "Linf" else _l2(delta)

    def ascend(self, x_adv: Tensor, gradient: Tensor, step: float | Tensor) -> Tensor:
        """One step of steepest ascent, `step` long (a number, or one per sample [B]); not projected.

        Slopes that are not finite stand in nobody's way: see `finite`.
        """
        if isinstance(step, Tensor):
            step = _per_sample(step, x_adv)
        if self.norm == "Linf":
            return x_adv + step * gradient.sign()
        gradient = finite(gradient)
        return x_adv + step * gradient / _per_sample(_l2(gradient).clamp_min(1e-12), gradient)

    def start(self, origin: Tensor, streams: Streams, where: Where) -> Tensor:
        """Return `ball_point` or `sphere_point`."""
        return (self.ball_point if where == "ball" else self.sphere_point)(origin, streams)

    def ball_point(self, x: Tensor, streams: Streams) -> Tensor:
        """A uniform random point of the ball around x, clipped to the box."""
        if self.norm == "Linf":
            delta = streams.uniform(*x.shape[1:]).to(x.dtype) * 2.0 - 1.0
            return (x + self.eps * delta).clamp_(0.0, 1.0)
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
            length = _l2(noise)
        return (x + noise * _per_sample(self.eps / length.clamp_min(1e-12), x)).clamp_(0.0, 1.0)

    def grey_radius(self, x: Tensor) -> float:
        """Return a radius within which each of the images [B, ...] can become plain grey."""
        return 0.5 if self.norm == "Linf" else float((x - 0.5).flatten(1).norm(dim=1).max())


def norm_of(threat: Threat) -> Norm:
    """Return the norm, for attacks that have declared that they need one."""
    assert isinstance(threat, ThreatModel), f"a norm is needed, and {threat.kind} has none: Attack.check comes first"
    return threat.norm
