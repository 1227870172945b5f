"""The rows of a run as a small table, for a terminal or a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dualhead.report.lights import light_lines
from dualhead.report.poisoning import poison_columns
from dualhead.report.sources import measured_in


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
    return list(light_lines([(row["name"], row.get("checks", [])) for row in rows]))


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    attacks = list(dict.fromkeys(name for row in rows for name in row["robust_accuracy"] if name != "worst"))
    shown = [*attacks, "worst"] if len(attacks) > 1 else attacks
    poisoned = poison_columns(rows)
    worn = list(dict.fromkeys(name for row in rows for name in measured_in(row)))
    lines = [["model, accuracy in %", "clean", *shown, *worn, *poisoned]]
    for number, row in enumerate(rows):
        ends = row["intervals"]
        robust = [
            _percent(row["robust_accuracy"][name], ends[name]) if name in row["robust_accuracy"] else "-"
            for name in shown
        ]
        told = [row.get(name) for name in worn]
        robust += [_percent(each["accuracy"], each["interval"]) if each else "-" for each in told]
        shares = (column[number] for column in poisoned.values())
        robust += ["-" if share is None else _percent(*share) for share in shares]
        lines.append([row["name"], _percent(row["clean_accuracy"], ends["clean_accuracy"]), *robust])
    return lines


def _percent(share: float, ends: Sequence[float]) -> str:
    return f"{100 * share:.1f} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"
