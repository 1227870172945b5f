"""Threats that change few pixels, each of them to any colour: what `l0` and `patch` share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from dualhead.components.fields import Real, parse_real
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats.base import Threat, Where
from dualhead.threats.lp import finite

_STRIDE = 10.0
"""By how much a step of eps moves values on average, against their whole range of 1; see `FewPixels.ascend`."""


@dataclass(frozen=True)
class FewPixels(Threat):
    """Any colours, within the box [0, 1], at few places. A point is the image itself.

    Args:
        eps: a whole number, at least 1.
    """

    eps: Real

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", parse_real(self.eps))
        if self.eps < 1 or self.eps != round(self.eps):
            raise UserError(f"eps of {self.registered_name} is a number of pixels, 1 or more; got {self.eps:g}")

    def for_images(self, image_shape: Sequence[int]) -> Self:
        """See `Threat.for_images`."""
        if len(image_shape) != 3:
            raise UserError(f"threat {self.registered_name} needs images of shape [C, H, W], got {list(image_shape)}")
        return self

    @abstractmethod
    def chosen(self, worth: Tensor) -> Tensor:
        """Return the places within the budget whose worth, float [B, H, W], at least 0, is largest: bool [B, H, W]."""

    @abstractmethod
    def size(self, changed: Tensor) -> Tensor:
        """Return how much of the budget changed places, bool [B, H, W], use: int64 [B]."""

    def changed(self, point: Tensor, origin: Tensor) -> Tensor:
        """Return the places at which images differ, bool [B, H, W]."""
        return (point != origin).any(1)

    def start(self, origin: Tensor, streams: Streams, where: Where) -> Tensor:
        """See `Threat.start`: random places, all that the budget allows; uniform colours, or corners of the box."""
        channels, height, width = origin.shape[1:]
        places = self.chosen(streams.fork("places").uniform(height, width).to(origin.dtype))
        colours = streams.fork("colours").uniform(channels, height, width).to(origin.dtype)
        if where == "sphere":
            colours = (colours >= 0.5).to(origin.dtype)
        return torch.where(places[:, None], colours, origin)

    def ascend(self, point: Tensor, gradient: Tensor, step: float | Tensor) -> Tensor:
        """See `Threat.ascend`: along the gradient, a long way, since the projection is what chooses places.

        Of steps far beyond the box it keeps the places whose colours can change the most times how steep they are: the
        best ones to first order. After short steps it would keep those that have been changed already.
        """
        gradient = finite(gradient)
        share = (step if isinstance(step, Tensor) else torch.full_like(point.flatten(1)[:, 0], step)) / self.eps
        scale = _STRIDE * share / gradient.flatten(1).abs().mean(1).clamp_min(1e-12)
        return point + scale.to(point.dtype)[:, None, None, None] * gradient

    def project(self, point: Tensor, origin: Tensor) -> Tensor:
        """See `Threat.project`: exact, for budget and box together (Croce and Hein 2019, arXiv 1909.05040, section 3).

        A place is worth by how much keeping it brings the result nearer, also where its colour ends at the box.
        """
        change = (point - origin).nan_to_num(0.0)
        size = change.abs()
        within = torch.minimum(size, torch.where(change > 0, 1.0 - origin, origin))
        worth = (within * (2.0 * size - within)).sum(1)
        return torch.where(self.chosen(worth)[:, None], (origin + change).clamp(0.0, 1.0), origin)

    def confine(self, point: Tensor, origin: Tensor) -> Tensor:
        """See `Threat.confine`: the budget is counted, so nothing rounds; an image within it stays as it is."""
        point, origin = point.float(), origin.float()
        fits = (self.distance(point, origin) <= self.eps) & ((point >= 0.0) & (point <= 1.0)).flatten(1).all(1)
        return torch.where(fits[:, None, None, None], point, self.project(point, origin))

    def distance(self, point: Tensor, origin: Tensor) -> Tensor:
        """See `Threat.distance`; NaN where the image has values that are no numbers."""
        used = self.size(self.changed(point, origin)).double()
        return used.masked_fill(point.isnan().flatten(1).any(1), torch.nan)
