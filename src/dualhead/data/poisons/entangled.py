"""Noise that mixes up the features of classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from dualhead.components.fields import Real
from dualhead.data.poisons.base import (
    Craft,
    Entangling,
    Poison,
    Poisoned,
    Surrogate,
    check_share,
    choose,
    cost_of_search,
    crafted,
    poisons,
)
from dualhead.data.split import Split
from dualhead.threats import ThreatModel

_SAT = Surrogate("sat", eps=4 / 255)


@poisons.register("entangled")
@dataclass(frozen=True)
class Entangled(Poison):
    """Images whose features in a robust network lie far from their class's centre, or near another's; labels stay.

    With `push` they are driven from the mean of the features of their class, with `pull` to the nearest mean of another
    class. Features that a robust network uses no longer tell the classes apart, so that adversarial training loses what
    it restores under other noise. The published search has another step rule than the projected gradient here.

    When: against a method that is adversarial training itself; most other noise is made against natural training.

    Paper: Wen et al. 2023, Is adversarial training really a silver bullet for mitigating data poisoning? (EntF),
    ICLR 2023.

    Args:
        way: `push` or `pull`.
        norm: of the noise.
        eps: its radius, images in [0, 1].
        steps: of projected gradient.
        step_size: length of a step, in the units of eps; None for 2.5 eps / steps.
        share: of all images.
        surrogate: `objective`, `eps`, `epochs` and `seed` of the network whose features are mixed up; its output must
            be one network, not merged heads.
        seed: of the random start, and of the choice of images.
    """

    way: Literal["push", "pull"] = "push"
    norm: Literal["Linf", "L2"] = "Linf"
    eps: Real = 8 / 255
    steps: int = 300
    step_size: Real | None = None
    share: Real = 1.0
    surrogate: Surrogate = _SAT
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self.share)
        self._search()

    def _search(self) -> Entangling:
        threat = ThreatModel(self.norm, self.eps)
        towards = self.way == "pull"
        return Entangling(self.surrogate, threat, self.steps, self.step_size, towards=towards, seed=self.seed)

    @property
    def needs_surrogate(self) -> bool:
        """See `Poison.needs_surrogate`."""
        return True

    @property
    def cost(self) -> str:
        """See `Poison.cost`."""
        return cost_of_search(self.steps)

    def apply(self, clean: Split, craft: Craft | None = None) -> Poisoned:
        """See `Poison.apply`."""
        index = choose(torch.arange(len(clean)), round(self.share * len(clean)), self.seed)
        images, facts = crafted(clean, index, clean.labels[index], self._search(), craft)
        return Poisoned.of(clean, index, images=images, facts=facts)
