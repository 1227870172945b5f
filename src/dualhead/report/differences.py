"""Which of two classifiers is better on the same samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from dualhead.report.sources import Measured


@dataclass(frozen=True)
class Difference:
    """Accuracy of one classifier minus another's, on the same samples.

    Args:
        value: in [-1, 1].
        low: lower end of the 95 % interval.
        high: upper end.
        p_value: of McNemar's exact two-sided test.
    """

    value: float
    low: float
    high: float
    p_value: float

    @property
    def verdict(self) -> str:
        """`more` or `less` where interval and exact test agree on it, else `undecided`."""
        if self.p_value >= 0.05:  # the test is the stricter of the two
            return "undecided"
        return "more" if self.low > 0 else "less" if self.high < 0 else "undecided"


def difference(first: Measured, second: Measured, what: str) -> Difference | None:
    """Accuracy of the first minus the second's, with the paired interval of Agresti and Min (2005).

    Args:
        first: a classifier.
        second: another.
        what: `clean`, an attack, or `worst`, which counts what only merged heads can face where it was run.

    Returns:
        None where they did not face the same samples, threat model and attacks, or samples are not stored.
    """
    a, b = first.correct(what), second.correct(what)
    if a is None or b is None or not comparable(first, second):
        return None
    a, b = a[np.argsort(first.samples["index"])], b[np.argsort(second.samples["index"])]
    gained, lost, n = int((a & ~b).sum()), int((b & ~a).sum()), len(a)
    centre = (gained - lost) / (n + 2)
    reach = 1.959964 * math.sqrt(max(gained + lost + 1 - (gained - lost) ** 2 / (n + 2), 0.0)) / (n + 2)
    p_value = _fair_coin(min(gained, lost), gained + lost)
    return Difference((gained - lost) / n, max(centre - reach, -1.0), min(centre + reach, 1.0), p_value)


def _fair_coin(fewer: int, tosses: int) -> float:
    """Probability that a fair coin falls as unevenly as this or more so, to either side."""
    tail, ways = 0, 1
    for heads in range(fewer + 1):
        tail += ways
        ways = ways * (tosses - heads) // (heads + 1)
    return min(1.0, float(Fraction(2 * tail, 2**tosses)))  # of whole numbers that no float holds


def comparable(first: Measured, second: Measured) -> bool:
    """Whether two classifiers faced the same attacks under the same threat model, on samples of the same names.

    Attacks that only merged heads can face need not have been run on both.
    """
    if first.threat != second.threat or set(first.common_attacks) != set(second.common_attacks):
        return False
    if "index" not in first.samples or "index" not in second.samples:
        return False
    a, b = np.argsort(first.samples["index"]), np.argsort(second.samples["index"])
    return all(np.array_equal(first.samples[key][a], second.samples[key][b]) for key in ("index", "label"))


def same_model(row: Measured, later: Measured) -> bool:
    """Whether a later evaluation within a run is of a row's model.

    What its results say they are of decides, and the labels and clean predictions of the images of both besides.
    """
    subject = later.results.get("subject")
    if isinstance(subject, Mapping) and subject:
        output = subject.get("output")
        of_row = row.deployed if output is None else row.output == output
        if subject.get("stage") or subject.get("checkpoint") or not of_row:
            return False
    return _alike(row, later)


def _alike(first: Measured, second: Measured) -> bool:
    needed = {"index", "label", "clean_prediction"}
    if not needed <= set(first.samples) or not needed <= set(second.samples):
        return False
    shared, a, b = np.intersect1d(first.samples["index"], second.samples["index"], return_indices=True)
    keys = ("label", "clean_prediction")
    return len(shared) > 0 and all(np.array_equal(first.samples[key][a], second.samples[key][b]) for key in keys)


def repeats(row: Measured, later: Measured) -> bool:
    """Whether a later evaluation attacked the same model under the same threat model, and kept what each image met."""
    known = row.correct("worst") is not None and later.correct("worst") is not None
    return known and row.threat == later.threat and same_model(row, later)


def broken_later(row: Measured, later: Sequence[Measured]) -> tuple[int, int, int] | None:
    """How many images that withstood the attacks of one evaluation fell to those of later ones that `repeats` it.

    Returns:
        Images that fell, images that had withstood, and images that all of them met; None if nothing fell, or where
        they share no images.
    """
    shared = row.samples["index"]
    for other in later:
        shared = np.intersect1d(shared, other.samples["index"])
    before, after = (np.logical_and.reduce([_on(shared, each) for each in group]) for group in ([row], [row, *later]))
    fell = int((before & ~after).sum())
    return (fell, int(before.sum()), len(shared)) if fell else None


def _on(index: NDArray[np.int64], row: Measured) -> NDArray[np.bool_]:
    """What withstood all attacks of an evaluation, of the images of these numbers."""
    _, _, places = np.intersect1d(index, row.samples["index"], return_indices=True)
    withstood = row.correct("worst")
    assert withstood is not None  # of those that `repeats` lets through
    return withstood[places]
