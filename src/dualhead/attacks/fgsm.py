"""The fast gradient sign method (Goodfellow et al. 2015), and its L2 form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dualhead.attacks.base import Attack, Climb, Search, attacks
from dualhead.attacks.pgd import PGD, Start
from dualhead.components.fields import Real
from dualhead.noise import Streams
from dualhead.threats import Threat


@attacks.register("fgsm")
@dataclass(frozen=True)
class FGSM(Attack):
    """One step of steepest ascent on the cross-entropy.

    When: in training where time is short (Fast AT). Not as an evaluation: it fools fewer images than 40 steps do.

    Paper: Goodfellow et al. 2015, Explaining and Harnessing Adversarial Examples, arXiv 1412.6572; for training
    Wong et al. 2020, arXiv 2001.03994.

    Args:
        step_size: length of the step in the units of eps; None for eps. Fast AT (Wong et al. 2020) uses 1.25 eps.
        start: `clean`, or as in `pgd`.
        restarts: independent starts, at least 1; more than one needs a random start to be of use.
    """

    step_size: Real | None = None
    start: Start = "clean"
    restarts: int = 1

    def __post_init__(self) -> None:
        PGD(1, self.step_size, self.start, restarts=self.restarts)  # refuses what PGD refuses

    @property
    def single_step(self) -> bool:
        """Always."""
        return True

    @property
    def begins_clean(self) -> bool:
        """If `start` says so."""
        return self.start == "clean"

    def _pgd(self, threat: Threat) -> PGD:
        return PGD(1, threat.eps if self.step_size is None else self.step_size, self.start, "ce", self.restarts)

    def parts(self, num_classes: int, threat: Threat, num_heads: int = 1) -> Sequence[Search]:
        """PGD with one step."""
        return self._pgd(threat).labelled(self.label).parts(num_classes, threat, num_heads)

    def maximise(self, climb: Climb, x: Tensor, threat: Threat, streams: Streams) -> Tensor:
        """See `Maximiser.maximise`."""
        return self._pgd(threat).maximise(climb, x, threat, streams)
