"""N-FGSM: one step of FGSM from strong noise, and no way back into the ball (de Jorge et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dualhead.attacks.base import Attack, Climb, Search, attacks, slope
from dualhead.attacks.pgd import PGD
from dualhead.components.fields import Real, above
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats import Threat


@attacks.register("n_fgsm")
@dataclass(frozen=True)
class NFGSM(Attack):
    """One step of steepest ascent from strong noise, kept in the box [0, 1] and not in the ball.

    With eta uniform in the ball of radius noise * eps, and both points clipped to [0, 1] (algorithm 1 of the paper):

        x + eta + step_size * sign(gradient of the climbed loss at x + eta)

    Training images therefore lie up to (noise + 1) eps away. The noise around the point where the gradient is taken
    prevents catastrophic overfitting, and clipping to the ball would undo that. The ball holds in every evaluation:
    there it is FGSM from a uniform start.

    When: in training where time is short, in place of FGSM from a uniform start, which overfits catastrophically at a
    large eps. Not as an evaluation.

    Paper: de Jorge et al. 2022, Make Some Noise: Reliable and Efficient Single-Step Adversarial Training, arXiv
    2202.01181, algorithm 1.

    Args:
        noise: radius of the noise as a multiple of eps, greater than 0; k = 2 as published.
        step_size: length of the step in the units of eps; None for eps, as published.
    """

    noise: Real = 2.0
    step_size: Real | None = None

    def __post_init__(self) -> None:
        above(0, "noise", self.noise, "2 is as published")
        PGD(steps=1, step_size=self.step_size)  # refuses what PGD refuses

    @property
    def single_step(self) -> bool:
        """Always."""
        return True

    def step_length(self, threat: Threat) -> float:
        """Return the step size in use under a threat model."""
        return threat.eps if self.step_size is None else self.step_size

    def reach(self, threat: Threat) -> float:
        """Return how far training images may lie from the clean ones, in the units of eps."""
        return self.noise * threat.eps + self.step_length(threat)

    def check(self, threat: Threat) -> None:
        """Refuse an eps so large that noise and step have no room.

        Raises:
            UserError: naming how far they reach.
        """
        try:
            threat.within(self.reach(threat))
        except UserError:
            raise UserError(
                f"attack n_fgsm moves images by up to {self.reach(threat):g}, more than {threat.kind} allows; use a "
                "smaller eps or less noise"
            ) from None

    def parts(self, num_classes: int, threat: Threat, num_heads: int = 1) -> Sequence[Search]:
        """PGD with one step from a uniform start: evaluations stay in the ball."""
        search = PGD(1, self.step_length(threat)).labelled(self.label)
        return search.parts(num_classes, threat, num_heads)

    def notes(self, num_classes: int) -> list[str]:
        """Say what it is in an evaluation."""
        del num_classes
        return [
            f"{self.label}: it leaves the ball in training alone; here it is one step from a uniform start within it"
        ]

    def maximise(self, climb: Climb, x: Tensor, threat: Threat, streams: Streams) -> Tensor:
        """Return points within noise * eps plus the step, not within the budget; see `Maximiser.maximise`."""
        # Nothing moves further than this radius, so that projecting into it only clips to the box.
        wide = threat.within(self.reach(threat))
        point = threat.within(self.noise * threat.eps).start(x, streams, "ball")
        return wide.project(wide.ascend(point, slope(climb, point), self.step_length(threat)), x)
