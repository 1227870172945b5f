"""Noise that makes images easy, so that nothing is left to learn from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from dualhead.components.fields import Real
from dualhead.data.poisons.base import (
    Alternating,
    Craft,
    Poison,
    Poisoned,
    Surrogate,
    check_share,
    choose,
    crafted,
    poisons,
)
from dualhead.data.split import Split
from dualhead.threats import ThreatModel


@poisons.register("error_minimising")
@dataclass(frozen=True)
class ErrorMinimising(Poison):
    """Noise of each image that lowers the loss of a network which learns from the noisy images meanwhile; labels stay.

    It solves min over theta and d of CE(f(x + d), y) in turns. A network that trains on such images errs on none of
    them, learns the noise, and fails on clean ones. Adversarial training with a larger eps than the noise restores
    most. Made for each image, not for each class.

    When: as the standard poison that is to make data useless for natural training, beside `class_noise`, which costs
    nothing.

    Paper: Huang et al. 2021, Unlearnable examples: making personal data unexploitable (EM), arXiv 2101.04898.

    Args:
        norm: of the noise.
        eps: its radius, images in [0, 1].
        steps: of projected gradient in a round.
        step_size: length of a step, in the units of eps; None for eps / 10.
        batches: of training in a round, by the optimiser of the victim's first stage.
        error: share of the training images that the network may still get wrong when the search ends.
        rounds: at most; the record tells the error that was reached.
        share: of all images.
        seed: of the network, of the order of its batches, and of the choice of images.
    """

    norm: Literal["Linf", "L2"] = "Linf"
    eps: Real = 8 / 255
    steps: int = 20
    step_size: Real | None = None
    batches: int = 10
    error: Real = 0.01
    rounds: int = 50
    share: Real = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self.share)
        self._search()

    def _search(self) -> Alternating:
        return Alternating(
            Surrogate(seed=1_000_003 + self.seed), ThreatModel(self.norm, self.eps), self.steps,
            self.eps / 10 if self.step_size is None else self.step_size, towards=True, seed=self.seed,
            batches=self.batches, error=self.error, rounds=self.rounds,
        )  # fmt: skip

    @property
    def needs_surrogate(self) -> bool:
        """See `Poison.needs_surrogate`."""
        return True

    @property
    def cost(self) -> str:
        """See `Poison.cost`."""
        return (
            f"in each of at most {self.rounds} rounds {self.steps} forward and backward passes for each changed image "
            f"and {self.batches} batches of training; the results tell it, and charge it to no method."
        )

    def apply(self, clean: Split, craft: Craft | None = None) -> Poisoned:
        """See `Poison.apply`."""
        index = choose(torch.arange(len(clean)), round(self.share * len(clean)), self.seed)
        images, facts = crafted(clean, index, clean.labels[index], self._search(), craft)
        return Poisoned.of(clean, index, images=images, facts=facts)
