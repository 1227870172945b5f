"""Which of two classifiers is better on the same samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dualhead.report.sources import Measured


@dataclass(frozen=True)
class Difference:
    """Accuracy of one classifier minus another's, on the same samples.

    Args:
        value: in [-1, 1].
        low: lower end of the 95 % interval.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`more` or `less` where the interval excludes zero, else `undecided`."""
        if self.low > 0:
            return "more"
        return "less" if self.high < 0 else "undecided"


def difference(first: Measured, second: Measured, what: str) -> Difference | None:
    """Accuracy of the first minus the second's, with the paired interval of Agresti and Min (2005).

    Args:
        first: a classifier.
        second: another.
        what: `clean`, an attack, or `worst`.

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
    return Difference((gained - lost) / n, max(centre - reach, -1.0), min(centre + reach, 1.0))


def comparable(first: Measured, second: Measured) -> bool:
    """Whether two classifiers faced the same attacks under the same threat model, on samples of the same names."""
    if first.threat != second.threat or set(first.attacks) != set(second.attacks):
        return False
    if "index" not in first.samples or "index" not in second.samples:
        return False
    a, b = np.argsort(first.samples["index"]), np.argsort(second.samples["index"])
    return all(np.array_equal(first.samples[key][a], second.samples[key][b]) for key in ("index", "label"))


def same_model(first: Measured, second: Measured) -> bool:
    """Whether two evaluations are of one model, as far as labels and clean predictions of the images of both tell.

    Results do not name the output that was measured.
    """
    needed = {"index", "label", "clean_prediction"}
    if not needed <= set(first.samples) or not needed <= set(second.samples):
        return False
    shared, a, b = np.intersect1d(first.samples["index"], second.samples["index"], return_indices=True)
    keys = ("label", "clean_prediction")
    return len(shared) > 0 and all(np.array_equal(first.samples[key][a], second.samples[key][b]) for key in keys)


def broken_later(row: Measured, later: Measured) -> tuple[int, int, int] | None:
    """How many images that withstood the attacks of one evaluation fell to those of a later one of the same model.

    Returns:
        Images that fell, images that had withstood, and images that both met; None if nothing fell, or where the
        two are of different models or threat models, or share no images.
    """
    before, after = row.correct("worst"), later.correct("worst")
    if before is None or after is None or row.threat != later.threat or not same_model(row, later):
        return None
    shared, a, b = np.intersect1d(row.samples["index"], later.samples["index"], return_indices=True)
    fell = int((before[a] & ~after[b]).sum())
    return (fell, int(before[a].sum()), len(shared)) if fell else None
