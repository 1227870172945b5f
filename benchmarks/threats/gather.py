"""Everything that benchmarks/threats/run.sh has finished, in one file.

    python benchmarks/threats/gather.py OUT [JSON]

Reads OUT/VARIANT/seed=N and writes JSON, OUT/threats.json if left out: for each variant clean accuracy, robust accuracy
under each threat, their mean and `union` (right under all of them), as means over the seeds that are finished, with
Student's 95 % interval over seeds (none of one seed); what training cost; and shares of the specialists.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dualhead.evaluation import Evaluation

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "domains"))
from collect import over_seeds  # the other study's, which has the same intervals

MEASURED = "evaluations/threats"
SPECIALISTS = {"Linf": "sat-linf", "L2": "sat-l2", "L1": "sat-l1"}


def describe(runs: dict[int, Path]) -> dict[str, Any]:
    """Return what the finished seeds of a variant reached and cost."""
    results = [Evaluation.load(run / MEASURED).results for run in runs.values()]
    rows = [json.loads((run / "comparison.json").read_text())["rows"][0] for run in runs.values()]
    return {
        "seeds": list(runs),
        "images": results[0]["num_samples"],
        "clean": over_seeds([each["clean_accuracy"] for each in results]),
        **{
            label: over_seeds([each["threats"][label]["robust_accuracy"] for each in results])
            for label in results[0]["threats"]
        },
        "average": over_seeds([each["average"] for each in results]),
        "union": over_seeds([each["robust_accuracy"]["worst"] for each in results]),
        "forward_equivalents": over_seeds([row["training_cost"]["forward_equivalents"] for row in rows]),
        "seconds": over_seeds([row["training_cost"]["seconds"] for row in rows]),
        "parameters": rows[0]["parameters"],
        "checks": sorted(
            {check["name"] for each in results for check in each["diagnostics"] if check["status"] != "ok"}
        ),
    }


def shares(variant: dict[str, Any], variants: dict[str, Any]) -> dict[str, float] | None:
    """Return accuracies as shares of the specialists' (MultiRobustBench); None while one of these is not there."""
    if not set(SPECIALISTS.values()) <= variants.keys():
        return None
    best = {"clean": max(variants[name]["clean"]["mean"] for name in SPECIALISTS.values())}
    best |= {label: variants[name][label]["mean"] for label, name in SPECIALISTS.items()}
    found = {key: variant[key]["mean"] / value for key, value in best.items() if value}
    return {**found, "average": sum(found.values()) / len(found), "worst": min(found.values())}


def gather(out: Path, wanted: int = 3) -> dict[str, Any]:
    """Return all that is finished; `under_way` as long as a variant has fewer than `wanted` seeds."""
    variants = {}
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        done = sorted(run for run in folder.glob("seed=*") if (run / MEASURED / "done").is_file())
        runs = {int(run.name.removeprefix("seed=")): run for run in done}
        if runs:
            variants[folder.name] = describe(runs)
    for variant in variants.values():
        variant["shares_of_specialists"] = shares(variant, variants)
    whole = len(variants) == 9 and all(len(variant["seeds"]) >= wanted for variant in variants.values())
    return {"under_way": not whole, "variants": variants}


def main() -> None:
    """Write the file and print a line for each variant."""
    out = Path(sys.argv[1])
    found = gather(out)
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else out / "threats.json"
    target.write_text(json.dumps(found, indent=1) + "\n")
    for name, variant in found["variants"].items():
        columns = ("clean", *SPECIALISTS, "union")
        told = "  ".join(f"{key} {100 * variant[key]['mean']:.1f}" for key in columns)
        print(f"{name:10} {told}  ({len(variant['seeds'])} seeds)")


if __name__ == "__main__":
    main()
