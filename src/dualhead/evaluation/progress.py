"""How an evaluation tells somebody how far it is. It draws nothing itself."""

from __future__ import annotations

from typing import Protocol


class EvaluationProgress(Protocol):
    """Receives the state of an evaluation; called often, so it must be quick."""

    def update(self, attack: str, done: int, total: int, robust_so_far: float) -> None:
        """Something was decided.

        Args:
            attack: what is running, e.g. `pgd-40`, or `autoattack: fab-t` for a part of a suite.
            done: tries (samples times targets or restarts) of this part that need no more work.
            total: tries of this part, of all processes' samples only this one's.
            robust_so_far: share of this process's samples that are classified correctly and that this attack has not
                fooled yet: it falls to the robust accuracy.
        """


class Silent:
    """Tells nobody."""

    def update(self, attack: str, done: int, total: int, robust_so_far: float) -> None:
        """See `EvaluationProgress.update`."""
