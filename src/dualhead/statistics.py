"""Statistics of measured accuracies: intervals, paired tests, and spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualhead.errors import UserError


def wilson(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Compute Wilson's score interval of a proportion (Wilson 1927).

    Args:
        successes: at most `total`.
        total: at least 1.
        confidence: in (0, 1).
    """
    from scipy import stats  # here, since it takes a second to import, and a wrong word should be answered at once

    interval = stats.binomtest(int(successes), int(total)).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Paired:
    """Two classifiers on the same samples.

    Attributes:
        num_samples: number of samples that both saw.
        accuracy: the first's and the second's.
        only_first: samples that only the first got right.
        only_second: samples that only the second got right.
        difference: second minus first.
        interval: 95 % interval of the difference (Agresti and Min 2005: half a sample added to each cell; of
            `paired_shares`, its own).
        p_value: McNemar's exact two-sided test: are the discordant samples a fair coin? Of `paired_shares`, its own.
    """

    num_samples: int
    accuracy: tuple[float, float]
    only_first: int
    only_second: int
    difference: float
    interval: tuple[float, float]
    p_value: float

    @property
    def verdict(self) -> str:
        """`gain` or `loss` of the second over the first where interval and exact test agree on it, else `undecided`."""
        if self.p_value >= 0.05:  # the test is the stricter of the two
            return "undecided"
        return "gain" if self.interval[0] > 0 else "loss" if self.interval[1] < 0 else "undecided"


def mcnemar(first: ArrayLike, second: ArrayLike, confidence: float = 0.95) -> Paired:
    """Compare two classifiers on the same samples (McNemar 1947, exact form).

    Args:
        first: bool [N], which samples the first got right.
        second: the same for the second.
        confidence: confidence of the interval, in (0, 1).

    Raises:
        UserError: if the samples cannot be the same.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise UserError(f"a paired comparison needs the same samples twice, got {a.shape} and {b.shape}")
    only_first, only_second, n = int((a & ~b).sum()), int((b & ~a).sum()), len(a)
    discordant = only_first + only_second
    from scipy import stats

    p_value = float(stats.binomtest(only_second, discordant).pvalue) if discordant else 1.0
    centre = (only_second - only_first) / (n + 2)
    spread = math.sqrt(max(discordant + 1 - (only_second - only_first) ** 2 / (n + 2), 0.0)) / (n + 2)
    reach = float(stats.norm.ppf(0.5 + confidence / 2)) * spread
    return Paired(
        n,
        (float(a.mean()), float(b.mean())),
        only_first,
        only_second,
        (only_second - only_first) / n,
        (max(centre - reach, -1.0), min(centre + reach, 1.0)),
        p_value,
    )


def interval_over_samples(first: ArrayLike, second: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Compute the interval of a difference in accuracy over samples, the classifiers held fixed.

    Normal approximation for the mean over samples of the share of second classifiers that are right, minus the share of
    first ones.

    Args:
        first: bool [R, N], which of N samples each of R classifiers got right.
        second: bool [S, N], the same for others, on the same samples. Of one sample the interval is [-1, 1]: it tells
            nothing. Where all have one difference, it is as wide as if one of them had another: see `_deviation`.
        confidence: in (0, 1).
    """
    from scipy import stats

    gained = np.mean(np.asarray(second, dtype=float), axis=0) - np.mean(np.asarray(first, dtype=float), axis=0)
    if len(gained) < 2:
        return -1.0, 1.0
    reach = float(stats.norm.ppf(0.5 + confidence / 2)) * _deviation(gained) / math.sqrt(len(gained))
    return max(float(gained.mean()) - reach, -1.0), min(float(gained.mean()) + reach, 1.0)


def _deviation(gained: NDArray[np.float64]) -> float:
    """Return the standard deviation of differences [N], N at least 2.

    Differences that are all alike leave no spread, and an interval of no width would claim certainty, be it of two
    samples. Their mean then has a standard error of 1 / N, about that of one sample in N that differs by 1. This is our
    choice.
    """
    alike = float(np.ptp(gained)) < 1e-12  # but for rounding
    return 1.0 / math.sqrt(len(gained)) if alike else float(np.std(gained, ddof=1))


def paired_shares(first: ArrayLike, second: ArrayLike, confidence: float = 0.95) -> Paired:
    """Compare two classifiers by a share of each sample, as of its corrupted renderings, that they got right.

    The two-sided test that the mean difference over samples is zero, by the normal approximation whose interval is that
    of `interval_over_samples`.

    Args:
        first: shares in [0, 1], [N].
        second: the same for the second.
        confidence: confidence of the interval, in (0, 1).

    Returns:
        `only_first` and `only_second` are the samples of which the one got a larger share right.

    Raises:
        UserError: if the samples cannot be the same, or there is one alone.
    """
    from scipy import stats

    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise UserError(f"a paired comparison needs the same samples twice, two at least, got {a.shape} and {b.shape}")
    gained = b - a
    mean, error = float(gained.mean()), _deviation(gained) / math.sqrt(len(gained))
    p_value = 2.0 * float(stats.norm.sf(abs(mean) / error))
    return Paired(
        len(a),
        (float(a.mean()), float(b.mean())),
        int((gained < 0).sum()),
        int((gained > 0).sum()),
        mean,
        interval_over_samples(a[None], b[None], confidence),
        p_value,
    )


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (n - 1) over seeds; the deviation of one value is NaN."""
    if not len(values):
        raise UserError("mean and deviation need at least one value")
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


LEAST_GAP: Final = 0.25
"""Least distance between accuracies under one step and several that tells of overfitting: 16 images of 64."""
AGAINST_OVERFITTING: Final = "use attack n_fgsm or pgd-2, objective grad_align or elle, or a smaller eps"
"""Advice where single steps overfit catastrophically."""


def overfits_single_steps(fgsm: float, pgd: float) -> bool:
    """Tell catastrophic overfitting: one step leaves far more images right than several do.

    Args:
        fgsm: fraction of some images that stay right under one step.
        pgd: fraction of the same images under several.
    """
    return pgd < fgsm / 2 and fgsm - pgd >= LEAST_GAP


def student_reach(values: Sequence[float], confidence: float = 0.95, floor: float = 0.0) -> float | None:
    """Return half the width of Student's interval of a mean (Student 1908); None of fewer than two values.

    Args:
        values: independent, such as those of seeds.
        confidence: in (0, 1).
        floor: least standard deviation that is believed, at least 0. Shares of N samples move in steps of 1 / N: seeds
            that agree more closely than that do so by chance, and an interval of no width would claim certainty. This
            floor is our choice, and makes intervals wider only.
    """
    from scipy import stats

    if len(values) < 2:
        return None
    deviation = max(mean_std(values)[1], floor)
    return float(stats.t.ppf(0.5 + confidence / 2, len(values) - 1)) * deviation / math.sqrt(len(values))


def student(values: Sequence[float], confidence: float = 0.95, floor: float = 0.0) -> list[float] | None:
    """Return Student's interval of a mean of independent values; None of fewer than two. See `student_reach`."""
    reach = student_reach(values, confidence, floor)
    if reach is None:
        return None
    mean = mean_std(values)[0]
    return [mean - reach, mean + reach]


def paired_t(gains: Sequence[float], floor: float = 0.0) -> tuple[float, list[float], float]:
    """Test whether paired differences have a mean of zero: Student's two-sided t-test for pairs.

    Args:
        gains: the second's value minus the first's, of each pair, such as of each seed.
        floor: least standard deviation that is believed, as in `student_reach`.

    Returns:
        The mean, its 95 % interval, and the p-value. If all gains are one number and there is no floor, the interval
        has no width, and the p-value is 1 for a mean of zero, else 0.

    Raises:
        UserError: for fewer than two pairs.
    """
    from scipy import stats

    interval = student(gains, floor=floor)
    if interval is None:
        raise UserError(f"a paired t-test needs two pairs at least, got {len(gains)}")
    mean, deviation = mean_std(gains)
    error = max(deviation, floor) / math.sqrt(len(gains))
    return mean, interval, 2.0 * float(stats.t.sf(abs(mean) / error, len(gains) - 1)) if error else float(mean == 0)


def chance_drop(before: float, after: float, count: int) -> float:
    """Bound the difference of two measured shares that chance explains, where their pairing is not known.

    The 95 % bound, by the normal approximation, for shares of independent samples. Two shares of the same samples, as
    of two epochs of one network, vary less: the variance of their difference lacks twice their covariance, and
    networks that are right about the same samples have a positive one. So this is an upper bound, and misses small
    drops. It knows nothing of how `before` was chosen: the best of many epochs is partly so by luck.

    Args:
        before: share in [0, 1].
        after: the same, later.
        count: how many samples each is of.
    """
    from scipy import stats

    return float(stats.norm.ppf(0.975)) * math.sqrt((before * (1 - before) + after * (1 - after)) / count)
