"""Finished runs in small files, KEPT/VARIANT/seed=N.json: what studies keep of each, and how they are told together.

For the `collect.py` of the studies beside it. A file has accuracies, cost and verdicts, an image a bit, so that
differences are those of `dualhead compare` long after the run's folder has gone.
"""

from __future__ import annotations

import base64
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dualhead.evaluation import Evaluation, Verdicts
from dualhead.evaluation.results import accuracies
from dualhead.names import id_of_row
from dualhead.runs import Entry, standings
from dualhead.statistics import mean_std, paired_t, student
from dualhead.system.files import write_json

FAST = "autoattack-fast"
"""APGD-CE and APGD-T, the robust accuracy of the studies."""


def over_seeds(values: Sequence[float], images: int | None = None) -> dict[str, Any]:
    """Return mean, Student's 95 % interval (None of one seed) and each seed's value.

    Args:
        values: of each seed.
        images: how many the values are shares of. Seeds that agree more closely than by one image do so by chance, and
            the interval is no narrower than that. None: the values are no shares of images.
    """
    ends = student(values, floor=1.0 / images if images else 0.0)
    return {"mean": float(np.mean(values)), "interval": ends, "seeds": [float(v) for v in values]}


def difference(values: Sequence[float], images: int) -> dict[str, Any]:
    """Return mean, interval, deviation and p-value of Student's test that the mean is 0; of one value the mean.

    Args:
        values: paired differences, of each seed.
        images: how many the accuracies are shares of, see `over_seeds`.
    """
    mean, deviation = mean_std(values)
    if len(values) < 2:
        return {"mean": mean, "interval": None, "narrow": None, "deviation": None, "p_value": None}
    floor = 1.0 / images
    mean, ends, p_value = paired_t(values, floor)
    narrow = student(values, 0.9, floor)
    return {"mean": mean, "interval": ends, "narrow": narrow, "deviation": deviation, "p_value": p_value}


def holm(p_values: Mapping[str, float], tests: int = 0) -> dict[str, float]:
    """Return p-values corrected for as many tests as there are, or will be (Holm 1979).

    Args:
        p_values: by name.
        tests: in the end, those included that are not finished.
    """
    made, least, count = {}, 0.0, max(tests, len(p_values))
    for place, (name, value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        least = max(least, min(1.0, (count - place) * value))
        made[name] = least
    return made


def standard_error(interval: Sequence[float], seeds: int) -> float:
    """Return the standard error of a mean over seeds, at least two, from its 95 % interval of Student."""
    return (interval[1] - interval[0]) / 2 / float(stats.t.ppf(0.975, seeds - 1))


def welch(value: float, errors: Sequence[float], seeds: Sequence[int]) -> list[float]:
    """Return the 95 % interval of a sum of independent means; degrees of freedom by Welch and Satterthwaite.

    Args:
        value: the sum.
        errors: standard error of each mean, times its weight in the sum.
        seeds: how many each is over, at least two.
    """
    parts = [error**2 for error in errors]
    freedom = sum(parts) ** 2 / sum(part**2 / (count - 1) for part, count in zip(parts, seeds, strict=True))
    reach = float(stats.t.ppf(0.975, freedom)) * math.sqrt(sum(parts))
    return [value - reach, value + reach]


def packed(right: NDArray[np.bool_]) -> str:
    """Return the bits of a bool [N] as text."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def unpacked(text: str, count: int) -> NDArray[np.bool_]:
    """Return the bool [count] that `packed` made text of."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count).astype(bool)


def record(run: Path, found: Sequence[str]) -> dict[str, Any]:
    """Return all that is kept of a run.

    Args:
        run: its folder, or one with a `comparison.json` and an `environment.json` like those of a run.
        found: names of folders in its `evaluations`.
    """
    rows = json.loads((run / "comparison.json").read_text())["rows"]
    return {
        "environment": json.loads((run / "environment.json").read_text()),
        "cost": rows[-1]["training_cost"],
        **_held_out(run / "metrics.jsonl"),
        "evaluations": {name: _measured(run / "evaluations" / name, rows) for name in found},
    }


def _held_out(log: Path) -> dict[str, Any]:
    """Return the last validation's accuracies on held-out images, if there was one."""
    lines = map(json.loads, log.read_text().splitlines()) if log.is_file() else ()
    validated = [line for line in lines if "validation_robust" in line]
    if not validated:
        return {}
    return {"held_out": {key: validated[-1][f"validation_{key}"] for key in ("clean", "robust")}}


def _measured(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    evaluation = Evaluation.load(folder)
    results, order = evaluation.results, np.argsort(evaluation.index)
    if not np.array_equal(evaluation.index[order], np.arange(evaluation.num_samples)):
        sys.exit(f"{folder} is not of the first test images")
    output = (results.get("subject") or {}).get("output")
    row = next(row for row in rows if id_of_row(row) == output) if output else rows[-1]
    return {
        "threat": results["threat"],
        "images": evaluation.num_samples,
        "parameters": row["parameters"],
        "clean_accuracy": evaluation.clean_accuracy,
        "robust_accuracy": evaluation.robust_accuracy,
        "checks": evaluation.checks,
        "correct": {name: packed(right[order]) for name, right in evaluation.correct.items() if name != "worst"},
    }


def keep(run: Path, file: Path, found: Sequence[str]) -> None:
    """Write what is kept of a run."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, record(run, found))


def _evaluation(kept: Mapping[str, Any]) -> Evaluation:
    """Return an evaluation with the verdicts that were kept; of labels and predictions it has whether they agree."""
    count = kept["images"]
    right = {name: unpacked(text, count) for name, text in kept["correct"].items()}
    floats, ints = np.full(count, np.nan), np.full(count, -1, np.int64)
    verdicts = {
        name: Verdicts(bits, floats, ints, ints, ints, floats, ints) for name, bits in right.items() if name != "clean"
    }
    made = Evaluation(np.arange(count), np.zeros(count, np.int64), np.where(right["clean"], 0, 1), verdicts, {})
    made.results |= {"threat": kept["threat"], "diagnostics": kept["checks"], **accuracies(made.correct)}
    return made


@dataclass(frozen=True)
class Variant:
    """The finished seeds of a variant.

    Args:
        name: of its folder.
        runs: what was kept, by seed.
    """

    name: str
    runs: Mapping[int, Mapping[str, Any]]

    def entries(self, found: str = "strong", name: str | None = None) -> list[Entry]:
        """Return what `dualhead compare` would read of one evaluation of each seed that has it."""
        label = name or self.name
        return [
            Entry(
                label, label, "", True, seed, _evaluation(run["evaluations"][found]),
                run["evaluations"][found]["parameters"],
                *(run["cost"][key] for key in ("flops", "forward_equivalents", "seconds")),
            )
            for seed, run in self.runs.items()
            if found in run["evaluations"]
        ]  # fmt: skip

    @property
    def precisions(self) -> set[str]:
        """Return the number formats that its seeds were trained in."""
        return {run["environment"]["precision"] for run in self.runs.values()}


def runs_in(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Return what is kept of each variant in a folder, KEPT/VARIANT/seed=N.json, by name and seed."""
    made = {}
    for place in sorted(path for path in folder.glob("*") if path.is_dir()):
        files = {int(file.stem.removeprefix("seed=")): file for file in place.glob("seed=*.json")}
        if files:
            made[place.name] = {seed: json.loads(files[seed].read_text(encoding="utf-8")) for seed in sorted(files)}
    return made


def read(folder: Path) -> dict[str, Variant]:
    """Return the variants in a folder that have a finished seed, by name."""
    return {name: Variant(name, runs) for name, runs in runs_in(folder).items()}


def compared(groups: Sequence[Sequence[Entry]]) -> dict[str, Any]:
    """Return the `rows` and `pairs` of `dualhead compare`; the first group is the reference.

    Raises:
        UserError: if the groups were not measured on the same images under the same threat.
    """
    found = standings([entry for group in groups for entry in group])
    for row in found["rows"]:  # the labels themselves are not kept, so that nothing is known of classes
        del row["balanced_accuracy"], row["class_sizes"]
    return {"rows": found["rows"], "pairs": found["pairs"]}


def alike(variants: Sequence[Variant]) -> None:
    """End the program where seeds were trained in several number formats, whose accuracies differ a little."""
    formats = set().union(*(variant.precisions for variant in variants))
    if len(formats) > 1:
        names = ", ".join(variant.name for variant in variants)
        sys.exit(f"{names}: trained in {' and '.join(sorted(formats))}; compare runs of one precision")


def paired(reference: Sequence[Entry], other: Sequence[Entry]) -> dict[str, dict[str, Any]] | None:
    """Return the differences of one group from another by accuracy; None without a seed that both have."""
    common = {entry.seed for entry in reference} & {entry.seed for entry in other}
    if not common:
        return None
    groups = [[entry for entry in group if entry.seed in common] for group in (reference, other)]
    return {pair["accuracy"]: pair for pair in compared(groups)["pairs"]}


def answer(found: Mapping[str, Mapping[str, Any]] | None, robust: str = FAST) -> str:
    """Return `gains`, `loses` or `undecided`.

    A method gains if its differences in clean and in robust accuracy are both at least 0 and the interval over seeds
    (paired t) of one of them excludes 0; it loses if this holds the other way round. One seed decides nothing.
    """
    told = [found[name] for name in ("clean", robust)] if found else []
    if not told or not all(pair["test"].startswith("paired t") for pair in told):
        return "undecided"
    if all(pair["difference"] >= 0 for pair in told) and any(pair["interval"][0] > 0 for pair in told):
        return "gains"
    if all(pair["difference"] <= 0 for pair in told) and any(pair["interval"][1] < 0 for pair in told):
        return "loses"
    return "undecided"


def points(value: float, ends: Sequence[float] | None = None, *, sign: bool = False) -> str:
    """Return a share in percent, or a difference in points, with its interval."""
    form = "+.1f" if sign else ".1f"
    reach = "" if ends is None else f" [{100 * ends[0]:{form}}, {100 * ends[1]:{form}}]"
    return f"{100 * value:{form}}{reach}"


def table(rows: Sequence[Mapping[str, Any]], robust: str = FAST) -> str:
    """Return rows of `compared` as a table in Markdown, in percent; cost in operations."""
    lines = ["| | seeds | clean | robust | operations |", "|---|---|---|---|---|"]
    for row in rows:
        clean = points(row["clean_accuracy"], row["intervals"]["clean_accuracy"])
        attacked = points(row["robust_accuracy"][robust], row["intervals"][robust])
        cost = row["training_cost"]["flops"]
        lines.append(f"| {row['name']} | {len(row['seeds'])} | {clean} | {attacked} | {cost:.2e} |")
    return "\n".join(lines)


def differences(found: Mapping[str, Mapping[str, Mapping[str, Any]] | None], robust: str = FAST) -> str:
    """Return differences, by what they are of, as a table in Markdown, in points, with the answer to each."""
    lines = ["| | clean | robust | answer |", "|---|---|---|---|"]
    for name, pair in found.items():
        if pair is not None:
            cells = [points(pair[what]["difference"], pair[what]["interval"], sign=True) for what in ("clean", robust)]
            lines.append(f"| {name} | {' | '.join(cells)} | {answer(pair, robust)} |")
    return "\n".join(lines)
