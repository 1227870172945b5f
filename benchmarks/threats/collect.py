"""What benchmarks/threats/run.sh has finished: each seed in a small file of its own, and all of them in one answer.

    python benchmarks/threats/collect.py keep RUN FILE    # accuracies, cost and verdicts of a measured run
    python benchmarks/threats/collect.py tell KEPT JSON   # KEPT/VARIANT/seed=N.json, all of them, told together

The answer has for each variant clean accuracy, robust accuracy under each threat, their mean and `union` (right under
all of them), as means over the finished seeds, with Student's 95 % interval over seeds (none of one seed); what
training cost; and shares of the specialists. `questions` are those of README.md, by differences of paired seeds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dualhead.evaluation import Evaluation
from dualhead.system.files import write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kept import over_seeds, packed, runs_in

MEASURED = "evaluations/threats"
Runs = Mapping[int, Mapping[str, Any]]
"""Records by seed."""
THREE = ("max", "avg")
"""Variants with three attacks for each batch."""
SPECIALISTS = {"Linf": "sat-linf", "L2": "sat-l2", "L1": "sat-l1"}


def record(run: Path) -> dict[str, Any]:
    """All that is told of a measured run: nothing else of it has to be kept."""
    evaluation = Evaluation.load(run / MEASURED)
    results, row = evaluation.results, json.loads((run / "comparison.json").read_text())["rows"][0]
    return {
        "environment": json.loads((run / "environment.json").read_text()),
        "images": results["num_samples"],
        "clean": results["clean_accuracy"],
        "threats": {label: each["robust_accuracy"] for label, each in results["threats"].items()},
        "average": results["average"],
        "union": results["robust_accuracy"]["worst"],
        "cost": row["training_cost"],
        "parameters": row["parameters"],
        "checks": sorted({check["name"] for check in results["diagnostics"] if check["status"] != "ok"}),
        "correct": {what: packed(right) for what, right in evaluation.correct.items()},
    }


def describe(runs: Runs) -> dict[str, Any]:
    """Return what the finished seeds of a variant reached and cost, from their records."""
    found = list(runs.values())
    images = found[0]["images"]
    return {
        "seeds": list(runs),
        "images": images,
        "clean": over_seeds([each["clean"] for each in found], images),
        **{label: over_seeds([each["threats"][label] for each in found], images) for label in found[0]["threats"]},
        "average": over_seeds([each["average"] for each in found], images),
        "union": over_seeds([each["union"] for each in found], images),
        "forward_equivalents": over_seeds([each["cost"]["forward_equivalents"] for each in found]),
        "seconds": over_seeds([each["cost"]["seconds"] for each in found]),
        "parameters": found[0]["parameters"],
        "checks": sorted({check for each in found for check in each["checks"]}),
    }


def shares(variant: dict[str, Any], variants: dict[str, Any]) -> dict[str, float] | None:
    """Return accuracies as shares of the specialists' (MultiRobustBench); None while one of these is not there."""
    if not set(SPECIALISTS.values()) <= variants.keys():
        return None
    best = {"clean": max(variants[name]["clean"]["mean"] for name in SPECIALISTS.values())}
    best |= {label: variants[name][label]["mean"] for label, name in SPECIALISTS.items()}
    found = {key: variant[key]["mean"] / value for key, value in best.items() if value}
    return {**found, "average": sum(found.values()) / len(found), "worst": min(found.values())}


def difference(of: Runs, less: Runs, what: str) -> dict[str, Any]:
    """Return by how much one variant exceeds another, paired by seed, and whether this is a `gain` or a `loss`."""

    def value(record: Mapping[str, Any]) -> float:
        return float(record[what] if what == "union" else record["threats"][what])

    shared = [seed for seed in of if seed in less]
    found = over_seeds([value(of[seed]) - value(less[seed]) for seed in shared], of[shared[0]]["images"])
    low, high = found["interval"] or (-1.0, 1.0)
    return {**found, "answer": "gain" if low > 0 else "loss" if high < 0 else "undecided"}


def questions(runs: Mapping[str, Runs]) -> dict[str, Any]:
    """Answer the questions of README.md.

    Args:
        runs: records by variant and seed; of all variants.
    """
    own: dict[str, Any] = {}
    for norm, specialist in SPECIALISTS.items():
        found = {name: difference(runs[specialist], runs[name], norm) for name in runs if name != specialist}
        answers = {each["answer"] for each in found.values()}
        holds = "does not hold" if "loss" in answers else "holds" if answers == {"gain"} else "undecided"
        own[norm] = {"answer": holds, "above": found}

    def union(name: str) -> float:
        return float(np.mean([each["union"] for each in runs[name].values()]))

    best = max(SPECIALISTS.values(), key=union)
    several = [name for name in runs if name not in SPECIALISTS.values()]
    beyond = {name: difference(runs[name], runs[best], "union") for name in several}
    return {
        "specialist_is_best_under_its_norm": own,
        "union_beyond_best_specialist": {"best": best, "above": beyond},
        "one_adaptive_attack_beyond_three": {name: difference(runs["e-at"], runs[name], "union") for name in THREE},
    }


def tell(kept: Path, wanted: int = 3) -> dict[str, Any]:
    """Return all that is kept; `under_way`, nothing answered, while a variant has fewer than `wanted` seeds."""
    runs = runs_in(kept)
    variants = {name: describe(found) for name, found in runs.items()}
    for variant in variants.values():
        variant["shares_of_specialists"] = shares(variant, variants)
    whole = len(variants) == 9 and all(len(variant["seeds"]) >= wanted for variant in variants.values())
    return {"under_way": not whole, "variants": variants, "questions": questions(runs) if whole else None}


def main() -> None:
    """Keep a run; or write what is kept, and print a line for each variant."""
    match sys.argv[1:]:
        case ["keep", run, file]:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            write_json(Path(file), record(Path(run)))
        case ["tell", kept, target]:
            found = tell(Path(kept))
            Path(target).write_text(json.dumps(found, indent=1) + "\n")
            for name, variant in found["variants"].items():
                columns = ("clean", *SPECIALISTS, "union")
                told = "  ".join(f"{key} {100 * variant[key]['mean']:.1f}" for key in columns)
                print(f"{name:10} {told}  ({len(variant['seeds'])} seeds)")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
