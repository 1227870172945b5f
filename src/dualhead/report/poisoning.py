"""What a run on poisoned data learnt, as tables and pictures show it."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dualhead.report.gallery import picture
from dualhead.report.sources import Measured, Source
from dualhead.report.table import MISSING, Cell, Table, poison_columns, share_cell
from dualhead.report.text import percent, points

TIMES: Final = 10
"""Of the difference that is shown."""
FINDERS: Final = {
    "spectral_signatures": "found by spectral signatures, AUROC",
    "activation_clustering": "found by clusters, AUROC",
}
"""Columns of the finders of poisoned images, by their names in `results.json`."""
LEAD: Final = (
    "Of one poison, one share of images and one seed of it. Another poison may fare otherwise, and so may an adversary "
    "who makes one against this very method."
)


@dataclass(frozen=True)
class Poisoning:
    """The page's section on the poison of a run.

    Args:
        name: of the poison.
        lead: what must not be concluded.
        changes: what was done to the training images, in a sentence.
        outputs: what each output made of it; None if nothing was measured.
        classes: success by class; None without a trigger.
        epochs: best against last epoch; None if they were not told apart.
        pictures: a few training images before and after, and ten times the difference.
    """

    name: str
    lead: str
    changes: str
    outputs: Table | None
    classes: Table | None
    epochs: Table | None
    pictures: list[tuple[str, str, str]]


def section(source: Source, notes: list[str]) -> Poisoning | None:
    """Return the section of a run; None if its data were not poisoned. What cannot be read is noted."""
    data = source.recipe.get("data")
    poison = data.get("poison") if isinstance(data, Mapping) else None
    if not isinstance(poison, Mapping):
        return None
    record = _record(source.folder / "poison.npz", notes)
    shown = source.deployed or (source.rows[-1] if source.rows else None)
    try:
        told = shown.results.get("poison", {}) if shown else {}
        return Poisoning(
            str(poison.get("name")), LEAD, _changes(record), _outputs(source.rows), _classes(told), _epochs(told),
            _pictures(record),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        notes.append("What was measured of the poison cannot be read; it is left out.")
        return None


def _record(path: Path, notes: list[str]) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        return {}
    try:
        with np.load(path) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return {}


def _changes(record: Mapping[str, NDArray[Any]]) -> str:
    if "index" not in record:
        return ""
    removed = int((record["new_label"] < 0).sum())
    relabelled = int(((record["old_label"] != record["new_label"]) & (record["new_label"] >= 0)).sum())
    told = f"{len(record['index']):,} training images touched: {relabelled:,} with another label, {removed:,} left out"
    moved = record["l2"][record["l2"] > 0]
    if len(moved):
        largest = 255 * float(record["linf"][record["l2"] > 0].max())
        told += (
            f", {len(moved):,} with other pixels (median L2 distance {float(np.median(moved)):.2f}, largest change "
            f"{largest:.0f}/255)"
        )
    return told + "."


def _outputs(rows: Sequence[Measured]) -> Table | None:
    known = [row for row in rows if isinstance(row.results.get("poison"), Mapping)]
    columns = poison_columns([row.results for row in known])
    above = [row.results["poison"].get("above_clean_model") for row in known]
    true = [row.results["poison"].get("training", {}) for row in known]
    cells = [[Cell(row.title)] for row in known]
    for name, shares in columns.items():
        for line, share in zip(cells, shares, strict=True):
            line.append(share)
        if name == "attack success" and any(above):
            for line, told in zip(cells, above, strict=True):
                line.append(_above(told) if told else MISSING)
    names = [f"{name} %" for name in columns]
    if any(above):
        names.insert(names.index("attack success %") + 1, "above a clean model, points")
    if any("by_true_label" in told for told in true):
        names.append("by true label %")
        for line, told in zip(cells, true, strict=True):
            line.append(share_cell(told.get("by_true_label"), told.get("intervals", {}).get("by_true_label")))
    for key, title in FINDERS.items():
        found = [row.results["poison"].get(key) for row in known]
        if any(found):
            names.append(title)
            for line, told in zip(cells, found, strict=True):
                line.append(_auroc(told) if told else MISSING)
    return Table(["model", *names], cells) if names else None


def _above(told: Mapping[str, Any]) -> Cell:
    difference, (low, high) = float(told["difference"]), told["interval"]
    if not math.isfinite(difference):
        raise ValueError("a difference is not finite")
    return Cell(points(difference), difference, f"[{points(low)}, {points(high)}]")


def _auroc(told: Mapping[str, Any]) -> Cell:
    value, (low, high) = float(told["auroc"]), told["interval"]
    if not math.isfinite(value):
        raise ValueError("an AUROC is not finite")
    return Cell(f"{value:.2f}", value, f"[{low:.2f}, {high:.2f}]")


def _classes(told: Mapping[str, Any]) -> Table | None:
    entries = told.get("per_class", [])
    rows = [
        [
            Cell(str(entry["class"])),
            Cell(str(entry["num_samples"]), entry["num_samples"]),
            share_cell(entry["attack_success_rate"], entry["intervals"]["attack_success_rate"]),
            share_cell(entry["accuracy_on_triggered"], entry["intervals"]["clean_accuracy"]),
        ]
        for entry in entries
    ]
    return Table(["class", "images", f"taken for {told['class']} %", "right %"], rows) if rows else None


def _epochs(told: Mapping[str, Any]) -> Table | None:
    entries = told.get("epochs", {})
    keys = {"clean_accuracy": "clean %", "attack_success_rate": "attack success %"}
    shown = {key: name for key, name in keys.items() if any(key in entry for entry in entries.values())}
    rows = [
        [Cell(f"{which} epoch ({entry['epoch']})"), *(Cell(percent(entry[key]), entry[key]) for key in shown)]
        for which, entry in entries.items()
    ]
    return Table(["weights", *shown.values()], rows) if rows else None


def _pictures(record: Mapping[str, NDArray[Any]]) -> list[tuple[str, str, str]]:
    if "shown_clean" not in record or record["shown_clean"].shape[1] not in (1, 3):
        return []
    made = []
    for clean, poisoned in zip(record["shown_clean"], record["shown_poisoned"], strict=True):
        levels = 128 + TIMES * (poisoned.astype(np.int16) - clean.astype(np.int16))
        made.append((picture(clean), picture(poisoned), picture(levels.clip(0, 255).astype(np.uint8))))
    return made
