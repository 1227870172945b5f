"""The figures of the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from dualhead.report.sources import Estimate, Measured
from dualhead.report.svg import LETTER, Drawing, ticks
from dualhead.report.text import percent, shortened, squeezed

WIDTH = 360.0
"""Width of every figure, in units: as wide as a phone, so that text stays readable there."""

Entry = tuple[Measured, Estimate]
"""A classifier, and the accuracy that a figure shows of it."""

SERIES = ("series1", "series2", "series3", "series4", "series5", "series6")
"""Classes of the colours of what is no output of a model: an output has a colour of its own, see `role_of`."""

MOST_CLASSES = 24
"""More classes than this are not drawn one by one."""


@dataclass(frozen=True)
class Figure:
    """A drawing with its words.

    Args:
        name: name of the file it is saved as.
        title: above it.
        svg: the drawing.
        caption: its content, and how to read it.
    """

    name: str
    title: str
    svg: Markup
    caption: str = ""


@dataclass(frozen=True)
class Series:
    """A line in a chart.

    Args:
        name: its name in the legend.
        style: class of its colour.
        points: x and y; a y that is not finite interrupts the line.
        band: lower and upper end at each x; None for none.
    """

    name: str
    style: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] | None = None


def slug(*words: str) -> str:
    """Return a file name of plain letters."""
    text = "-".join(words).lower()
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in text).strip("-")[:60]


# ---- bars


def bars(title: str, rows: Sequence[Entry]) -> Figure:
    """Draw accuracies of classifiers as bars, with their intervals.

    Args:
        title: the kind of accuracy.
        rows: the classifiers.
    """
    described = "; ".join(f"{row.title} {_with_interval(value)}" for row, value in rows)
    top, pitch, left, right = 6.0, 36.0, 6.0, WIDTH - 12
    drawing = Drawing(WIDTH, top + pitch * len(rows) + 26, f"Bars, {title} in percent: {described}")
    bottom = top + pitch * len(rows) + 4
    at = scale((0, 1), (left, right))
    vertical_grid(drawing, [0, 0.25, 0.5, 0.75, 1], at, top, bottom, lambda value: f"{100 * value:g}")
    for number, (row, value) in enumerate(rows):
        name = row.title
        y = top + pitch * number
        drawing.text(left, y + 12, squeezed(name, 30), "strong" if row.deployed else "", tip=name)
        drawing.text(right, y + 12, _with_interval(value), "numbers", "end")
        drawing.rectangle(left, y + 17, right - left, 11, "track")
        drawing.rectangle(
            left, y + 17, at(value.value) - left, 11, f"fill {row.role}", f"{name}: {_with_interval(value)}"
        )
        _whisker(drawing, at(value.low), at(value.high), y + 22.5)
    return Figure(slug(title), title, drawing.markup())


def _with_interval(value: Estimate) -> str:
    return f"{percent(value.value)} [{percent(value.low)}, {percent(value.high)}]"


def _whisker(drawing: Drawing, low: float, high: float, y: float) -> None:
    drawing.line(low, y, high, y, "whisker")
    for x in (low, high):
        drawing.line(x, y - 3.5, x, y + 3.5, "whisker")


# ---- lines


def lines(
    name: str,
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    share: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    caption: str = "",
    describe: str = "",
    x_ticks: Sequence[tuple[float, str]] = (),
) -> Figure:
    """Draw lines over a common axis.

    Args:
        name: name of the file.
        title: above it.
        series: the lines.
        x_label: below the axis.
        share: y is a fraction, drawn from 0 to 100 percent.
        marks: x and words of upright lines.
        caption: below it.
        describe: its content in words, for those who do not see it.
        x_ticks: places and words of the axis's marks; empty for round numbers.
    """
    legend, legend_height = _legend(series)
    left, right, top = 46.0, WIDTH - 14, legend_height + (20 if marks else 8)
    bottom = top + 170
    drawing = Drawing(WIDTH, bottom + 38, f"{title}. {describe}")
    for x, y, entry in legend:
        drawing.rectangle(x, y - 8, 12, 4, f"fill {entry.style}")
        drawing.text(x + 17, y, squeezed(entry.name, 48), tip=entry.name)
    xs = [x for entry in series for x, _ in entry.points]
    ys = [y for entry in series for _, y in entry.points if math.isfinite(y)]
    x_range = (min(xs, default=0), max(xs, default=1))
    y_range = (0.0, 1.0) if share else _padded(ys)
    at_x, at_y = scale(x_range, (left, right)), scale(y_range, (bottom, top))
    steps = [0, 0.2, 0.4, 0.6, 0.8, 1] if share else ticks(*y_range, 4)
    horizontal_grid(drawing, steps, at_y, left, right, lambda v: f"{100 * v:g}" if share else f"{v:.4g}")
    for x, words in x_ticks or [(x, f"{x:g}") for x in ticks(*x_range, 6) if x == int(x)]:
        drawing.text(min(at_x(x), WIDTH - 3 - LETTER * len(words) / 2), bottom + 15, words, "axis", "middle")
    drawing.text((left + right) / 2, bottom + 32, x_label, "axis", "middle")
    for number, (x, words) in enumerate(marks):
        drawing.line(at_x(x), top - 3, at_x(x), bottom, "mark" if number == 0 else "mark quiet")
        width = LETTER * len(words) / 2
        drawing.text(min(max(at_x(x), left + width), right - width), top - 8, words, "axis", "middle")
    for entry in series:
        _draw_series(drawing, entry, at_x, at_y, share=share)
    return Figure(name, title, drawing.markup(), caption)


def _draw_series(
    drawing: Drawing, entry: Series, at_x: Callable[[float], float], at_y: Callable[[float], float], *, share: bool
) -> None:
    if entry.band is not None:
        ends = [(at_x(x), at_y(low), at_y(high)) for (x, _), (low, high) in zip(entry.points, entry.band, strict=True)]
        outline = [(x, low) for x, low, _ in ends] + [(x, high) for x, _, high in reversed(ends)]
        drawing.path(outline, f"band {entry.style}")
    for piece in _pieces(entry.points):
        if len(piece) > 1:
            drawing.path([(at_x(x), at_y(y)) for x, y in piece], f"curve {entry.style}")
    seen = [(x, y) for x, y in entry.points if math.isfinite(y)]
    if len(seen) <= 60:
        for x, y in seen:
            tip = f"{entry.name}, {x:g}: {percent(y) if share else f'{y:.4g}'}"
            drawing.circle(at_x(x), at_y(y), 2.4, f"fill {entry.style}", tip)


def _pieces(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    return pieces


def _legend(series: Sequence[Series]) -> tuple[list[tuple[float, float, Series]], float]:
    """Place the entries of the legend, and return its height."""
    places, x, y = [], 6.0, 14.0
    for entry in series:
        width = 17 + LETTER * len(squeezed(entry.name, 48)) + 14
        if x > 6 and x + width > WIDTH:
            x, y = 6.0, y + 18
        places.append((x, y, entry))
        x += width
    return places, y + 8


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min([0.0, *values]), max(values, default=1.0)
    return low, high * 1.05 if high > low else low + 1.0


# ---- classes


def classes(title: str, entries: Sequence[tuple[str, Estimate, Estimate]], caption: str = "") -> Figure:
    """Draw clean and attacked accuracy of classes, a line each.

    Args:
        title: above it.
        entries: class, clean and attacked accuracy.
        caption: below it.
    """
    left, right, top, pitch = 110.0, WIDTH - 14, 30.0, 20.0
    bottom = top + pitch * len(entries)
    told = "; ".join(f"{name}: {percent(a.value)}, {percent(b.value)}" for name, a, b in entries)
    drawing = Drawing(WIDTH, bottom + 24, f"{title}, clean and attacked accuracy in percent. {told}")
    drawing.circle(12, 12, 4.5, "ring ink")
    drawing.text(22, 16, "clean")
    drawing.circle(74, 12, 4.5, "fill series1")
    drawing.text(84, 16, "attacked, with 95 % interval")
    at = scale((0, 1), (left, right))
    vertical_grid(drawing, [0, 0.25, 0.5, 0.75, 1], at, top - 4, bottom, lambda value: f"{100 * value:g}")
    for number, (name, clean, robust) in enumerate(entries):
        y = top + pitch * number + pitch / 2
        drawing.text(left - 10, y + 4, shortened(name, 13), "", "end", tip=name)
        drawing.line(at(robust.low), y, at(robust.high), y, "wide series1")
        drawing.line(at(robust.value), y, at(clean.value), y, "join")
        drawing.circle(at(clean.value), y, 4.5, "ring ink", f"{name}, clean: {_with_interval(clean)}")
        drawing.circle(at(robust.value), y, 4.5, "fill series1", f"{name}, attacked: {_with_interval(robust)}")
    return Figure(slug(title), title, drawing.markup(), caption)


def confusion(title: str, counts: NDArray[np.int64], names: Sequence[str], caption: str = "") -> Figure:
    """Draw which class an attack turns into which.

    Args:
        title: above it.
        counts: int64 [C, C], by label and prediction.
        names: names of the classes.
        caption: below it.
    """
    count = len(names)
    left, top = 88.0, 12.0
    cell = min((WIDTH - left - 8) / count, 40.0)
    bottom = top + cell * count
    below = [shortened(name, 10) for name in names]
    longest = max(map(len, below))
    room = 22 if longest < 3 else 14 + LETTER * longest
    drawing = Drawing(WIDTH, bottom + room, f"{title}: {_told(counts, names)}")
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    for row, name in enumerate(names):
        drawing.text(left - 6, top + cell * (row + 0.5) + 4, shortened(name, 11), "axis", "end", tip=name)
        for column, other in enumerate(names):
            share, number = float(shares[row, column]), int(counts[row, column])
            place = (left + cell * column, top + cell * row, cell - 1, cell - 1)
            drawing.rectangle(*place, "track")
            style = "fill ok" if row == column else "fill alarm"
            opacity = f"{share**0.6:.2f}"
            tip = f"{name} taken for {other}: {number} of {int(counts[row].sum())}"
            drawing.rectangle(*place, style, tip, opacity)
            if number and cell >= 22:
                style = "cell dense" if share > 0.45 else "cell"
                drawing.text(left + cell * (column + 0.5), top + cell * (row + 0.5) + 4, str(number), style, "middle")
    for column, name in enumerate(names):
        if longest < 3:
            drawing.text(left + cell * (column + 0.5), bottom + 15, below[column], "axis", "middle", tip=name)
        else:
            drawing.upright(left + cell * (column + 0.5) + 4, bottom + 6, below[column], "axis", tip=name)
    return Figure(slug(title), title, drawing.markup(), caption)


def _told(counts: NDArray[np.int64], names: Sequence[str]) -> str:
    return "; ".join(f"{name} taken for {other}: {number}" for name, other, number in confusions(counts, names, 10))


def confusions(counts: NDArray[np.int64], names: Sequence[str], most: int) -> list[tuple[str, str, int]]:
    """Return the most frequent mistakes: label, prediction and how often."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [(int(flat) // len(names), int(flat) % len(names)) for flat in order]
    return [(names[a], names[b], int(wrong[a, b])) for a, b in pairs if wrong[a, b]]


# ---- clean against robust


def scatter(title: str, rows: Sequence[Entry]) -> Figure:
    """Draw clean against robust accuracy with intervals, and the classifiers that no other one beats in both.

    Args:
        title: above it.
        rows: the classifiers with their robust accuracy.
    """
    front = pareto([(row.clean.value, robust.value) for row, robust in rows])
    left, right, top, bottom = 50.0, WIDTH - 14, 26.0, 300.0
    legend = bottom + 56
    told = "; ".join(f"{r.title}: clean {percent(r.clean.value)}, robust {percent(e.value)}" for r, e in rows)
    best = ", ".join(rows[number][0].title for number in front)
    drawing = Drawing(WIDTH, legend + 19 * len(rows), f"{title} in percent. {told}. Pareto front: {best}")
    x_range = _around(_that_matter([row.clean for row, _ in rows]))
    y_range = _around(_that_matter([robust for _, robust in rows]))
    at_x = _within(scale(x_range, (left, right)), (left, right))
    at_y = _within(scale(y_range, (bottom, top)), (bottom, top))
    horizontal_grid(drawing, ticks(*y_range, 5), at_y, left, right, lambda value: f"{100 * value:g}")
    for x in ticks(*x_range, 5):
        drawing.line(at_x(x), top, at_x(x), bottom, "grid")
        drawing.text(at_x(x), bottom + 15, f"{100 * x:g}", "axis", "middle")
    drawing.text((left + right) / 2, bottom + 31, "clean accuracy, percent", "axis", "middle")
    drawing.text(6, 12, "robust accuracy, percent", "axis")
    steps = [(at_x(rows[n][0].clean.value), at_y(rows[n][1].value)) for n in front]
    outline = [(left, steps[0][1])] + [p for a, b in pairwise(steps) for p in (a, (a[0], b[1]))]
    drawing.path([*outline, steps[-1], (steps[-1][0], bottom)], "front")
    for row, robust in rows:
        x, y = at_x(row.clean.value), at_y(robust.value)
        drawing.line(at_x(row.clean.low), y, at_x(row.clean.high), y, f"thin {row.role}")
        drawing.line(x, at_y(robust.low), x, at_y(robust.high), f"thin {row.role}")
        drawing.circle(x, y, 2.5, f"fill {row.role}")
    centres = _apart([(at_x(row.clean.value), at_y(robust.value)) for row, robust in rows])
    for number, ((row, robust), (x, y)) in enumerate(zip(rows, centres, strict=True), 1):
        name = row.title
        tip = f"{name}: clean {_with_interval(row.clean)}, robust {_with_interval(robust)}"
        drawing.circle(x, y, 9, f"fill {row.role} edged", tip)
        drawing.text(x, y + 4, str(number), "inside", "middle")
        if robust.value < y_range[0]:
            drawing.text(x + 12, y + 4, "\N{DOWNWARDS ARROW}", "axis")
        if row.clean.value < x_range[0]:
            drawing.text(x + 12, y - 6, "\N{LEFTWARDS ARROW}", "axis")
        place = legend + 19 * (number - 1)
        drawing.circle(16, place - 4, 8, f"fill {row.role}")
        drawing.text(16, place, str(number), "inside", "middle")
        words = f"{squeezed(name, 33)}: {percent(row.clean.value)} / {percent(robust.value)}"
        drawing.text(32, place, words, "strong" if number - 1 in front else "", tip=name)
    caption = (
        "Crosses are the values with their 95 % intervals; numbers that would hide one another stand beside. The "
        "dashed line is the Pareto front; models on it, in bold, are beaten by no other "
        "in both accuracies. Points whose intervals overlap may change places on other images."
    )
    if any(row.clean.value < x_range[0] or robust.value < y_range[0] for row, robust in rows):
        caption += " An arrow marks what lies far beyond the axes."
    return Figure(slug(title), title, drawing.markup(), caption)


def _apart(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Place numbered discs beside one another: a disc that would hide an earlier one moves to the nearest gap."""
    placed: list[tuple[float, float]] = []
    for x, y in points:
        turns = [(math.tau * turn / 8, 19.0 * ring) for ring in range(1, 6) for turn in range(8)]
        gaps = [(x, y), *((x + reach * math.cos(angle), y - reach * math.sin(angle)) for angle, reach in turns)]
        free = (gap for gap in gaps if all(math.dist(gap, other) >= 18 for other in placed))
        placed.append(next(free, (x, y)))
    return placed


def pareto(values: Sequence[tuple[float, float]]) -> list[int]:
    """Find the points that no other one beats, i.e. reaches in both and exceeds in one; sorted by the first value."""
    kept = [
        number
        for number, (x, y) in enumerate(values)
        if not any(a >= x and b >= y and (a > x or b > y) for a, b in values)
    ]
    return sorted(kept, key=lambda number: values[number])


def _that_matter(values: Sequence[Estimate]) -> list[float]:
    """Ends of the intervals of values that reach half the best; others would leave no room for their differences."""
    half = max(value.value for value in values) / 2
    return [end for value in values if value.value >= half for end in (value.low, value.high)]


def _within(at: Callable[[float], float], places: tuple[float, float]) -> Callable[[float], float]:
    """The same, but for what lies beyond two places: it stands at the nearer one."""
    low, high = sorted(places)
    return lambda value: min(max(at(value), low), high)


def _around(ends: Sequence[float]) -> tuple[float, float]:
    low, high = min(ends), max(ends)
    margin = max(0.08 * (high - low), 0.005)
    return low - margin if low - margin > -0.05 else -0.05, min(high + margin, 1.03)


# ---- axes


def scale(values: tuple[float, float], places: tuple[float, float]) -> Callable[[float], float]:
    """Return the straight line that takes a range of values to a range of places."""
    (low, high), (start, end) = values, places
    span = (high - low) or 1.0

    def at(value: float) -> float:
        return start + (value - low) / span * (end - start)

    return at


def vertical_grid(
    drawing: Drawing,
    values: Sequence[float],
    at: Callable[[float], float],
    top: float,
    bottom: float,
    words: Callable[[float], str],
) -> None:
    """Draw upright lines at values, with words below."""
    for value in values:
        drawing.line(at(value), top, at(value), bottom, "grid")
        drawing.text(at(value), bottom + 14, words(value), "axis", "middle")


def horizontal_grid(
    drawing: Drawing,
    values: Sequence[float],
    at: Callable[[float], float],
    left: float,
    right: float,
    words: Callable[[float], str],
) -> None:
    """Draw level lines at values, with words to the left."""
    for value in values:
        drawing.line(left, at(value), right, at(value), "grid")
        drawing.text(left - 6, at(value) + 4, words(value), "axis", "end")
