"""Samples of several classifiers side by side: measures over seeds, and paired tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from dualhead.evaluation import SAMPLES_FILE, SCORED
from dualhead.runs import Entry, by_output
from dualhead.statistics import mcnemar, mean_std, paired_t, student

SCORE: Final = "classification_accuracy_score"
MORE_IS_BETTER: Final = {
    "frechet_distance": False, "kernel_distance": False, SCORE: True, "precision": True, "recall": True,
    "density": True, "coverage": True, "diversity": True, "judge_agreement": True,
}  # fmt: skip
"""Measures of `generation` in `results.json`, and whether more of it is better."""
COUNTED: Final = {
    SCORE: ("test_images",), "judge_agreement": ("samples",),
    **dict.fromkeys(("precision", "recall", "coverage"), ("samples", "test_images")),
}  # fmt: skip
"""Measures that are shares, and the keys of their images, of which the fewest count."""
ALIKE: Final = ("samples", "test_images", "judge")
"""What must be equal for distances to be compared."""


def compare_samples(entries: Sequence[Entry]) -> dict[str, Any] | None:
    """Set measures of samples side by side, as `dualhead evaluate --generation` leaves them.

    Args:
        entries: outputs of runs, and evaluations.

    Returns:
        None where no entry has samples. `rows`: for each group of entries that has, `name`, `seeds`, the numbers of
        `steps` that were chosen, `values` (mean over seeds) and `intervals` (Student's over seeds, those of the
        results for one run, None where there is none). `pairs`: each group against the first: paired t-tests over the
        seeds that both have; for one run each McNemar's exact test of the classification accuracy score alone, since
        nothing tells how far other samples would differ. Of shares no deviation over seeds below one image is believed.
        `floor`: the measures of as many training images. `notes`: groups that were left out, a sentence each.
    """
    told: list[tuple[str, list[Entry]]] = []
    notes = []
    for label, members in by_output(entries):
        with_samples = [member for member in members if member.evaluation.results.get("generation")]
        if with_samples and len(with_samples) < len(members):
            notes.append(
                f"{label}: {len(members) - len(with_samples)} of {len(members)} runs have no samples; left out"
            )
        elif with_samples:
            told.append((label, with_samples))
    if not told:
        return None
    conditions = _conditions(told[0][1][0])
    alike = [(label, members) for label, members in told if all(_conditions(m) == conditions for m in members)]
    notes += [
        f"{label}: other judge, number of samples or test images than {told[0][0]}; left out"
        for label, members in told
        if not all(_conditions(member) == conditions for member in members)
    ]
    if not alike:
        return {"rows": [], "pairs": [], "floor": {}, "notes": notes}
    first = alike[0]
    pairs = []
    for label, members in alike[1:]:
        found = _pairs(first[1], members)
        pairs += [{"reference": first[0], "name": label, **pair} for pair in found]
        if not found:
            notes.append(f"{label} and {first[0]}: samples are not compared in pairs")
    shown = _generation(first[1][0])
    return {
        **{key: shown[key] for key in ALIKE},
        "rows": [_row(label, members) for label, members in alike],
        "pairs": pairs,
        "floor": {key: shown["floor"][key] for key in MORE_IS_BETTER if key in shown["floor"]},
        "notes": notes,
    }


def _generation(entry: Entry) -> Mapping[str, Any]:
    told: Mapping[str, Any] = entry.evaluation.results["generation"]
    return told


def _conditions(entry: Entry) -> list[Any]:
    told = _generation(entry)
    return [told["samples"], told["test_images"], told["judge"]["digest"]]


def _floor(told: Mapping[str, Any], key: str) -> float:
    """Return the least deviation over seeds that is believed: one image of a share, nothing of other measures."""
    return 1.0 / min(told[images] for images in COUNTED[key]) if key in COUNTED else 0.0


def _row(label: str, members: Sequence[Entry]) -> dict[str, Any]:
    told = [_generation(member) for member in members]
    values = {key: [float(each[key]) for each in told] for key in MORE_IS_BETTER}
    alone = {key: told[0].get(f"{key}_interval") for key in MORE_IS_BETTER}
    return {
        "name": label,
        "seeds": sorted(member.seed for member in members),
        "steps": sorted({int(each["steps"]) for each in told}),
        "values": {key: mean_std(of)[0] for key, of in values.items()},
        "intervals": alone
        if len(told) == 1
        else {key: student(of, floor=_floor(told[0], key)) for key, of in values.items()},
    }


def _pairs(first: Sequence[Entry], second: Sequence[Entry]) -> list[dict[str, Any]]:
    a, b = ({member.seed: member for member in group} for group in (first, second))
    both = sorted(a.keys() & b.keys())
    if len(first) == len(second) == 1:  # of whatever seed each
        return _scores(first[0], second[0])
    if len(both) == 1:
        return _scores(a[both[0]], b[both[0]])
    if not both:
        return []
    found = []
    for key, more in MORE_IS_BETTER.items():
        gained = [float(_generation(b[seed])[key]) - float(_generation(a[seed])[key]) for seed in both]
        mean, ends, p_value = paired_t(gained, floor=_floor(_generation(first[0]), key))
        up, down = ends[0] > 0, ends[1] < 0
        found.append(
            {"measure": key, "difference": mean, "interval": ends, "p_value": p_value,
             "verdict": _verdict(up, down, more=more), "test": f"paired t, {len(both)} seeds"}
        )  # fmt: skip
    return found


def _verdict(up: bool, down: bool, *, more: bool) -> str:
    if not (up or down):
        return "undecided"
    return "gain" if up == more else "loss"


def _scores(first: Entry, second: Entry) -> list[dict[str, Any]]:
    """Compare classifiers trained on samples, test image by test image; empty where that is not kept."""
    right = [_scored(entry.folder) for entry in (first, second)]
    if any(each is None for each in right) or len(right[0]) != len(right[1]):  # type: ignore[arg-type]  # none is None then
        return []
    pair = mcnemar(*right)  # type: ignore[arg-type]  # likewise
    return [
        {"measure": SCORE, "difference": pair.difference, "interval": list(pair.interval), "p_value": pair.p_value,
         "verdict": pair.verdict, "test": "McNemar, exact"}
    ]  # fmt: skip


def _scored(folder: Path) -> NDArray[np.bool_] | None:
    """Return which test images a classifier trained on the samples gets right, bool [N]; None if it is not kept."""
    try:
        with np.load(folder / SAMPLES_FILE) as stored:
            return np.asarray(stored[SCORED], dtype=bool)
    except (OSError, KeyError, ValueError, BadZipFile):
        return None
