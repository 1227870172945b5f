"""What benchmarks/continual/run.sh has finished: each seed in a small file of its own, and all of them in one answer.

    python benchmarks/continual/collect.py keep RUN FILE [FIRST]   # what a finished run reached and cost; FIRST: that
                                                                   # of the first stage, whose cost belongs to it
    python benchmarks/continual/collect.py tell KEPT JSON          # KEPT/ORDER/METHOD/seed=N.json and KEPT/bounds/...

Numbers are means over seeds with Student's 95 % interval over seeds, none of one seed. README.md beside it is the
protocol.
"""

from __future__ import annotations

import base64
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from dualhead.evaluation import Evaluation, plasticity
from dualhead.system.files import write_json

KNOWN = ("union", "average_seen", "forgetting", "backward_transfer", "clean_drop")
"""Measures of the last stage."""
SPECIALISTS = ("specialist-linf", "specialist-l2", "specialist-l1")


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean, Student's 95 % interval (None of one value), and each seed's value."""
    mean, count = float(np.mean(values)), len(values)
    interval = None
    if count > 1:
        reach = float(stats.t.ppf(0.975, count - 1)) * float(np.std(values, ddof=1)) / math.sqrt(count)
        interval = [mean - reach, mean + reach]
    return {"mean": mean, "interval": interval, "seeds": [float(value) for value in values]}


def deployed(run: Path) -> dict[str, Any]:
    """Row of `comparison.json` of what a run deploys."""
    found: dict[str, Any] = json.loads((run / "comparison.json").read_text(encoding="utf-8"))["rows"][-1]
    return found


def record(run: Path, first: Path | None = None) -> dict[str, Any]:
    """All that is told of a finished run: nothing else of it has to be kept.

    Args:
        run: a sequence, or a network that knew its threats from the start.
        first: the run that a sequence goes on from; None: it has its first stage itself.
    """
    evaluation, row = Evaluation.load(run / "evaluation"), deployed(run)
    order = np.argsort(evaluation.index)
    cost = row["training_cost"]["forward_equivalents"]
    before = deployed(first)["training_cost"]["forward_equivalents"] if first is not None else 0.0
    told: dict[str, Any] = {
        "environment": json.loads((run / "environment.json").read_text(encoding="utf-8")),
        "images": evaluation.num_samples,
        "clean": evaluation.clean_accuracy,
        "threats": {name: each["robust_accuracy"] for name, each in evaluation.results["threats"].items()},
        "union": evaluation.results["robust_accuracy"]["worst"],
        "passes": cost + before,
        "parameters": row["parameters"],
        "correct": {  # bits, image by image
            what: base64.b64encode(np.packbits(right[order]).tobytes()).decode()
            for what, right in evaluation.correct.items()
        },
    }
    if "sequence" in evaluation.results:
        told["sequence"] = evaluation.results["sequence"]
    return told


def finished(folder: Path) -> dict[int, dict[str, Any]]:
    """Records of a method, by seed."""
    files = {int(file.stem.removeprefix("seed=")): file for file in folder.glob("seed=*.json")}
    return {seed: json.loads(files[seed].read_text(encoding="utf-8")) for seed in sorted(files)}


def best_of(specialists: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Highest robust accuracy of some networks under each threat; none where there are no networks."""
    if not specialists:
        return {}
    return {threat: max(each["threats"][threat] for each in specialists) for threat in specialists[0]["threats"]}


def of_sequence(runs: Mapping[int, Mapping[str, Any]], specialists: Mapping[str, float]) -> dict[str, Any]:
    """Describe a method in one order.

    Args:
        runs: records by seed.
        specialists: robust accuracy of the network that was made for a threat; empty while there are none.
    """
    told = [each["sequence"] for each in runs.values()]
    rows = [each["rows"][-1] for each in told]
    threats = told[0]["threats"]
    made = {
        "seeds": list(runs),
        "old_attacks": told[0]["old_attacks"],
        "clean": over_seeds([row["clean_accuracy"] for row in rows]),
        **{name: over_seeds([row["robust_accuracy"][name] for row in rows]) for name in threats},
        **{key: over_seeds([row[key] for row in rows]) for key in KNOWN},
        "passes": over_seeds([each["passes"] for each in runs.values()]),
        "parameters": next(iter(runs.values()))["parameters"],
        "matrix": [
            {"stage": row["stage"], "clean": row["clean_accuracy"], **row["robust_accuracy"], "union": row["union"]}
            for row in told[0]["rows"]
        ],
        "matrix_seed": next(iter(runs)),
    }
    if set(threats) <= set(specialists):
        found = [plasticity(each, specialists) for each in told]
        made["plasticity"] = over_seeds([value for value in found if value is not None])
    return made


def of_bound(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Describe a network that knew its threats from the start."""
    found = list(runs.values())
    return {
        "seeds": list(runs),
        "clean": over_seeds([each["clean"] for each in found]),
        **{name: over_seeds([each["threats"][name] for each in found]) for name in found[0]["threats"]},
        "union": over_seeds([each["union"] for each in found]),
        "passes": over_seeds([each["passes"] for each in found]),
    }


def tell(kept: Path) -> dict[str, Any]:
    """Return everything that is kept, put together."""
    bounds = {folder.name: finished(folder) for folder in sorted((kept / "bounds").glob("*"))}
    there = [run for name in SPECIALISTS for run in bounds.get(name, {}).values()]
    specialists = best_of(there) if all(bounds.get(name) for name in SPECIALISTS) else {}
    made: dict[str, Any] = {"bounds": {name: of_bound(runs) for name, runs in bounds.items() if runs}}
    for order in ("forward", "reverse"):
        folders = {folder.name: finished(folder) for folder in sorted((kept / order).glob("*"))}
        made[order] = {name: of_sequence(runs, specialists) for name, runs in folders.items() if runs}
    return made


def main() -> None:
    """Keep a run, or tell what is kept."""
    match sys.argv[1:]:
        case ["keep", run, file, *first] if len(first) < 2:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            write_json(Path(file), record(Path(run), *map(Path, first)))
        case ["tell", kept, target]:
            Path(target).write_text(json.dumps(tell(Path(kept)), indent=1) + "\n", encoding="utf-8")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
