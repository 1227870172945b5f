"""Collect what finished runs of the study say, cell by cell.

    python benchmarks/poisoning/collect.py OUT [TARGET]    # OUT/poisoning.json, or TARGET

A cell is a method on a poison; its runs are seeds. Clean accuracy, robust accuracy and success rate are means over
seeds with a 95 % interval of Student's t (of Wilson for one seed), and each is set beside the same method on clean
data, paired by seed. Nothing is collected of a run that is not finished.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dualhead.statistics import mean_std, wilson


def read(run: Path) -> dict[str, Any] | None:
    """Return what a finished run says; None for another."""
    comparison = run / "comparison.json"
    if not comparison.is_file():
        return None
    row = json.loads(comparison.read_text())["rows"][-1]
    results = json.loads((run / "evaluation" / "results.json").read_text())
    told: Mapping[str, Any] = row.get("poison") or {}
    found = {
        "clean_accuracy": row["clean_accuracy"],
        "robust_accuracy": row["robust_accuracy"]["worst"],
        "attack_success_rate": told.get("attack_success_rate"),
        "by_given_label": told.get("training", {}).get("by_given_label"),
    }
    return {**found, "num_samples": results["num_samples"], "num_triggered": told.get("num_triggered")}


def summary(values: Sequence[float], images: int | None = None) -> dict[str, Any]:
    """Mean and interval over seeds; of one seed over images, and of one difference none."""
    mean, deviation = mean_std(values)
    if len(values) == 1:
        ends = None if images is None else list(wilson(round(mean * images), images))
        return {"mean": mean, "interval": ends, "runs": 1}
    from scipy import stats

    reach = float(stats.t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    return {"mean": mean, "interval": [mean - reach, mean + reach], "deviation": deviation, "runs": len(values)}


def collect(folder: Path) -> dict[str, Any]:
    """The cells of a part of the study."""
    runs: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in sorted(path for path in folder.iterdir() if path.is_dir()):
        found = {seed.name: told for seed in sorted(cell.glob("seed=*")) if (told := read(seed)) is not None}
        if found:
            runs[cell.name] = found
    made = {}
    for name, by_seed in runs.items():
        clean = runs.get(f"{name.partition('-')[0]}-clean", {})
        entry: dict[str, Any] = {"seeds": [seed.removeprefix("seed=") for seed in by_seed], "runs": by_seed}
        for key in ("clean_accuracy", "robust_accuracy", "attack_success_rate", "by_given_label"):
            values = [told[key] for told in by_seed.values() if told[key] is not None]
            if values:
                first = next(iter(by_seed.values()))
                triggered = key == "attack_success_rate"
                images = first["num_triggered" if triggered else "num_samples"] if key != "by_given_label" else None
                entry[key] = summary(values, images)
        both = [seed for seed in by_seed if seed in clean]
        if both and not name.endswith("-clean"):
            entry["against_clean_data"] = {
                key: summary([by_seed[seed][key] - clean[seed][key] for seed in both])
                for key in ("clean_accuracy", "robust_accuracy")
            }
        made[name] = entry
    return made


def main() -> None:
    """Read, compare, write."""
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    parts = {part: collect(out / part) for part in ("digits", "pilot") if (out / part).is_dir()}
    target = Path(sys.argv[2]) if len(sys.argv) == 3 else out / "poisoning.json"
    target.write_text(json.dumps({part: cells for part, cells in parts.items() if cells}, indent=1) + "\n")
    for part, cells in parts.items():
        for name, entry in cells.items():
            shown = (f"{key} {100 * entry[key]['mean']:.1f}" for key in entry if key in entry and "mean" in entry[key])
            print(f"{part} {name}, {len(entry['seeds'])} seeds: {', '.join(shown)}")


if __name__ == "__main__":
    main()
