"""Threats one after another, as tables and pictures show them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dualhead.report.figures import SERIES, WIDTH, Figure, Series, lines, slug
from dualhead.report.sources import Source
from dualhead.report.svg import Drawing
from dualhead.report.table import Cell, Table, share_cell
from dualhead.report.text import large, percent, points, shortened

SHARES: Final = {"union": "union", "average_seen": "average seen", "average_all": "average all"}
DIFFERENCES: Final = {
    "forgetting": "forgetting",
    "backward_transfer": "backward transfer",
    "plasticity": "plasticity",
    "clean_drop": "clean drop",
    "union_forgetting": "union forgetting",
}
"""Measures of `results.json` by their keys, as tables call them: shares in percent, and differences in points."""
OLD: Final = {
    "kept": "Attacks of threats that had been learnt before were kept, and training used them.",
    "lost": "Attacks of threats that had been learnt before were lost: no later stage used them.",
    "all known": "All threats were known from the start: a bound, and no sequence.",
}


def sequence_cells(told: Mapping[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """Return columns and one line of cells for each stage.

    Args:
        told: as `results.json` holds it under `sequence`.
    """
    threats = [str(name) for name in told["threats"]]
    rows: Sequence[Mapping[str, Any]] = told["rows"]
    forward = {"forward_transfer": "forward transfer"} if any(_is(row, "forward_transfer") for row in rows) else {}
    shares = {**SHARES, **forward}
    differences = {key: name for key, name in DIFFERENCES.items() if any(_is(row, key) for row in rows)}
    columns = ["after stage", "old attacks", "clean %", *(f"{name} %" for name in (*threats, *shares.values())),
               *differences.values(), "passes"]  # fmt: skip
    cells = []
    for row in rows:
        robust, ends = row["robust_accuracy"], row["intervals"]
        cells.append([
            Cell(str(row["stage"])), Cell(row["old_attacks"] or "-"),
            share_cell(row["clean_accuracy"], ends["clean_accuracy"]),
            *(share_cell(robust[name], ends[name]) for name in threats),
            *(share_cell(row.get(key), ends.get(key)) for key in shares),
            *(_difference(row.get(key)) for key in differences),
            Cell(large(row["training_cost"]["forward_equivalents"]), row["training_cost"]["forward_equivalents"]),
        ])  # fmt: skip
    return columns, cells


def _is(row: Mapping[str, Any], key: str) -> bool:
    return isinstance(row.get(key), int | float)


def _difference(value: float | None) -> Cell:
    return Cell("-", -math.inf) if value is None else Cell(points(value), value)


@dataclass(frozen=True)
class Course:
    """The page's section on threats one after another.

    Args:
        old: whether old attacks were used.
        table: a line for each stage.
        figures: the matrix, and its course.
    """

    old: str
    table: Table
    figures: list[Figure]


def section(source: Source, notes: list[str]) -> Course | None:
    """Return what the page says of a run's sequence; None if it has none, or what lies there cannot be read.

    Args:
        source: the run.
        notes: gets a sentence if it cannot be read.
    """
    row = source.deployed
    told = row.results.get("sequence") if row is not None else None
    if told is None:
        return None
    try:
        columns, cells = sequence_cells(told)
        drawn = [matrix(source.label, told), course(source.label, told)]
        return Course(OLD.get(told["old_attacks"], ""), Table(columns, cells), drawn)
    except (KeyError, TypeError, ValueError, AttributeError):
        notes.append("What was measured of threats one after another cannot be read.")
        return None


def matrix(label: str, told: Mapping[str, Any]) -> Figure:
    """Draw robust accuracy after each stage, down, under each threat, across; a frame marks where one was learnt.

    Args:
        label: of the run.
        told: as `results.json` holds it under `sequence`.
    """
    threats, rows = [str(name) for name in told["threats"]], told["rows"]
    names = ["clean", *threats, "union"]
    left, top, right = 96.0, 26.0, WIDTH - 6
    width, height = (right - left) / len(names), 30.0
    described = "; ".join(
        f"after {row['stage']}: {', '.join(f'{n} {percent(_of(row, n))}' for n in names)}" for row in rows
    )
    drawing = Drawing(WIDTH, top + height * len(rows) + 8, f"Robust accuracy in percent. {described}")
    for number, name in enumerate(names):
        drawing.text(left + width * (number + 0.5), 16, shortened(name, int(width / 7)), "axis", "middle", tip=name)
    for line, row in enumerate(rows):
        y = top + height * line
        drawing.text(left - 8, y + 19, shortened(str(row["stage"]), 13), "axis", "end", tip=str(row["stage"]))
        for number, name in enumerate(names):
            share, x = _of(row, name), left + width * number
            drawing.rectangle(x, y, width - 2, height - 2, "track")
            style = "fill series2" if name == "clean" else "fill series1"
            tip = f"after {row['stage']}, {name}: {percent(share)} %"
            drawing.rectangle(x, y, width - 2, height - 2, style, tip, f"{share:.2f}")
            style = "cell dense" if share > 0.6 else "cell"
            mark = "*" if told["arrived"].get(name) == row["stage"] else ""
            drawing.text(x + width / 2 - 1, y + 19, percent(share) + mark, style, "middle")
    caption = "Percent of test images, * after the stage that first trained against the threat. " + OLD.get(
        told["old_attacks"], ""
    )
    return Figure(slug("sequence", label), "After each stage, under each threat", drawing.markup(), caption)


def course(label: str, told: Mapping[str, Any]) -> Figure:
    """Draw how robust accuracy under each threat goes from stage to stage.

    Args:
        label: of the run.
        told: as `results.json` holds it under `sequence`.
    """
    rows = told["rows"]
    names = [*(str(name) for name in told["threats"]), "union"]
    series = [
        Series(
            name,
            SERIES[number % len(SERIES)],
            [(float(n), _of(row, name)) for n, row in enumerate(rows, 1)],
            [(row["intervals"][name][0], row["intervals"][name][1]) for row in rows],
        )
        for number, name in enumerate(names)
    ]
    stages = [(float(n), shortened(str(row["stage"]), 12)) for n, row in enumerate(rows, 1)]
    return lines(
        slug("course", label), "From stage to stage", series, x_label="after stage", share=True, x_ticks=stages,
        caption="Robust accuracy with 95 % intervals (Wilson).",
        describe="; ".join(f"{s.name}: {', '.join(percent(y) for _, y in s.points)}" for s in series),
    )  # fmt: skip


def _of(row: Mapping[str, Any], name: str) -> float:
    if name in ("clean", "union"):
        return float(row["clean_accuracy" if name == "clean" else "union"])
    return float(row["robust_accuracy"][name])


def sequence_text(told: Mapping[str, Any]) -> str:
    """Return the matrix and the measures as plain text, a line for each stage.

    Args:
        told: as `results.json` holds it under `sequence`.
    """
    columns, cells = sequence_cells(told)
    grid = [columns, *([cell.text for cell in row] for row in cells)]
    widths = [max(len(line[place]) for line in grid) for place in range(len(columns))]
    made = ["  ".join(map(str.rjust, line, widths)) for line in grid]
    return "\n".join([OLD.get(told["old_attacks"], ""), *made]).strip("\n")
