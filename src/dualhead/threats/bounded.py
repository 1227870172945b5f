"""Threats whose adversary chooses bounded parameters of a change, such as shifts of pixels."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from dualhead.components.fields import Real, above, parse_real
from dualhead.noise import Streams
from dualhead.threats.base import Threat, Where


@dataclass(frozen=True)
class Bounded(Threat):
    """Parameters in the cube [-eps, eps]; all zero, they change nothing.

    A point is flat, [B, C*H*W + P]: the image, and behind it the P parameters. So it stands alone, and whatever keeps,
    moves or stores points need not know of images. Steps follow the sign of the gradient to the parameters. The methods
    need `for_images` first.

    Args:
        eps: largest absolute value of a parameter, greater than 0.
    """

    eps: Real

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", parse_real(self.eps))
        above(0, "eps", self.eps)

    @abstractmethod
    def shape(self, image_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of one image's parameters.

        Raises:
            UserError: for images that the threat cannot change.
        """

    @abstractmethod
    def apply(self, x: Tensor, parameters: Tensor) -> Tensor:
        """Return changed images [B, C, H, W], with a graph to the parameters; x itself to the bit where they are 0.

        Args:
            x: images [B, C, H, W] in [0, 1].
            parameters: [B, *shape].
        """

    def for_images(self, image_shape: Sequence[int]) -> Self:
        """See `Threat.for_images`."""
        self.shape(image_shape)
        fitted = copy.copy(self)
        object.__setattr__(fitted, "_image_shape", tuple(image_shape))
        return fitted

    def within(self, eps: float) -> Self:
        """See `Threat.within`."""
        changed = super().within(eps)
        shape = getattr(self, "_image_shape", None)
        return changed if shape is None else changed.for_images(shape)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape that `for_images` was given."""
        shape: tuple[int, ...] | None = getattr(self, "_image_shape", None)
        assert shape is not None, "threat.for_images(x.shape[1:]) comes first"
        return shape

    @property
    def _size(self) -> int:
        return math.prod(self.image_shape)

    @property
    def _limit(self) -> float:
        """The largest float32 number that does not exceed eps."""
        nearest = np.float32(self.eps)
        return float(nearest if float(nearest) <= self.eps else np.nextafter(nearest, np.float32(0.0)))

    def lift(self, x: Tensor) -> Tensor:
        """See `Threat.lift`."""
        return torch.cat((x.flatten(1), x.new_zeros(len(x), math.prod(self.shape(self.image_shape)))), 1)

    def render(self, point: Tensor) -> Tensor:
        """See `Threat.render`. The graph leads to the parameters alone."""
        x = point[:, : self._size].detach().reshape(-1, *self.image_shape)
        return self.apply(x, point[:, self._size :].reshape(-1, *self.shape(self.image_shape))).clamp(0.0, 1.0)

    def _joined(self, origin: Tensor, parameters: Tensor) -> Tensor:
        return torch.cat((origin[:, : self._size], parameters), 1)

    def start(self, origin: Tensor, streams: Streams, where: Where) -> Tensor:
        """See `Threat.start`: uniform in the cube, or scaled to its surface."""
        noise = streams.uniform(origin.shape[1] - self._size).to(origin.dtype) * 2.0 - 1.0
        if where == "sphere":
            noise = noise / noise.abs().amax(1, keepdim=True).clamp_min(1e-12)
        return self._joined(origin, self.eps * noise)

    def ascend(self, point: Tensor, gradient: Tensor, step: float | Tensor) -> Tensor:
        """See `Threat.ascend`. A slope that is not a number moves nothing."""
        step = step[:, None] if isinstance(step, Tensor) else step
        uphill = gradient[:, self._size :].nan_to_num(0.0).sign()
        return self._joined(point, point[:, self._size :] + step * uphill)

    def project(self, point: Tensor, origin: Tensor) -> Tensor:
        """See `Threat.project`. The image is that of the origin."""
        return self._joined(origin, point[:, self._size :].clamp(-self._limit, self._limit))

    def confine(self, point: Tensor, origin: Tensor) -> Tensor:
        """See `Threat.confine`."""
        return self.project(point.float(), origin.float())

    def distance(self, point: Tensor, origin: Tensor) -> Tensor:
        """See `Threat.distance`: the largest absolute difference of a parameter."""
        return (point.double() - origin.double())[:, self._size :].abs().amax(1)
