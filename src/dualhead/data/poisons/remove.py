"""The control of a poison: the images that it would touch are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from torch import Tensor

from dualhead.components.sections import component
from dualhead.data.poisons.base import Craft, Poison, Poisoned, poisons
from dualhead.data.split import Split


@poisons.register("remove")
@dataclass(frozen=True)
class Remove(Poison):
    """The images that a poison would touch are left out.

    When: beside every poison that touches some images: what is lost here is lost without any poison.

    Paper: none; a control, and the best that a finder of poisoned images could do.

    Args:
        like: the poison; its trigger is measured too.
        seed: not used, as nothing is drawn.
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

    def target_of(self, class_names: Sequence[str]) -> int | None:
        """See `Poison.target_of`."""
        return self.like.target_of(class_names)

    def trigger(self, images: Tensor) -> Tensor:
        """See `Poison.trigger`."""
        return self.like.trigger(images)

    def apply(self, clean: Split, craft: Craft | None = None) -> Poisoned:
        """See `Poison.apply`."""
        made = self.like.apply(clean, craft)
        return replace(Poisoned.without(clean, made.index), facts=made.facts)
