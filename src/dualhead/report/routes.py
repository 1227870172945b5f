"""Routes of tied heads, as tables read them: each a classifier of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from dualhead.report.sources import Source
from dualhead.report.table import MISSING, Cell, Table, accuracy_columns, page_table, share_cell

WARNING: Final = (
    "Clean accuracy of one route beside robust accuracy of another is a pair of classifiers, and no defence: whoever "
    "knows which images are attacked needs no robust one. A claim is one route, or a merging rule attacked as a whole."
)
KINDS: Final = {
    "mean": "distance of means, in deviations",
    "log_sigma": "|log| of the ratio of deviations",
    "weight": "difference of weights",
    "bias": "difference of biases",
}
"""Distances between two routes, as the report calls them; others stand under their own names."""


def route_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each classifier in `routes.json`, as `comparison.json` holds them.

    Args:
        found: its content.
    """
    rows = []
    for name, route in found.get("routes", {}).items():
        rows.append({**route, "name": _called(name, found)})
    rows += [{**merged, "name": f"merged: {name}"} for name, merged in found.get("merged", {}).items()]
    rows += [{**point, "name": f"between, t = {point['t']:g}"} for point in found.get("curve", [])]
    return rows


def _called(name: str, found: Mapping[str, Any]) -> str:
    roles = {found.get("clean"): "clean", found.get("robust"): "robust"}
    if name in roles:
        return f"{roles[name]} route ({name})"
    parts = dict(part.split("-", 1) for part in name.split("_") if "-" in part)
    if set(parts) == {"statistics", "affine"}:
        return f"{roles.get(parts['statistics'], parts['statistics'])} statistics, " + (
            f"{roles.get(parts['affine'], parts['affine'])} affine"
        )
    return name


@dataclass(frozen=True)
class Routes:
    """The page's section on the routes of a run.

    Args:
        folder: of the evaluation.
        accuracy: each route, merging and point in between, as the classifier that it is; None if none was measured.
        transfer: see `transfer_table`.
        gaps: see `gap_table`.
        samples: how many test images.
        warning: what must not be concluded.
    """

    folder: str
    accuracy: Table | None
    transfer: Table | None
    gaps: Table | None
    samples: str
    warning: str = WARNING


def sections(source: Source, notes: list[str]) -> list[Routes]:
    """Return a section for each `routes.json` of a run; one that cannot be read is noted."""
    made = []
    for folder, found in source.routes.items():
        try:
            rows = route_rows(found)
            named = {"classifier": [Cell(row["name"]) for row in rows]}
            table = page_table(named, accuracy_columns(rows)) if rows else None
            made.append(Routes(folder, table, transfer_table(found), gap_table(found), str(found.get("num_samples"))))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration):
            notes.append(f"evaluations/{folder}/routes.json cannot be read; it is left out.")
    return made


def transfer_table(found: Mapping[str, Any]) -> Table | None:
    """Return accuracy of each route on images made against each other one; None if it was not measured."""
    rows = found.get("transfer", {}).get("accuracy", {})
    if not rows:
        return None
    judges = list(next(iter(rows.values())))
    cells = [
        [
            Cell(_called(against, found)),
            *(share_cell(row[judge]["accuracy"], row[judge]["interval"]) for judge in judges),
        ]
        for against, row in rows.items()
    ]
    return Table(["made against", *(f"{_called(judge, found)} %" for judge in judges)], cells)


def gap_table(found: Mapping[str, Any]) -> Table | None:
    """Return how far the routes are apart, a row a layer, each number the median over channels; None if not measured.

    Beside what is stored stands what clean and attacked images differ by under the tensors of each route.
    """
    gaps = found.get("gaps", {})
    stored = gaps.get("stored", {}).get("summary", {})
    images = gaps.get("images", {})
    columns = {f"stored: {KINDS.get(kind, kind)}": by_layer for kind, by_layer in stored.items()}
    for head, told in images.items():
        columns |= {f"images through {head}: {KINDS[k]}": v for k, v in told["summary"].items() if k in KINDS}
    layers = list(dict.fromkeys(layer for by_layer in columns.values() for layer in by_layer))
    if not layers:
        return None
    cells = [[Cell(layer), *(_number(by_layer.get(layer)) for by_layer in columns.values())] for layer in layers]
    return Table(["layer", *columns], cells)


def _number(value: float | None) -> Cell:
    if value is None or not math.isfinite(value):
        return MISSING
    return Cell(f"{value:.3g}", value)
