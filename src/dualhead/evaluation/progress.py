"""Progress of an evaluation, told to whoever displays it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Protocol

from dualhead.evaluation.scheduler import Try


class EvaluationProgress(Protocol):
    """Receives the state of an evaluation; called often, so it must be quick."""

    def update(self, attack: str, done: int, total: int, robust_so_far: float) -> None:
        """Take note that something was decided.

        Args:
            attack: the attack that runs, e.g. `pgd-40`, or `autoattack: fab-t` for a search of a suite.
            done: tries (samples times targets or restarts) of this search that need no more work, those under way
                counted by their share.
            total: tries of this search, of all processes' samples only this one's.
            robust_so_far: share of this process's samples that are classified correctly and that this attack has not
                fooled yet: it falls to the robust accuracy.
        """


class Silent:
    """Tells nobody."""

    def update(self, attack: str, done: int, total: int, robust_so_far: float) -> None:
        """See `EvaluationProgress.update`."""


class Reporter:
    """Counts the outcomes of one search for a progress.

    Args:
        progress: the one to tell.
        label: label of the search.
        samples: positions of those that are searched.
        jobs: tries that a sample gets at most.
        count: samples of this process, of which `robust_so_far` is a share.
        known: outcomes of earlier runs.
        others: samples of this process that stand although they are not searched.
    """

    def __init__(
        self,
        progress: EvaluationProgress,
        label: str,
        samples: Iterable[int],
        jobs: int,
        count: int,
        known: Iterable[Try],
        others: int = 0,
    ) -> None:
        self._progress, self._label, self._jobs, self._count = progress, label, jobs, max(count, 1)
        self._done = dict.fromkeys(samples, 0)
        self._fooled: set[int] = set()
        self._others = others
        self._finished = self._shown = 0
        self._told = time.monotonic()
        for outcome in known:
            self._add(outcome)

    def _add(self, outcome: Try) -> None:
        sample = outcome.sample
        if sample not in self._done or sample in self._fooled:
            return
        before = self._done[sample]
        self._done[sample] = self._jobs if outcome.fooled else before + 1
        self._finished += self._done[sample] - before
        if outcome.fooled:
            self._fooled.add(sample)

    def _tell(self, done: int) -> None:
        total = len(self._done) * self._jobs
        self._shown = min(max(done, self._shown), total)
        self._told = time.monotonic()
        robust = (len(self._done) - len(self._fooled) + self._others) / self._count
        self._progress.update(self._label, self._shown, total, robust)

    def outcome(self, outcome: Try) -> None:
        """Count a try that has ended."""
        self._add(outcome)
        self._tell(self._finished)

    def look(self, under_way: float) -> None:
        """Show that tries go on, at most twice a second."""
        if time.monotonic() - self._told > 0.5:
            self._tell(int(self._finished + under_way))
