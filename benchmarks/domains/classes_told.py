"""What benchmarks/domains/classes.sh has finished, and H5: does the gain of aligned heads grow with the classes?

    python benchmarks/domains/classes_told.py keep RUN FILE
    python benchmarks/domains/classes_told.py tell KEPT JSON   # KEPT/METHOD-CLASSES/seed=N.json, all of them

A gain is the difference in robust accuracy from TRADES as a share of what TRADES reaches, since accuracy itself falls
with the number of classes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualhead.system.files import write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kept import FAST, Variant, alike, compared, keep, over_seeds, read

FEWEST, MOST = 20, 200


def gains(known: Mapping[str, Variant], method: str, classes: int) -> dict[int, float]:
    """Return by seed how much more robust a method is than TRADES, as a share of TRADES's robust accuracy."""

    def robust(name: str) -> dict[int, float]:
        runs = known[f"{name}-{classes}"].runs if f"{name}-{classes}" in known else {}
        return {seed: run["evaluations"]["strong"]["robust_accuracy"][FAST] for seed, run in runs.items()}

    own, base = robust(method), robust("trades")
    return {seed: own[seed] / base[seed] - 1.0 for seed in own if base.get(seed)}


def grows(known: Mapping[str, Variant], method: str) -> dict[str, Any] | None:
    """Return by how much the gain at 200 classes exceeds that at 20, paired by seed, and what that says."""
    few, many = (gains(known, method, classes) for classes in (FEWEST, MOST))
    both = [many[seed] - few[seed] for seed in few if seed in many]
    if not both:
        return None
    found = over_seeds(both)
    low, high = found["interval"] or (-1.0, 1.0)
    return {**found, "answer": "holds" if low > 0 else "does not hold" if high < 0 else "undecided"}


def tell(folder: Path) -> dict[str, Any]:
    """Return rows and differences for each number of classes, gains, and the answer."""
    known = read(folder)
    alike(list(known.values()))
    counts = sorted({int(name.rpartition("-")[2]) for name in known})
    methods = ("trades", "one_head", "aligned")
    told: dict[str, Any] = {"classes": {}, "gains": {}}
    for classes in counts:
        there = [known[f"{name}-{classes}"] for name in methods if f"{name}-{classes}" in known]
        told["classes"][classes] = compared([each.entries() for each in there])
        told["gains"][classes] = {
            name: over_seeds(list(of.values())) for name in methods[1:] if (of := gains(known, name, classes))
        }
    told["H5"] = grows(known, "aligned")
    told["one head grows"] = grows(known, "one_head")
    return told


def main() -> None:
    """Keep a run, or tell what is kept."""
    match sys.argv[1:]:
        case ["keep", run, file]:
            keep(Path(run), Path(file), ["strong"])
        case ["tell", folder, target]:
            found = tell(Path(folder))
            write_json(Path(target), found)
            print("H5:", (found["H5"] or {"answer": "undecided"})["answer"])
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
