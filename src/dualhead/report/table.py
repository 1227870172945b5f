"""Tables, the cell of a share with its interval, and the columns that every table of accuracies has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from dualhead.report.sources import MEANS, Estimate, Measured, measured_in
from dualhead.report.text import percent, unequal


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Args:
        text: what it shows.
        order: what it is sorted by; None: its text.
        note: in small print behind it.
    """

    text: str
    order: float | None = None
    note: str = ""

    def whole(self, gap: str = " ") -> str:
        """Return the text with its note, where small print and sorting are not to be had."""
        return f"{self.text}{gap}{self.note}" if self.note else self.text


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        columns: their names.
        rows: a cell for each column.
    """

    columns: list[str]
    rows: list[list[Cell]]


MISSING: Final = Cell("-", -1.0)
"""Stands where nothing was measured; sorted below all that was."""


def share_cell(value: float | None, ends: Sequence[float] | None = None) -> Cell:
    """Return a share in percent, with its interval if there is one; `MISSING` for None.

    Raises:
        ValueError: if a number is not finite.
    """
    if value is None:
        return MISSING
    if not all(map(math.isfinite, (value, *(ends or ())))):
        raise ValueError(f"a share or its interval is not finite: {value}, {ends}")
    return Cell(percent(value), value, f"[{percent(ends[0])}, {percent(ends[1])}]" if ends else "")


def estimate_cell(value: Estimate | None) -> Cell:
    """Return what `share_cell` does of an estimate."""
    return MISSING if value is None else share_cell(value.value, (value.low, value.high))


def accuracy_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Cell]]:
    """Return the columns of a table of accuracies in percent, by name a cell for each row.

    They are clean accuracy; robust accuracy under each attack, and `worst` where a row faced several; each measurement
    of changed images, such as `corruptions`; `transfer`; balanced accuracy where classes differ in size; and what
    poisoned data add. Of these, a table has those of which some row knows something.

    Args:
        rows: as `comparison.json` holds them; those of earlier versions know less.
    """
    columns = {"clean": [share_cell(row["clean_accuracy"], row["intervals"]["clean_accuracy"]) for row in rows]}
    attacks = [[name for name in row["robust_accuracy"] if name != "worst"] for row in rows]
    worst = ["worst"] if any(len(faced) > 1 for faced in attacks) else []
    for name in dict.fromkeys([*chain(*attacks), *worst]):
        columns[name] = [share_cell(row["robust_accuracy"].get(name), row["intervals"].get(name)) for row in rows]
    transfer = ["transfer"] if any(row.get("transfer") for row in rows) else []
    for name in dict.fromkeys([*chain(*map(measured_in, rows)), *transfer]):
        told = [row.get(name) or {} for row in rows]
        columns[name] = [share_cell(each.get("accuracy"), each.get("interval")) for each in told]
    for title, name in balanced_columns(rows).items():
        columns[title] = [share_cell(row.get("balanced_accuracy", {}).get(name)) for row in rows]
    return columns | poison_columns(rows)


def described(row: Measured) -> dict[str, Any]:
    """Return a classifier as `comparison.json` holds it, but for its poison, which has a section of its own.

    Of files that may be damaged: what cannot be read is left out.
    """
    told: dict[str, Any] = {
        "name": row.name,
        "clean_accuracy": row.clean.value,
        "robust_accuracy": {name: found.value for name, found in row.robust.items()},
        "intervals": {"clean_accuracy": _ends(row.clean), **{name: _ends(found) for name, found in row.robust.items()}},
    }
    for name, found in row.worn.items():
        facts = {key: value for key, value in row.results[name].items() if key not in MEANS}
        kinds = {kind: _share(of) for kind, of in row.worn_kinds(name).items()}
        told[name] = {**facts, **_share(found), "kinds": kinds}
    if row.transferred:
        told["transfer"] = _share(row.transferred)
    return told | _balanced(row.results)


def _ends(found: Estimate) -> list[float]:
    return [found.low, found.high]


def _share(found: Estimate) -> dict[str, Any]:
    return {"accuracy": found.value, "interval": _ends(found)}


def _balanced(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return balanced accuracies and the sizes of the classes, as far as they can be read."""
    try:
        means = {name: float(share) for name, share in results["balanced_accuracy"].items()}
        sizes = [int(size) for size in results["class_sizes"]]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return {}
    return {"balanced_accuracy": means, "class_sizes": sizes} if all(map(math.isfinite, means.values())) else {}


def page_table(first: Mapping[str, Sequence[Cell]], columns: Mapping[str, Sequence[Cell]]) -> Table:
    """Return a table of the page: columns that say which row it is, then accuracies, whose names say percent."""
    rows = zip(*first.values(), *columns.values(), strict=True)
    return Table([*first, *(f"{name} %" for name in columns)], [list(row) for row in rows])


def balanced_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the further columns of a table in which some row's classes are unequal, and the accuracies they show.

    Args:
        rows: as `comparison.json` holds them; those of earlier versions know nothing of it.
    """
    if not any(unequal(row.get("class_sizes")) for row in rows):
        return {}
    return {"balanced clean": "clean", "balanced robust": "worst"}


def poison_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Cell]]:
    """Return the columns that poisoned data add to a table, by name a cell for each row.

    They are `attack success` (triggered images of other classes that are taken for the target), `robust, triggered` (by
    true label), and `learnt by heart` (poisoned training images that get the label they were given).

    Args:
        rows: each with `poison` as `results.json` holds it, or without.
    """
    columns: dict[str, list[Cell]] = {"attack success": [], "robust, triggered": [], "learnt by heart": []}
    for row in rows:
        told = row.get("poison") or {}
        ends, robust, training = (
            told.get(key, {}) for key in ("intervals", "robust_accuracy_on_triggered", "training")
        )
        worst = "worst" if "worst" in robust else next(iter(robust), "")
        by_heart = training.get("intervals", {}).get("by_given_label")
        columns["attack success"].append(share_cell(told.get("attack_success_rate"), ends.get("attack_success_rate")))
        columns["robust, triggered"].append(share_cell(robust.get(worst), ends.get(worst)))
        columns["learnt by heart"].append(share_cell(training.get("by_given_label"), by_heart))
    return {name: cells for name, cells in columns.items() if any(cell is not MISSING for cell in cells)}
