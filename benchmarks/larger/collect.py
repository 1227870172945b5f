"""Finished runs of benchmarks/larger/run.sh, each in a small file, and the curve of the gain over size.

    python benchmarks/larger/collect.py keep RUN FILE FOUND...   # FOUND: folders in the run's evaluations
    python benchmarks/larger/collect.py tell KEPT JSON           # KEPT/CELL-METHOD/seed=N.json

README.md beside it says which cells there are, and how the question is answered.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kept import FAST, Variant, alike, compared, differences, keep, paired, points, read, standard_error, table, welch

IMAGES = {"control": 2250, "images": 9000, "width": 9000, "stem": 9000}
"""Training images of each cell, without those held out."""
CURVE = ("images", "width", "stem")
STANDING = Path(__file__).resolve().parents[1] / "results" / "strongest.json"
SECTION, TRADES, GUIDED = (
    "trades over beta at equal cost, float32", "trades-base-long-beta-12", "trades-distilled-beta-6",
)  # fmt: skip
OUTPUTS = {"strong": "mean of both heads", "head2": "head 2 alone"}
ACCURACIES = {"clean": "clean", FAST: "robust"}
FULL = 50_000 * 1_110_845_440
"""Operations of one pass of ResNet-18 over all training images of CIFAR-10."""


@dataclass(frozen=True)
class Point:
    """A gain of guided distillation over TRADES, at one size.

    Args:
        name: of the cell.
        size: operations of one forward pass of the base network over all training images.
        gain: mean over seeds, a share.
        error: standard error of the mean.
        seeds: how many, at least 2.
    """

    name: str
    size: float
    gain: float
    error: float
    seeds: int


def point(name: str, size: float, pair: Mapping[str, Any]) -> Point | None:
    """Return a point of the curve from a difference over seeds; None of one seed."""
    if not pair["test"].startswith("paired t"):
        return None
    seeds = int(pair["test"].split()[2])
    return Point(name, size, pair["difference"], standard_error(pair["interval"], seeds), seeds)


def combined(found: Sequence[Point], weights: Sequence[float]) -> dict[str, Any]:
    """Return a weighted sum of gains with its 95 % interval."""
    value = sum(w * p.gain for w, p in zip(weights, found, strict=True))
    errors = [w * p.error for w, p in zip(weights, found, strict=True)]
    return {"value": value, "interval": welch(value, errors, [p.seeds for p in found])}


def line(found: Sequence[Point]) -> dict[str, Any]:
    """Return the slope of the gain for each factor of ten in size, its answer, and the extrapolation.

    Least squares through the points, all weighted alike. The intervals are over seeds, for a gain that lies on a
    straight line; they know nothing of how far it bends between the points and ResNet-18.
    """
    x = np.log10([p.size for p in found])
    lever = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    slope = combined(found, lever.tolist())
    low, high = slope["interval"]
    at_full = (1 / len(found) + (math.log10(FULL) - x.mean()) * lever).tolist()
    return {
        "points": [vars(p) for p in found],
        "slope": slope,
        "answer": "shrinks" if high < 0 else "grows" if low > 0 else "undecided",
        "extrapolation to ResNet-18 on 50,000 images": combined(found, at_full),
    }


def standing() -> dict[str, dict[str, Point]]:
    """Return the first point of the curve, by output and accuracy, from the results that stand."""
    told = json.loads(STANDING.read_text())[SECTION]
    cost = next(row["training_cost"] for row in told["rows"] if row["name"].split(":")[0] == TRADES)
    size = IMAGES["control"] * cost["flops"] / cost["forward_equivalents"]
    names = {"strong": GUIDED, "head2": f"{GUIDED}, head 2"}
    return {
        output: {
            pair["accuracy"]: found
            for pair in told["pairs"]
            if (pair["reference"], pair["name"]) == (TRADES, name) and (found := point("standing", size, pair))
        }
        for output, name in names.items()
    }


def gains(known: Mapping[str, Variant], cell: str) -> dict[str, dict[str, dict[str, Any]] | None]:
    """Return the differences of guided distillation from TRADES in a cell, by output."""
    base, guided = known.get(f"{cell}-trades"), known.get(f"{cell}-guided")
    if base is None or guided is None:
        return {}
    alike([base, guided])
    return {
        output: paired(base.entries(), guided.entries(output, f"{guided.name}, {words}"))
        for output, words in OUTPUTS.items()
    }


def curve(known: Mapping[str, Variant]) -> dict[str, Any]:
    """Return lines through the points, from the one that stands and from the control; None until all are there."""
    first, made = standing(), {}
    found: dict[tuple[str, str], dict[str, Point]] = {}
    for cell, images in IMAGES.items():
        for output, pairs in gains(known, cell).items():
            cost = next(iter(known[f"{cell}-trades"].runs.values()))["cost"]
            size = images * cost["flops"] / cost["forward_equivalents"]
            for accuracy in ACCURACIES:
                at = pairs and point(cell, size, pairs[accuracy])
                if at:
                    found.setdefault((output, accuracy), {})[cell] = at
    for output, words in OUTPUTS.items():
        for accuracy, kind in ACCURACIES.items():
            cells = found.get((output, accuracy), {})
            rest = [cells[cell] for cell in CURVE if cell in cells]
            for begin, start in (("standing", first[output].get(accuracy)), ("control", cells.get("control"))):
                whole = start is not None and len(rest) == len(CURVE)
                made[f"{words}, {kind}, from {begin}"] = line([start, *rest]) if start and whole else None
    return made


def tell(kept: Path) -> dict[str, Any]:
    """Return rows, differences and the curve."""
    known = read(kept)
    groups = []
    for name, variant in known.items():
        groups += [variant.entries()] + ([variant.entries("head2", f"{name}, head 2")] if "guided" in name else [])
    pairs = {
        f"{cell}: {OUTPUTS[output]}": pair for cell in IMAGES for output, pair in gains(known, cell).items()
    }  # fmt: skip
    return {**compared([group for group in groups if group]), "differences": pairs, "curve": curve(known)}


def write(kept: Path, target: Path) -> None:
    """Write all that is kept, and print its tables and answers."""
    made = tell(kept)
    target.write_text(json.dumps(made, indent=1) + "\n")
    print(f"{table(made['rows'])}\n\n{differences(made['differences'])}\n")
    for name, told in made["curve"].items():
        if told is None:
            print(f"{name}: not all points are measured over two seeds")
            continue
        slope, full = told["slope"], told["extrapolation to ResNet-18 on 50,000 images"]
        print(
            f"{name}: {told['answer']}, by {points(slope['value'], slope['interval'], sign=True)} points for each "
            f"factor of ten; extrapolated along a straight line, not measured: "
            f"{points(full['value'], full['interval'], sign=True)} with ResNet-18 on 50,000 images"
        )


def main(words: Sequence[str]) -> None:
    """Keep or tell."""
    match words:
        case ["keep", run, file, *found] if found:
            keep(Path(run), Path(file), found)
        case ["tell", kept, target]:
            write(Path(kept), Path(target))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
