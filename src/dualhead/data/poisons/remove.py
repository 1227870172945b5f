"""The control of a poison: the images that it would touch are left out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dualhead.data.poisons.base import Poisoned, poisons
from dualhead.data.poisons.control import Control
from dualhead.data.poisons.search import Craft
from dualhead.data.split import Split


@poisons.register("remove")
@dataclass(frozen=True)
class Remove(Control):
    """The images that a poison would touch are left out.

    When: beside every poison that touches some images: what is lost here is lost without any poison.

    Paper: none; a control, and the best that a finder of poisoned images could do.

    Args:
        like: the poison; its trigger is measured too.
        seed: not used, as nothing is drawn.
    """

    def apply(self, clean: Split, craft: Craft | None = None) -> Poisoned:
        """See `Poison.apply`."""
        made = self.like.apply(clean, craft)
        return replace(Poisoned.without(clean, made.index), facts=made.facts)
