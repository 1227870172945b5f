"""The control of a poison: noise of the same size on the same images."""

from __future__ import annotations

from dataclasses import dataclass

from dualhead.data.poisons.base import REMOVED, Poisoned, moved, pixels_of, poisons
from dualhead.data.poisons.control import Control
from dualhead.data.poisons.search import Craft
from dualhead.data.split import Split
from dualhead.noise import Streams


@poisons.register("sham")
@dataclass(frozen=True)
class Sham(Control):
    """Uniform noise on the images that a poison would change, each by as much in Euclidean length; labels stay right.

    When: beside every poison: what it does and the sham does not is the poison's.

    Paper: none; a control, as a placebo is.

    Args:
        like: the poison; its trigger is measured too.
        seed: of the noise.
    """

    def apply(self, clean: Split, craft: Craft | None = None) -> Poisoned:
        """See `Poison.apply`."""
        made = self.like.apply(clean, craft)
        if not self.changes_pixels:
            return Poisoned.of(clean, made.index, facts=made.facts)
        touched = made.index[made.new_label != REMOVED]
        length = made.l2[made.new_label != REMOVED]
        noise = Streams.of(self.seed, touched).fork("sham").uniform(*clean.image_shape).double() * 2 - 1
        noise = noise * (255 * length / noise.flatten(1).norm(dim=1).clamp_min(1e-12))[:, None, None, None]
        return Poisoned.of(clean, touched, images=moved(pixels_of(clean)[touched], noise), facts=made.facts)
