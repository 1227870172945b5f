"""What methods share that rehearse old threats on a few images: the images, and a threat for each step."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dualhead.components.fields import at_least
from dualhead.data import Memory, Stream
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.objectives.base import (
    Around,
    Inner,
    Labels,
    Logits,
    Need,
    Objective,
    Seen,
    cross_entropies,
)
from dualhead.objectives.several import Contender, contenders, refuse_base
from dualhead.threats import Threat

MEMORY = "memory"
REHEARSED = "rehearsed"
"""The images of the memory, clean, and attacked within an old threat."""


@dataclass(frozen=True)
class Rehearsal(Around):
    """A base method, and images of a memory that the network as it is now is attacked on within an old threat.

    Of several old threats each step takes one, drawn evenly; the draw lies in the checkpoint. Which images are in the
    memory follows from the seed. Subclasses are dataclasses; their fields come after these.
    """

    base: Objective
    among: tuple[Contender, ...]
    images: int = 500
    seed: int = 0
    chosen: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "among", contenders(self.among, least=1))
        refuse_base(self.base)
        at_least(1, "images", self.images)
        if MEMORY in self.base.streams():
            raise UserError("base: rehearses already; choose sat, trades or mart")

    def needs(self) -> Mapping[str, Need]:
        """Ask for what the base method needs, and logits and labels of the rehearsed images."""
        own = self.base.judged_output
        return {REHEARSED: Logits(own, REHEARSED), "labels": Labels(MEMORY), **self.base.needs()}

    def streams(self) -> Mapping[str, Stream]:
        """Draw images of the memory, as many as the batch has."""
        return {**self.base.streams(), MEMORY: Memory(self.images, self.seed)}

    def inner(self) -> Mapping[str, Inner]:
        """Climb the cross-entropy of rehearsed images within the old threat, after the base method's attack."""
        old = self.among[self.chosen]
        climb = Inner(
            lambda y, seen: cross_entropies(seen[REHEARSED], seen["labels"]),
            uses=(REHEARSED, "labels"), start=MEMORY, attack=old.attack, threat=old.threat,
        )  # fmt: skip
        return {**self.base.inner(), REHEARSED: climb}

    def threats(self) -> tuple[Threat | None, ...]:
        """Those of the base method, and all old ones."""
        return tuple(dict.fromkeys((*self.base.threats(), *(old.threat for old in self.among))))

    def window(self) -> int:
        """A threat is drawn for each step, if there are several."""
        return 1 if len(self.among) > 1 else 0

    def begin(self) -> Mapping[str, float]:
        """Return the first draw."""
        return {"step": 0.0, "choice": float(self._draw(0))} if self.window() else {}

    def at(self, epoch: int, state: Mapping[str, float]) -> Objective:
        """Return it with the threat that was drawn."""
        changed = copy.copy(self)
        object.__setattr__(changed, "base", self.base.at(epoch, {}))
        object.__setattr__(changed, "chosen", int(state.get("choice", 0)))
        return changed

    def advance(self, state: Mapping[str, float], means: Mapping[str, float]) -> Mapping[str, float]:
        """Draw for the next step."""
        del means
        step = state["step"] + 1.0
        return {"step": step, "choice": float(self._draw(int(step)))}

    def _draw(self, step: int) -> int:
        drawn = float(Streams.of(self.seed, torch.tensor([step])).fork("old threat").uniform(1)[0, 0])
        return min(int(drawn * len(self.among)), len(self.among) - 1)


def rehearsed_loss(seen: Seen) -> Tensor:
    """Return the mean cross-entropy of the rehearsed images."""
    return cross_entropies(seen[REHEARSED], seen["labels"]).mean()
