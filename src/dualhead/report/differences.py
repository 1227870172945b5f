"""Two classifiers on the same samples: which is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualhead.report.sources import MEANS, WORN, Measured, measured_in
from dualhead.statistics import Paired, mcnemar, paired_shares


def difference(first: Measured, second: Measured, what: str) -> Paired | None:
    """Compare the first with the second: its accuracy minus the second's, with interval and test.

    Args:
        first: a classifier.
        second: another.
        what: `clean`, an attack, or `worst`, which counts what only merged heads can face where it was run.

    Returns:
        None where they did not face the same samples, threat model and attacks, or samples are not stored.
    """
    a, b = first.correct(what), second.correct(what)
    if a is None or b is None or not len(a) or not comparable(first, second):
        return None
    a, b = a[np.argsort(first.samples["index"])], b[np.argsort(second.samples["index"])]
    return mcnemar(b, a)


def worn_difference(first: Measured, second: Measured, measurement: str) -> Paired | None:
    """Compare the first with the second on changed images: its mean share that is right minus the second's.

    Args:
        first: a classifier.
        second: the other one.
        measurement: that changed the images, such as `corruptions`.

    Returns:
        None where they did not face the same samples in the same rendering, or samples are not stored.
    """
    told = [measured_in(row.results).get(measurement) for row in (first, second)]
    facts = [{k: v for k, v in each.items() if k not in MEANS} for each in told if each is not None]
    if (
        len(facts) < 2
        or facts[0] != facts[1]
        or set(first.worn_kinds(measurement)) != set(second.worn_kinds(measurement))
    ):
        return None
    stored = f"{WORN}{measurement}"
    if stored not in first.samples or stored not in second.samples or not comparable(first, second):
        return None
    a, b = (row.samples[stored][np.argsort(row.samples["index"])] for row in (first, second))
    return paired_shares(b, a) if len(a) > 1 else None


def comparable(first: Measured, second: Measured) -> bool:
    """Whether two classifiers faced the same attacks under the same threat model, on the same samples.

    Attacks that only merged heads can face need not have been run on both.
    """
    if first.threat != second.threat or set(first.common_attacks) != set(second.common_attacks):
        return False
    if "index" not in first.samples or "index" not in second.samples:
        return False
    a, b = np.argsort(first.samples["index"]), np.argsort(second.samples["index"])
    named_alike = all(np.array_equal(first.samples[key][a], second.samples[key][b]) for key in ("index", "label"))
    return named_alike and not other_images(first.results, second.results)


def other_images(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two evaluations on samples of the same names say that the images were others.

    Images of another shape may be the same pictures, at the size that another model takes; results of earlier versions
    do not tell their images. Neither counts as others.

    Args:
        first: the content of `results.json`.
        second: another one.
    """
    a, b = first.get("images"), second.get("images")
    if not isinstance(a, Mapping) or not isinstance(b, Mapping) or a.get("shape") != b.get("shape"):
        return False
    return bool(a.get("sha256") != b.get("sha256"))


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
    """Whether a later evaluation attacked the same model under the same threat model, and kept what each image met.

    Other images under the names of the row's do not count. Where there are fewer or more, results do not tell.
    """
    known = row.correct("worst") is not None and later.correct("worst") is not None
    if not known or row.threat != later.threat or not same_model(row, later):
        return False
    same_names = set(row.samples["index"]) == set(later.samples["index"])
    return not (same_names and other_images(row.results, later.results))


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
    """Tell which of the images of these numbers withstood all attacks of an evaluation."""
    _, _, places = np.intersect1d(index, row.samples["index"], return_indices=True)
    withstood = row.correct("worst")
    assert withstood is not None  # of those that `repeats` lets through
    return withstood[places]
