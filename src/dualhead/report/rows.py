"""The rows of a run as a small table, for a terminal or a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

from dualhead.report.lights import light_lines
from dualhead.report.sources import measured_in
from dualhead.report.table import Cell, accuracy_columns

SHOWN: Final = ("balanced_accuracy", "class_sizes", "poison", "transfer")
"""What tables show of results beside accuracies and measurements, where it is there."""


def evaluation_row(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of an evaluation, as `comparison.json` holds rows, as far as tables need it.

    Args:
        name: of the row.
        results: the content of `results.json`.
    """
    found = {key: results[key] for key in ("clean_accuracy", "robust_accuracy", "intervals")}
    more = {key: results[key] for key in SHOWN if key in results}
    return {"name": name, **found, **measured_in(results), **more}


def rows_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return accuracies in percent with their 95 % intervals, a line a row, below failed and warning checks.

    Args:
        rows: as `comparison.json` holds them.
    """
    cells = _cells(rows)
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells]
    return "\n".join([*_lights(rows), *lines])


def rows_html(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what `rows_text` does, as HTML."""
    head, *body = _cells(rows)
    above = "".join(f"<p>{escape(line)}</p>" for line in _lights(rows))
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in body]
    return f"{above}<table>{''.join(lines)}</table>"


def _lights(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    alone = len(rows) == 1  # then nobody asks whose check it is
    return list(light_lines([("" if alone else row["name"], row.get("checks", [])) for row in rows]))


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    columns = {"model, accuracy in %": [Cell(row["name"]) for row in rows], **accuracy_columns(rows)}
    return [list(columns), *([cell.whole() for cell in line] for line in zip(*columns.values(), strict=True))]
