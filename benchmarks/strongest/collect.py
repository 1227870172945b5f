"""Finished seeds of benchmarks/strongest/run.sh, each in a small file, and what they say together.

    python benchmarks/strongest/collect.py keep RUN FILE FOUND...   # FOUND: folders in the run's evaluations
    python benchmarks/strongest/collect.py tell KEPT JSON           # KEPT/STUDY/seed=N.json

Studies that were trained in one precision and attacked on as many images stand together. `pairs` are paired by seed. Of
the runs behind ../results/strongest.json no verdicts are kept, so that `unpaired` differences from them are of means
over seeds (Welch).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kept import (
    FAST,
    Variant,
    alike,
    answer,
    compared,
    keep,
    over_seeds,
    paired,
    points,
    read,
    standard_error,
    table,
    welch,
)

RESULTS = Path(__file__).resolve().parents[1] / "results" / "strongest.json"
FIRST, OVER_BETA = "trades and sat", "trades over beta at equal cost, float32"
SETTINGS = {FIRST: ("bf16", 5000), "mart": ("float32", 2000), OVER_BETA: ("float32", 2000)}
"""Precision and test images of the sections of the results that stand."""
COMPARISONS = (
    ("mart-distilled", "mart-base-long"), ("mart-distilled", "mart-base"), ("mart-base-long", "mart-base"),
    ("trades-ensemble", "trades-base-long"), ("trades-distilled", "trades-ensemble"),
    ("trades-guided-merged", "trades-ensemble"), ("trades-distilled", "trades-guided-merged"),
    ("trades-three", "trades-distilled"), ("trades-three", "trades-ensemble"),
    ("sat-base-best", "sat-base"), ("sat-base-long-best", "sat-base-long"),
    ("sat-distilled", "sat-base-best"), ("sat-distilled", "sat-base-long-best"),
    ("trades-wide-beta-12", "trades-base-beta-12"), ("trades-wide-long-beta-12", "trades-base-long-beta-12"),
    ("trades-distilled-beta-6", "trades-wide-long-beta-12"),
)  # fmt: skip
"""Method and reference, of the rows that are still to be measured."""


def setting(variant: Variant) -> tuple[str, int]:
    """Return precision of training and test images of a study."""
    alike([variant])
    images = {run["evaluations"]["strong"]["images"] for run in variant.runs.values()}
    if len(images) > 1:
        sys.exit(f"{variant.name}: seeds were attacked on {' and '.join(map(str, sorted(images)))} images")
    return variant.precisions.pop(), images.pop()


def standing(of: tuple[str, int]) -> dict[str, dict[str, Any]]:
    """Return the rows that stand in a setting, by study, those of several seeds."""
    told = json.loads(RESULTS.read_text())
    rows = [row for section, settings in SETTINGS.items() if settings == of for row in told[section]["rows"]]
    return {row["name"].split(":")[0]: row for row in rows if len(row["seeds"]) > 1}


def unpaired(reference: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, dict[str, Any]] | None:
    """Return the differences of two rows' means with Welch's 95 % interval; None where one has one seed."""
    if min(len(row["seeds"]) for row in (reference, other)) < 2:
        return None
    found = {}
    for accuracy in ("clean", "pgd-40", FAST):
        key = "clean_accuracy" if accuracy == "clean" else accuracy
        means = [
            row["clean_accuracy"] if accuracy == "clean" else row["robust_accuracy"][key] for row in (reference, other)
        ]
        seeds = [len(row["seeds"]) for row in (reference, other)]
        intervals = [row["intervals"][key] for row in (reference, other)]
        errors = [standard_error(ends, count) for ends, count in zip(intervals, seeds, strict=True)]
        difference = means[1] - means[0]
        found[accuracy] = {"difference": difference, "interval": welch(difference, errors, seeds)}
    return found


def section(known: Mapping[str, Variant], stands: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return rows of the studies of one setting, and their differences."""
    rows = {row["name"]: row for row in compared([variant.entries() for variant in known.values()])["rows"]}
    pairs: list[dict[str, Any]] = []
    apart: list[dict[str, Any]] = []
    for name, reference in COMPARISONS:
        names = {"reference": reference, "name": name}
        if name in known and reference in known:
            found = paired(known[reference].entries(), known[name].entries())
            if found:
                pairs += [{**names, **pair} for pair in found.values()]
                continue
        one, other = (rows.get(each) or stands.get(each) for each in (reference, name))
        if one and other and {name, reference} & rows.keys():
            differences = unpaired(one, other) or {}
            apart += [{**names, "accuracy": accuracy, **each} for accuracy, each in differences.items()]
    return {"rows": list(rows.values()), "pairs": pairs, "unpaired": apart, "further": further(known)}


def further(known: Mapping[str, Variant]) -> dict[str, Any]:
    """Return robust accuracies under the attacks beside `strong`, by study and evaluation."""
    made: dict[str, Any] = {}
    for name, variant in known.items():
        for found in ("adaptive", "autoattack"):
            told = [run["evaluations"][found] for run in variant.runs.values() if found in run["evaluations"]]
            if told:
                attacks, images = told[0]["robust_accuracy"], told[0]["images"]
                shares = {key: over_seeds([each["robust_accuracy"][key] for each in told], images) for key in attacks}
                made.setdefault(name, {})[found] = {"images": images, **shares}
    return made


def tell(kept: Path) -> dict[str, Any]:
    """Return all that is kept, by setting."""
    settings: dict[tuple[str, int], dict[str, Variant]] = {}
    for name, variant in read(kept).items():
        settings.setdefault(setting(variant), {})[name] = variant
    return {
        f"{precision}, {images} images": section(known, standing((precision, images)))
        for (precision, images), known in sorted(settings.items())
    }


def lines(told: Mapping[str, Any]) -> list[str]:
    """Return differences in words; only those that are paired by seed are answered."""
    made = []
    for key, how in (("pairs", "paired by seed"), ("unpaired", "not paired")):
        by_names: dict[tuple[str, str], dict[str, Any]] = {}
        for each in told[key]:
            by_names.setdefault((each["name"], each["reference"]), {})[each["accuracy"]] = each
        for (name, reference), found in by_names.items():
            clean, robust = (
                points(found[what]["difference"], found[what]["interval"], sign=True) for what in ("clean", FAST)
            )
            verdict = f": {answer(found)}" if key == "pairs" else ""
            made.append(f"{name} less {reference}, {how}: clean {clean}, robust {robust}{verdict}")
    return made


def main(words: Sequence[str]) -> None:
    """Keep or tell."""
    match words:
        case ["keep", run, file, *found] if found:
            keep(Path(run), Path(file), found)
        case ["tell", kept, target]:
            made = tell(Path(kept))
            Path(target).write_text(json.dumps(made, indent=1) + "\n")
            for name, told in made.items():
                print("\n".join([f"{name}:", "", table(told["rows"]), "", *lines(told), ""]))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
