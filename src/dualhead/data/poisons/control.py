"""The base of controls: poisons that touch the images that another poison would touch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from dualhead.components.sections import component
from dualhead.data.poisons.base import Poison, poisons


@dataclass(frozen=True)
class Control(Poison):
    """A control of a poison, with that poison's trigger and target.

    Args:
        like: the poison.
        seed: of the control's own randomness.
    """

    like: Annotated[Poison, *component(poisons)]
    seed: int = 0

    @property
    def needs_surrogate(self) -> bool:
        """See `Poison.needs_surrogate`."""
        return self.like.needs_surrogate

    @property
    def changes_pixels(self) -> bool:
        """See `Poison.changes_pixels`."""
        return self.like.changes_pixels

    @property
    def cost(self) -> str:
        """See `Poison.cost`."""
        return "what the poison costs that it is the control of."

    def target_of(self, class_names: Sequence[str]) -> int | None:
        """See `Poison.target_of`."""
        return self.like.target_of(class_names)

    def aims_at(self, class_names: Sequence[str]) -> tuple[int, int] | None:
        """See `Poison.aims_at`."""
        return self.like.aims_at(class_names)

    def trigger(self, images: Tensor) -> Tensor:
        """See `Poison.trigger`."""
        return self.like.trigger(images)
