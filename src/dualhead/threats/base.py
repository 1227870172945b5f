"""The contract of a threat: a space of points that stand for images, and a budget within it.

For a norm a point is the image itself. Elsewhere it holds what the adversary chooses, such as the shift of each pixel.
Attacks move points, and the model sees what `render` makes of them.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor

from dualhead.components.registry import Registry
from dualhead.errors import UserError
from dualhead.noise import Streams

Where = Literal["ball", "sphere"]
"""Random starting points: anywhere within the budget (PGD), or at all of it (AutoAttack)."""


class Threat(ABC):
    """A set of changes to an image that an adversary may choose from.

    Subclasses are frozen dataclasses with a field `eps`, the budget, greater than 0. All but norms are registered in
    `threats`. Points are tensors [B, ...] of the images' dtype, with one row for each image; the origin of an image is
    the point that leaves it as it is.
    """

    registered_name: ClassVar[str]
    typical_eps: ClassVar[str] = "0.05"
    """A budget of usual size, as text, for messages and tests."""
    eps: float

    @property
    def family(self) -> str:
        """The norm or the name, by which attacks say what they are defined for."""
        return self.registered_name

    @property
    def kind(self) -> str:
        """The norm or the name, with all fields but eps that differ from their defaults, as `recolour(side=4)`."""
        fields = [f for f in dataclasses.fields(cast("Any", self)) if f.init and f.name != "eps"]
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields if getattr(self, f.name) != f.default]
        return f"{self.registered_name}({','.join(changed)})" if changed else self.registered_name

    def describe(self) -> dict[str, Any]:
        """Return the threat as recipes and results write it: JSON values that `build_threat` reads."""
        return threats.describe(self)

    def within(self, eps: float) -> Self:
        """Return the same threat with another budget.

        Raises:
            UserError: for an impossible budget.
        """
        return cast("Self", dataclasses.replace(cast("Any", self), eps=eps))

    def for_images(self, image_shape: Sequence[int]) -> Self:
        """Return the threat on images of one shape, which the methods below may rely on.

        Args:
            image_shape: without the batch, as [C, H, W].

        Raises:
            UserError: for images that the threat cannot change.
        """
        del image_shape
        return self

    def lift(self, x: Tensor) -> Tensor:
        """Return the origins of images [B, ...] in [0, 1]."""
        return x

    def render(self, point: Tensor) -> Tensor:
        """Return the images of points, in [0, 1], with a graph to the points; `render(lift(x))` is x to the bit."""
        return point

    @abstractmethod
    def start(self, origin: Tensor, streams: Streams, where: Where) -> Tensor:
        """Draw a random point for each origin, within the budget up to rounding."""

    @abstractmethod
    def ascend(self, point: Tensor, gradient: Tensor, step: float | Tensor) -> Tensor:
        """Take one step of steepest ascent, without projecting.

        Args:
            point: where from.
            gradient: of what is climbed, shaped like `point`.
            step: length in the units of eps; a number, or one for each row [B].
        """

    @abstractmethod
    def project(self, point: Tensor, origin: Tensor) -> Tensor:
        """Return the nearest points within the budget, up to rounding."""

    @abstractmethod
    def confine(self, point: Tensor, origin: Tensor) -> Tensor:
        """Return `project`, float32, without rounding: `distance(result, origin) <= eps` holds to the last bit."""

    @abstractmethod
    def distance(self, point: Tensor, origin: Tensor) -> Tensor:
        """Return how much of the budget points use, in the units of eps, float64 [B]."""

    def direction(self, origin: Tensor, streams: Streams) -> Tensor:
        """Draw a random change of one origin that uses all of the budget, [...]; it may lead out of the image box.

        Args:
            origin: of one image, [...], without the batch.
            streams: of that image alone.
        """
        return (self.start(origin[None], streams, "sphere") - origin)[0]

    def grey_radius(self, x: Tensor) -> float | None:
        """Return a budget within which each of the images [B, ...] can become plain grey; None if there is none."""
        del x
        return None


threats: Registry[Threat] = Registry("threat", "dualhead.threats", Threat)


def refuse_changed_origins(threat: Threat, image_shape: Sequence[int]) -> None:
    """Refuse a threat that changes images before an adversary has done anything: its budget would mean nothing.

    Raises:
        UserError: also for images that the threat cannot change.
    """
    images = torch.linspace(0.0, 1.0, 2 * math.prod(image_shape)).reshape(2, *image_shape)
    threat = threat.for_images(image_shape)
    if not torch.equal(threat.render(threat.lift(images)), images):
        raise UserError(f"{threat.kind} changes images where it should change nothing: with all parameters 0")
