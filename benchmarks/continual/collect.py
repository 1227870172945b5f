"""Everything that benchmarks/continual/run.sh has finished, in one file.

    python benchmarks/continual/collect.py OUT [JSON]

Reads OUT/ORDER/METHOD/seed=N and OUT/bounds/METHOD/seed=N and writes JSON, OUT/continual.json if left out. Numbers are
means over seeds with Student's 95 % interval over seeds, none of one seed. README.md beside it is the protocol.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from dualhead.evaluation import Evaluation, of_specialists, plasticity

KNOWN = ("union", "average_seen", "forgetting", "backward_transfer", "clean_drop")
"""Measures of the last stage."""


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean, Student's 95 % interval (None of one value), and each seed's value."""
    mean, count = float(np.mean(values)), len(values)
    interval = None
    if count > 1:
        reach = float(stats.t.ppf(0.975, count - 1)) * float(np.std(values, ddof=1)) / math.sqrt(count)
        interval = [mean - reach, mean + reach]
    return {"mean": mean, "interval": interval, "seeds": [float(value) for value in values]}


def finished(folder: Path) -> dict[int, Path]:
    """Finished runs of a method, by seed."""
    runs = sorted(run for run in folder.glob("seed=*") if (run / "report.html").is_file())
    return {int(run.name.removeprefix("seed=")): run for run in runs}


def results_of(run: Path) -> dict[str, Any]:
    """Content of a run's `results.json`."""
    found: dict[str, Any] = json.loads((run / "evaluation" / "results.json").read_text(encoding="utf-8"))
    return found


def cost_of(run: Path) -> float:
    """Training cost of what a run deploys, in forward passes of one image."""
    row = json.loads((run / "comparison.json").read_text(encoding="utf-8"))["rows"][-1]
    return float(row["training_cost"]["forward_equivalents"])


def of_sequence(
    runs: Mapping[int, Path], first: Mapping[int, Path], specialists: Mapping[str, float]
) -> dict[str, Any]:
    """Describe a method in one order.

    Args:
        runs: by seed.
        first: the run of the first stage, by seed; its cost belongs to the method.
        specialists: robust accuracy of the network that was made for a threat; empty while there are none.
    """
    told = {seed: results_of(run)["sequence"] for seed, run in runs.items()}
    rows = [each["rows"][-1] for each in told.values()]
    threats = next(iter(told.values()))["threats"]
    made = {
        "seeds": list(told),
        "old_attacks": next(iter(told.values()))["old_attacks"],
        "clean": over_seeds([row["clean_accuracy"] for row in rows]),
        **{name: over_seeds([row["robust_accuracy"][name] for row in rows]) for name in threats},
        **{key: over_seeds([row[key] for row in rows]) for key in KNOWN},
        "passes": over_seeds([cost_of(run) + cost_of(first[seed]) for seed, run in runs.items()]),
        "matrix": [
            {"stage": row["stage"], "clean": row["clean_accuracy"], **row["robust_accuracy"], "union": row["union"]}
            for row in next(iter(told.values()))["rows"]
        ],
        "matrix_seed": next(iter(told)),
    }
    if set(threats) <= set(specialists):
        found = [plasticity(each, specialists) for each in told.values()]
        made["plasticity"] = over_seeds([value for value in found if value is not None])
    return made


def of_bound(runs: Mapping[int, Path]) -> dict[str, Any]:
    """Describe a network that knew its threats from the start."""
    found = [results_of(run) for run in runs.values()]
    return {
        "seeds": list(runs),
        "clean": over_seeds([each["clean_accuracy"] for each in found]),
        **{
            name: over_seeds([each["threats"][name]["robust_accuracy"] for each in found])
            for name in found[0]["threats"]
        },
        "union": over_seeds([each["robust_accuracy"]["worst"] for each in found]),
        "passes": over_seeds([cost_of(run) for run in runs.values()]),
    }


def main() -> None:
    """Read and write."""
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    bounds = {folder.name: finished(folder) for folder in sorted((out / "bounds").glob("*"))}
    made_for_one = [run for name, runs in bounds.items() if name.startswith("specialist") for run in runs.values()]
    evaluations = [Evaluation.load(run / "evaluation") for run in made_for_one]
    specialists = of_specialists(evaluations, ["Linf", "L2", "L1"]) if len(bounds) == 4 else {}
    made: dict[str, Any] = {"bounds": {name: of_bound(runs) for name, runs in bounds.items() if runs}}
    for order in ("forward", "reverse"):
        folders = {folder.name: finished(folder) for folder in sorted((out / order).glob("*"))}
        first = folders.pop("first", {})
        made[order] = {name: of_sequence(runs, first, specialists) for name, runs in folders.items() if runs}
    target = Path(sys.argv[2]) if len(sys.argv) == 3 else out / "continual.json"
    target.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
