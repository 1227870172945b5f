"""Everything that benchmarks/generation/run.sh has finished, in one file: means over seeds and paired differences.

    python benchmarks/generation/collect.py OUT [JSON]
    python benchmarks/generation/collect.py epochs RUN   # epochs of the first stage that cost what the second one did

Reads OUT/VARIANT/seed=N and writes JSON, OUT/generation.json if left out. Seeds that JSON holds already and OUT does
not are kept, provided that the same judge measured them; each data set has a judge of its own. Intervals are
Student's, 95 %, over seeds; a difference is paired by seed and is the second variant minus the first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kept import over_seeds

MEASURES = (
    "classification_accuracy_score", "frechet_distance", "kernel_distance", "precision", "recall", "density",
    "coverage", "judge_agreement", "diversity", "steps",
)  # fmt: skip
PAIRS = (
    ("continued: samples", "dat: samples"),
    ("dat: base", "dat: samples"),
    ("dat: samples", "two-heads: head1"),
    ("dat: samples", "two-heads: head2"),
    ("dat: samples", "two-heads: mean"),
    ("dat: samples", "mean: samples"),
    ("continued: samples", "two-heads: head1"),
    ("cifar10-continued: samples", "cifar10-dat: samples"),
)
"""First and second variant of each difference."""


def numbers(results: dict[str, Any]) -> dict[str, float]:
    """Everything of an evaluation that is compared."""
    told = results["generation"]
    attacks = {name: value for name, value in results["robust_accuracy"].items() if name != "worst"}
    found = {"clean": results["clean_accuracy"], **attacks}
    found |= {name: told[name] for name in MEASURES}
    found |= {f"floor {name}": told["floor"][name] for name in ("frechet_distance", "classification_accuracy_score")}
    found |= {f"nearest {name}": told["nearest"][name] for name in told["nearest"]}
    for source, each in results.get("ood", {}).get("sources", {}).items():
        for score, values in each["scores"].items():
            found |= {f"{Path(source).name} {score} {key}": values[key] for key in ("auroc", "auroc_attacked")}
    return found


Found = dict[str, dict[int, dict[str, float]]]
"""Numbers by variant and seed."""


def kept(told: dict[str, Any]) -> Found:
    """Return the numbers that an earlier answer holds."""
    return {
        key: {
            seed: {name: of["seeds"][place] for name, of in entry.items() if isinstance(of, dict)}
            for place, seed in enumerate(entry["seeds"])
        }
        for key, entry in told.get("variants", {}).items()
    }


def data_of(key: str) -> str:
    """Return the data set of a variant."""
    return next((name for name in ("cifar10", "fashion") if key.startswith(f"{name}-")), "digits")


def read(out: Path, found: Found, judges: dict[str, str]) -> Found:
    """Add the numbers of what is finished, and the digest of the judge of each data set."""
    for done in sorted(out.glob("*/seed=*/evaluations/*/done")):
        run = done.parents[2]
        results = json.loads((done.parent / "results.json").read_text())
        if "generation" not in results:
            continue
        key = f"{run.parent.name}: {done.parent.name}"
        digest = results["generation"]["judge"]["digest"]
        if judges.setdefault(data_of(key), digest) != digest:
            sys.exit(f"{done.parent}: judged by {digest}, and the others by {judges[data_of(key)]}; one must judge all")
        found.setdefault(key, {})[int(run.name.removeprefix("seed="))] = numbers(results)
        strong = run / "evaluations" / "strong"
        if done.parent.name == "samples" and (strong / "done").is_file():
            attacked = json.loads((strong / "results.json").read_text())["robust_accuracy"]["autoattack"]
            found[key][int(run.name.removeprefix("seed="))]["autoattack"] = attacked
    return found


def costs(out: Path) -> dict[str, Any]:
    """Seconds and operations of the second stage over those of the first, mean over seeds, and the last steps."""
    told: dict[str, Any] = {}
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        runs = [run for run in sorted(folder.glob("seed=*")) if (run / "report.html").is_file()]
        stages = [[json.loads((run / "checkpoints" / name / "summary.json").read_text()) for name in ("base", "joint")]
                  for run in runs]  # fmt: skip
        if stages:
            told[folder.name] = {
                "operations_over_base": float(np.mean([b["flops"] / a["flops"] for a, b in stages])),
                "seconds": [round(a["seconds"] + b["seconds"], 1) for a, b in stages],
                "curriculum": [steps_of(run) for run in runs],
            }
    return told


def steps_of(run: Path) -> list[list[float]]:
    """Epoch, steps of the curriculum and accuracies on held-out images, every fifth epoch of the second stage."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    joint = [line for line in lines if line["stage"] == "joint"]
    return [
        [line["epoch"], round(line.get("steps", 0), 1), line["validation_clean"], line["validation_robust"]]
        for line in joint if line["epoch"] % 5 == 0
    ]  # fmt: skip


def shared_names(found: Iterable[dict[str, float]]) -> list[str]:
    """Return the names that all of them tell."""
    each = list(found)
    return [name for name in each[0] if all(name in other for other in each)]


def epochs_of(run: Path) -> int:
    """Epochs of the first stage that cost what the second stage did, by counted operations."""
    base, joint = (json.loads((run / "checkpoints" / name / "summary.json").read_text()) for name in ("base", "joint"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    epochs = max(line["epoch"] for line in lines if line["stage"] == "base")
    return round(epochs * joint["flops"] / base["flops"])


def main() -> None:
    """Read, compare, write."""
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    if sys.argv[1] == "epochs":
        print(epochs_of(Path(sys.argv[2])))
        return
    out = Path(sys.argv[1])
    target = Path(sys.argv[2]) if len(sys.argv) == 3 else out / "generation.json"
    earlier = json.loads(target.read_text()) if target.is_file() else {}
    judges = dict(earlier.get("judges", {}))
    found = read(out, kept(earlier), judges)
    made: dict[str, Any] = {
        "command": "benchmarks/generation/run.sh OUT", "judges": judges,
        "costs": earlier.get("costs", {}) | costs(out), "variants": {},
    }  # fmt: skip
    for key, seeds in found.items():
        ordered = dict(sorted(seeds.items()))
        made["variants"][key] = {"seeds": list(ordered)} | {
            name: over_seeds([each[name] for each in ordered.values()]) for name in shared_names(ordered.values())
        }
    made["differences"] = []
    for first, second in PAIRS:
        shared = sorted(found.get(first, {}).keys() & found.get(second, {}).keys())
        if shared:
            names = shared_names([found[key][seed] for key in (first, second) for seed in shared])
            gains = {n: over_seeds([found[second][s][n] - found[first][s][n] for s in shared]) for n in names}
            ratio = over_seeds([
                found[second][s]["frechet_distance"] / found[first][s]["frechet_distance"] for s in shared
            ])  # fmt: skip
            made["differences"].append(
                {"first": first, "second": second, "seeds": shared, **gains, "frechet_distance ratio": ratio}
            )
    target.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
