"""Calibration on clean images: a table of all classifiers, and reliability diagrams of the main ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dualhead.report.figures import WIDTH, Figure, horizontal_grid, scale, slug, vertical_grid
from dualhead.report.sources import Measured
from dualhead.report.svg import Drawing
from dualhead.report.table import Cell, Table
from dualhead.report.text import percent, points
from dualhead.statistics import wilson

MOST_DIAGRAMS = 6
"""Diagrams of a page."""
SIDE = 270.0
"""Side of a diagram's square."""
LARGEST = 11.0
"""Radius of a disc that holds all images."""


@dataclass(frozen=True)
class Bin:
    """Images of which a classifier is about equally sure.

    Args:
        confidence: mean probability of the predicted class, in [0, 1].
        accuracy: share of them that is right.
        images: how many there are, at least 1.
    """

    confidence: float
    accuracy: float
    images: int


@dataclass(frozen=True)
class Calibration:
    """A classifier's expected calibration error on clean images, in [0, 1], and the bins that it is a mean over."""

    error: float
    bins: list[Bin]

    @property
    def confidence(self) -> float:
        """Mean probability of the predicted class over all images."""
        return sum(of.confidence * of.images for of in self.bins) / sum(of.images for of in self.bins)


def calibration_of(row: Measured) -> Calibration | None:
    """Return what `results.json` holds of it; None where it was not measured or cannot be read."""
    told: Any = row.results.get("calibration")
    try:
        bins = [Bin(float(of["confidence"]), float(of["accuracy"]), int(of["images"])) for of in told["bins"]]
        found = Calibration(float(told["error"]), bins)
    except (KeyError, TypeError, ValueError):
        return None
    shares = (found.error, *(share for of in bins for share in (of.confidence, of.accuracy)))
    sound = bins and all(of.images > 0 for of in bins) and all(0 <= share <= 1 for share in shares)
    return found if sound else None


def calibration_table(rows: Sequence[Measured]) -> Table | None:
    """Return error, mean confidence and accuracy of every classifier that has them; None where none has."""
    cells = []
    for row in rows:
        if found := calibration_of(row):
            gap = found.confidence - row.clean.value
            cells.append([
                Cell(row.title),
                Cell(f"{100 * found.error:.1f}", found.error),
                Cell(percent(found.confidence), found.confidence),
                Cell(percent(row.clean.value), row.clean.value),
                Cell(points(gap), gap),
            ])  # fmt: skip
    columns = ["model", "error, points", "confidence %", "clean %", "confidence less clean, points"]
    return Table(columns, cells) if cells else None


def reliability_diagrams(rows: Sequence[Measured]) -> list[Figure]:
    """Return a diagram of each classifier of a run; of several runs, of the deployed ones."""
    known = [(row, found) for row in rows if (found := calibration_of(row))]
    if len({row.run for row, _ in known}) > 1:
        known = [(row, found) for row, found in known if row.deployed]
    return [_diagram(row, found) for row, found in known[:MOST_DIAGRAMS]]


def _diagram(row: Measured, found: Calibration) -> Figure:
    left, top = 50.0, 26.0
    right, bottom = left + SIDE, top + SIDE
    told = "; ".join(
        f"confidence {percent(of.confidence)}, accuracy {percent(of.accuracy)}, images {of.images:,}"
        for of in found.bins
    )
    error = f"error {100 * found.error:.1f} points"
    drawing = Drawing(WIDTH, bottom + 40, f"Reliability of {row.title} on clean images, in percent: {error}. {told}")
    at_x, at_y = scale((0, 1), (left, right)), scale((0, 1), (bottom, top))
    quarters = [0, 0.25, 0.5, 0.75, 1]
    vertical_grid(drawing, quarters, at_x, top, bottom, lambda value: f"{100 * value:g}")
    horizontal_grid(drawing, quarters, at_y, left, right, lambda value: f"{100 * value:g}")
    drawing.line(left, bottom, right, top, "mark")
    drawing.text(6, 12, "accuracy, percent", "axis")
    drawing.text(right, 12, error, "numbers", "end")
    drawing.text((left + right) / 2, bottom + 32, "confidence, percent", "axis", "middle")
    images = sum(of.images for of in found.bins)
    for of in found.bins:
        x = at_x(of.confidence)
        low, high = wilson(round(of.accuracy * of.images), of.images)
        drawing.line(x, at_y(low), x, at_y(high), f"thin {row.role}")
        radius = max(2.8, LARGEST * math.sqrt(of.images / images))
        tip = (
            f"{of.images:,} images: confidence {percent(of.confidence)}, accuracy {percent(of.accuracy)} "
            f"[{percent(low)}, {percent(high)}]"
        )
        drawing.circle(x, at_y(of.accuracy), radius, f"fill {row.role} edged", tip)
    return Figure(slug("reliability", row.title), row.title, drawing.markup())
