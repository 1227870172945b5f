"""Draw the figures of README and docs, and write the tables of measured results as CSV.

    python tools/make_figures.py                            # docs/images/*.svg and docs/results/*.csv
    python tools/make_figures.py --screenshots runs/demo    # docs/images/*.png, of what `dualhead demo` left

All numbers come from `benchmarks/results/strongest.json`, those of the frontier from `frontier.json` beside it, of
poisoned data from `poisoning.json`, of many threats from `threats.json` and of threats one after another from
`continual.json`; without these they are not drawn. The figures are plain SVG, so that nothing has to be installed and
the same numbers give the same bytes. The screenshots need playwright and a Chromium of the system.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "strongest.json"
FRONTIER = RESULTS.with_name("frontier.json")
POISONING = RESULTS.with_name("poisoning.json")
Line = tuple[Mapping[str, Any] | None, str]
"""Mean and interval over seeds, in shares, and a colour; None while nothing is measured."""
IMAGES, TABLES = ROOT / "docs" / "images", ROOT / "docs" / "results"
FAST = "autoattack-fast"
GREY, VIOLET, GREEN, BLUE, RED, INK, FAINT = (
    "#566273", "#8450b0", "#0a7d5a", "#1769c2", "#c2410c", "#16202c", "#dde2e8",
)  # fmt: skip
STYLE = (
    'text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:#16202c}'
    ".s{font-size:12px;fill:#566273}.b{font-weight:600}.m{text-anchor:middle}.e{text-anchor:end}"
    ".h{paint-order:stroke;stroke:#f6f7f9;stroke-width:4px;stroke-linejoin:round}"
    ".w{fill:#fff;font-weight:600;text-anchor:middle}.ws{fill:#fff;font-size:12px;text-anchor:middle}"
)


@dataclass
class Drawing:
    """An SVG that grows by its elements."""

    width: int
    height: int
    alt: str
    elements: list[str] = field(default_factory=list)

    def add(self, element: str) -> None:
        """Append an element."""
        self.elements.append(element)

    def text(self, x: float, y: float, words: str, classes: str = "", fill: str = "") -> None:
        """Append words, whose classes say how they look and where they are anchored."""
        style = f' style="fill:{fill}"' if fill else ""
        self.add(f'<text x="{x:.1f}" y="{y:.1f}" class="{classes}"{style}>{escape(words)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1.5, more: str = "") -> None:
        """Append a straight line."""
        ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        self.add(f'<line {ends} stroke="{colour}" stroke-width="{width}" {more}/>')

    def svg(self) -> str:
        """Return the whole picture."""
        body = "\n".join(self.elements)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(self.alt)}">\n<style>{STYLE}</style>\n'
            f'<rect width="{self.width}" height="{self.height}" rx="12" fill="#f6f7f9"/>\n{body}\n</svg>\n'
        )


@dataclass(frozen=True)
class Axes:
    """A rectangle of the drawing and the values at its edges."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return where a point of the data lies in the drawing."""
        low, high = self.x
        share = math.log(x / low) / math.log(high / low) if self.log else (x - low) / (high - low)
        return (
            self.left + share * self.width,
            self.top + (self.y[1] - y) / (self.y[1] - self.y[0]) * self.height,
        )

    def frame(self, drawing: Drawing, xs: Sequence[float], ys: Sequence[float], x_label: str, y_label: str) -> None:
        """Draw grid, ticks and labels."""
        bottom = self.top + self.height
        for value in ys:
            y = self.at(self.x[0], value)[1]
            drawing.line(self.left, y, self.left + self.width, y, FAINT, 1)
            drawing.text(self.left - 8, y + 4, f"{value:g}", "s e")
        for value in xs:
            x = self.at(value, self.y[0])[0]
            drawing.line(x, self.top, x, bottom, FAINT, 1)
            drawing.text(x, bottom + 18, f"{value:g}", "s m")
        drawing.text(self.left + self.width / 2, bottom + 38, x_label, "s m")
        x, y = self.left - 36, self.top + self.height / 2
        drawing.add(f'<text class="s m" transform="translate({x:.1f} {y:.1f}) rotate(-90)">{escape(y_label)}</text>')


@dataclass(frozen=True)
class Point:
    """A measured model."""

    label: str
    x: float
    y: float
    colour: str
    x_ends: tuple[float, float] | None = None
    y_ends: tuple[float, float] | None = None
    answer: float = 1.0
    solid: bool = True
    shift: tuple[float, float] = (10, -10)
    end: bool = False

    def draw(self, drawing: Drawing, axes: Axes) -> None:
        """Draw intervals, marker and label."""
        x, y = axes.at(self.x, self.y)
        faint = 'opacity="0.45"'
        if self.x_ends:
            low, high = (axes.at(end, self.y)[0] for end in self.x_ends)
            drawing.line(low, y, high, y, self.colour, 1.5, faint)
        if self.y_ends:
            low, high = (axes.at(self.x, end)[1] for end in self.y_ends)
            drawing.line(x, low, x, high, self.colour, 1.5, faint)
        fill = self.colour if self.solid else "#f6f7f9"
        radius = 4.5 * math.sqrt(self.answer)
        place = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"'
        drawing.add(f'<circle {place} fill="{fill}" stroke="{self.colour}" stroke-width="2"/>')
        for number, words in enumerate(self.label.split("\n")):
            at = (x + self.shift[0], y + self.shift[1] + 15 * number)
            drawing.text(*at, words, "s h e" if self.end else "s h", self.colour)


# ---- measured


def results() -> dict[str, Any]:
    """The measured results."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def row(found: dict[str, Any], section: str, name: str) -> dict[str, Any]:
    """Return the row of a study, by the part of its name before the colon."""
    return next(row for row in found[section]["rows"] if row["name"].partition(":")[0] == name)


def pair(found: dict[str, Any], section: str, reference: str, name: str, accuracy: str) -> dict[str, Any]:
    """Return the paired difference of two studies in an accuracy, `name` less `reference`."""
    return next(
        pair
        for pair in found[section]["pairs"]
        if (pair["reference"], pair["name"], pair["accuracy"]) == (reference, name, accuracy)
    )


def measured(found: dict[str, Any], section: str, name: str, label: str, colour: str, **more: Any) -> Point:
    """Return a model's clean and robust accuracy with their intervals, in percent."""
    of = row(found, section, name)
    ends = [tuple(100 * end for end in of["intervals"][key]) for key in ("clean_accuracy", FAST)]
    return Point(
        label, 100 * of["clean_accuracy"], 100 * of["robust_accuracy"][FAST], colour, ends[0], ends[1],
        solid=len(of["seeds"]) > 1, **more,
    )  # fmt: skip


def trade_off(found: dict[str, Any]) -> str:
    """Draw clean and robust accuracy of TRADES over beta, the ensemble, DH-AT, guided and guided distillation."""
    drawing = Drawing(
        880, 520,
        "Robust over clean accuracy: guided distillation lies above the curve of TRADES over beta; the paper's DH-AT "
        "lies on it, a plain ensemble is more robust and not more accurate",
    )  # fmt: skip
    first, second, again = "trades and sat", "trades over beta at equal cost, float32", "trades again, float32"
    panels = [
        (
            "3 seeds, bf16, 5,000 test images",
            [
                measured(found, first, "trades-base", "beta 6, 1x", GREY, shift=(-10, 20), end=True),
                measured(found, first, "trades-base-long", "TRADES, beta 6, 2x", GREY, shift=(12, 20)),
                measured(found, first, "trades-dhat", "DH-AT, 1x", GREEN, answer=1.6, shift=(-16, -14), end=True),
                measured(found, first, "trades-ensemble", "ensemble, 2x", VIOLET, answer=2, shift=(-14, -32), end=True),
                measured(found, first, "trades-guided", "guided, 1x", BLUE, shift=(12, 20)),
                measured(
                    found, first, "trades-distilled", "guided distillation, 2x", RED, answer=2, shift=(-12, -12),
                    end=True,
                ),
            ],
            [(0, 1)],
        ),
        (
            "5 seeds or 1, float32, 2,000 test images",
            [
                measured(found, again, "trades-base-beta-3", "TRADES, beta 3, 1x", GREY, shift=(-12, 28), end=True),
                measured(found, again, "trades-base", "beta 6, 1x", GREY, shift=(12, -8)),
                measured(found, again, "trades-base-long", "beta 6, 2x", GREY, shift=(-12, 18), end=True),
                measured(found, second, "trades-base-beta-12", "beta 12, 1x", GREY, shift=(-10, -12), end=True),
                measured(found, second, "trades-base-long-beta-12", "beta 12, 2x", GREY, shift=(10, -8)),
                measured(found, again, "trades-distilled", "beta 3, 2x", RED, answer=2, shift=(12, 20)),
                measured(
                    found, second, "trades-distilled-beta-6", "guided distillation, beta 6, 2x", RED, answer=2,
                    shift=(-30, -22),
                ),
                measured(
                    found, second, "trades-distilled-beta-6, head 2", "its head 2 alone", RED,
                    shift=(-12, -14), end=True,
                ),
            ],
            [(0, 1), (1, 3), (2, 4), (5, 6)],
        ),
    ]  # fmt: skip
    for number, (title, points, joined) in enumerate(panels):
        axes = Axes(66 + 430 * number, 56, 360, 360, (48.5, 58), (15.5, 26.5))
        drawing.text(axes.left, 36, title, "b")
        axes.frame(
            drawing, range(49, 59, 2), range(16, 27, 2), "clean accuracy, %", "robust accuracy (APGD-CE, APGD-T), %"
        )
        for start, end in joined:  # the same method, of another beta or length
            ends = [axes.at(points[place].x, points[place].y) for place in (start, end)]
            drawing.line(*ends[0], *ends[1], points[start].colour, 1.5, 'stroke-dasharray="4 4"')
        for point in points:
            point.draw(drawing, axes)
    y = 486
    for x, answer, words in ((70, 1.0, "an answer costs 1 forward pass"), (300, 2.0, "2 forward passes")):
        drawing.add(f'<circle cx="{x}" cy="{y - 4}" r="{4.5 * math.sqrt(answer):.1f}" fill="{GREY}"/>')
        drawing.text(x + 14, y, words, "s")
    drawing.add(f'<circle cx="448" cy="{y - 4}" r="4.5" fill="#f6f7f9" stroke="{GREY}" stroke-width="2"/>')
    drawing.text(462, y, "hollow: one seed", "s")
    drawing.text(590, y, "1x, 2x: training cost, TRADES = 1", "s")
    drawing.text(66, y + 20, "CIFAR-10, JPEG-75, 2,250 training images, WRN-10-1, Linf eps 8/255; 95 % intervals", "s")
    return drawing.svg()


ROUNDED = "rounded: other references"
FOREST = (
    ("TRADES", None, None, None, None),
    ("guided distillation, beta 6 (5 seeds)", "trades over beta at equal cost, float32", "trades-base-long-beta-12",
     "trades-distilled-beta-6", RED),
    ("its head 2 alone (5 seeds)", "trades over beta at equal cost, float32", "trades-base-long-beta-12",
     "trades-distilled-beta-6, head 2", RED),
    ("guided distillation, beta 3 (3 seeds)", "trades and sat", "trades-base-long", "trades-distilled", RED),
    ("guided alone (3 seeds)", ROUNDED, "trades-base", "trades-guided", BLUE),
    ("DH-AT, the paper's (3 seeds)", ROUNDED, "trades-base", "trades-dhat", GREEN),
    ("SAT", None, None, None, None),
    ("guided distillation (3 seeds)", ROUNDED, "sat-base-long", "sat-distilled", RED),
    ("same, against SAT at half the cost", ROUNDED, "sat-base", "sat-distilled", RED),
    ("DH-AT (3 seeds)", ROUNDED, "sat-base", "sat-dhat", GREEN),
    ("MART", None, None, None, None),
    ("guided distillation, half length (3 seeds)", "mart", "mart-base", "mart-distilled-short", RED),
    ("DH-AT (3 seeds)", "mart", "mart-base", "mart-dhat", GREEN),
)  # fmt: skip
"""Label, section of the results, reference, name and colour of each line; a line without a section is a heading."""


def forest(found: dict[str, Any]) -> str:
    """Draw the differences from the base method at equal training cost, with their intervals."""
    step, top = 30, 84
    height = top + step * len(FOREST) + 66
    drawing = Drawing(
        880, height, "Differences in clean and robust accuracy from the base method at equal cost, with intervals"
    )
    drawing.text(24, 34, "Less the base method at equal training cost, points", "b")
    for column, accuracy in enumerate(("clean", FAST)):
        axes = Axes(318 + 280 * column, top, 250, step * len(FOREST), (-6, 11), (0, 1))
        drawing.text(axes.left + 125, 62, "clean accuracy" if accuracy == "clean" else "robust accuracy", "m")
        bottom = axes.top + axes.height
        for value in (-5, 0, 5, 10):
            x = axes.at(value, 0)[0]
            drawing.line(x, axes.top, x, bottom, GREY if value == 0 else FAINT, 1)
            drawing.text(x, bottom + 18, f"{value:+d}" if value else "0", "s m")
        for number, (label, section, reference, name, colour) in enumerate(FOREST):
            y = top + step * number + 18
            if not section or not reference or not name or not colour:
                if not column:
                    drawing.text(24, y + 4, label, "b")
                continue
            if not column:
                drawing.text(36, y + 4, label, "s")
            of = pair(found, section, reference, name, accuracy)
            low, middle, high = (
                axes.at(100 * value, 0)[0] for value in (of["interval"][0], of["difference"], of["interval"][1])
            )
            drawing.line(low, y, high, y, colour, 2)
            drawing.add(f'<circle cx="{middle:.1f}" cy="{y}" r="4.5" fill="{colour}"/>')
            lost = of["interval"][1] < 0  # the number stands away from the line of zero
            words = f"{100 * of['difference']:+.1f}"
            drawing.text(low - 8 if lost else high + 8, y + 4, words, "s h e" if lost else "s h", colour)
    drawing.text(
        24, height - 14,
        "Robust: APGD-CE and APGD-T. 95 %, paired t over seeds, on fixed test images; WRN-10-1, 2,250 training images",
        "s",
    )  # fmt: skip
    return drawing.svg()


def cost(found: dict[str, Any]) -> str:
    """Draw robust accuracy over training cost, in multiples of the base model's training."""
    drawing = Drawing(
        880,
        500,
        "Robust accuracy over training cost: more epochs of TRADES and SAT do not add any, guided distillation does",
    )
    axes = Axes(66, 30, 780, 380, (0.115, 4.4), (14.5, 27), log=True)
    axes.frame(
        drawing, (0.125, 0.25, 0.5, 1, 2), range(15, 28, 2),
        "training cost, TRADES for 160 epochs = 1", "robust accuracy (APGD-CE, APGD-T), %",
    )  # fmt: skip
    curve = found["rounded: length of TRADES"]
    places = [axes.at(n / 160, value) for n, value in zip(curve["epochs"], curve[FAST], strict=True)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawing.add(f'<polyline points="{points}" fill="none" stroke="{GREY}" stroke-width="2" stroke-dasharray="5 4"/>')
    drawing.text(places[0][0], places[0][1] + 26, "TRADES, 20 to 320 epochs (seed 0)", "s", GREY)
    unit = row(found, "trades and sat", "trades-base")["training_cost"]["flops"]

    def of(name: str, label: str, colour: str, **more: Any) -> Point:
        told = row(found, "trades and sat", name)
        ends = tuple(100 * end for end in told["intervals"][FAST])
        x = told["training_cost"]["flops"] / unit
        return Point(
            label, x, 100 * told["robust_accuracy"][FAST], colour, None, ends, solid=len(told["seeds"]) > 1, **more
        )

    short = found["rounded: at half the length"][FAST]["3"]
    drawn = [
        of("trades-base", "TRADES", GREY, shift=(12, 34)),
        of("trades-base-long", "TRADES", GREY, shift=(10, 18)),
        of("trades-dhat", "DH-AT (TRADES)", GREEN, answer=1.6, shift=(12, -2)),
        of("trades-guided", "guided", BLUE, shift=(12, 4)),
        of("trades-ensemble", "ensemble", VIOLET, answer=2, shift=(12, 4)),
        of("trades-distilled", "guided distillation (TRADES)", RED, answer=2, shift=(14, -4)),
        Point("guided distillation\n(TRADES), short", 0.99, short, RED, answer=2, solid=False, shift=(14, -10)),
        of("sat-base", "SAT", "#8a6d1a", shift=(-10, -4), end=True),
        of("sat-base-long", "SAT: overfitting", "#8a6d1a", shift=(12, 4)),
        of("sat-dhat", "DH-AT (SAT)", GREEN, answer=1.6, shift=(-14, -4), end=True),
        of("sat-distilled", "guided distillation (SAT)", RED, answer=2, shift=(-14, -4), end=True),
    ]
    for point in drawn:
        point.draw(drawing, axes)
    drawing.text(
        66,
        480,
        "3 seeds with 95 % intervals, hollow: one seed; 5,000 test images; a larger marker: a dearer answer",
        "s",
    )
    return drawing.svg()


FRONTIER_COLOURS = {
    "fgsm_rs": RED, "n_fgsm": GREEN, "pgd_2": BLUE, "free": "#8a6d1a", "grad_align": VIOLET, "elle": "#0f7490",
    "sat": "#8f3f71", "trades": GREY, "distilled": INK,
}  # fmt: skip
"""Of the methods of benchmarks/frontier.py."""
SMALL, LARGE = 8, 16
"""Radii of the frontier, in 1/255."""


def frontier(found: dict[str, Any]) -> str:
    """Draw robust accuracy over training cost for cheap methods, and how they stand at a large eps."""
    rows = [row for row in found["summary"] if row["eps"] == SMALL]
    costs = [row["forward_equivalents"] / 2250 for row in rows]
    shares = [100 * row[FAST]["mean"] for row in rows]
    drawing = Drawing(
        960, 500, "Robust accuracy over training cost: cheap adversarial training, SAT, TRADES, distillation"
    )
    top, bottom = 2 * math.ceil(max(shares) / 2 + 1), 2 * math.floor(min(shares) / 2 - 0.5)
    axes = Axes(66, 30, 480, 380, (min(costs) / 1.25, max(costs) * 1.25), (bottom, top), log=True)
    ticks = [tick for tick in (25, 50, 100, 200, 400, 800) if axes.x[0] < tick < axes.x[1]]
    axes.frame(
        drawing, ticks, range(bottom, top + 1, 2), "training cost, forward passes per image",
        "robust accuracy at 8/255 (APGD-CE, APGD-T), %",
    )  # fmt: skip
    ends = []
    for name, colour in FRONTIER_COLOURS.items():
        of = sorted((row for row in rows if row["method"] == name), key=lambda row: row["epochs"])
        places = [axes.at(row["forward_equivalents"] / 2250, 100 * row[FAST]["mean"]) for row in of]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        drawing.add(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2" opacity="0.5"/>')
        ends.append((places[-1][1], of[-1]["title"], colour))
        for row in of:
            low, high = row[FAST]["interval"] or (None, None)
            within = None if low is None or high is None else (max(100 * low, bottom), min(100 * high, top))
            Point(
                "", row["forward_equivalents"] / 2250, 100 * row[FAST]["mean"], colour, None, within,
                solid=len(row["seeds"]) > 1,
            ).draw(drawing, axes)  # fmt: skip
    beside = -math.inf
    for y, title, colour in sorted(ends):  # names in the order of the lines' ends, none upon another
        beside = max(y + 4, beside + 17)
        drawing.text(556, beside, title, "b", colour)
    drawing.text(770, 44, "at 16/255", "b")
    drawing.text(770, 64, "robust, right under a step, %", "s")
    for number, row in enumerate(row for row in found["summary"] if row["eps"] == LARGE):
        y = 96 + 62 * number
        drawing.text(770, y, row["title"], "b", FRONTIER_COLOURS[row["method"]])
        drawing.text(770, y + 18, f"{100 * row[FAST]['mean']:.1f}, {100 * row['fgsm']['mean']:.1f}", "s")
        overfitted = f"overfits in {row['seeds_overfitted']} of {len(row['seeds'])} seeds"
        drawing.text(770, y + 34, overfitted, "s")
    seeds, images = max(len(row["seeds"]) for row in rows), rows[0]["images"]
    told = f"up to {seeds} seeds, with 95 % intervals as far as the plot goes, hollow: one seed; {images:,} test images"
    drawing.text(66, 480, told, "s")
    return drawing.svg()


ANSWERS = {"helps": GREEN, "harms": RED, "equal": BLUE, "undecided": GREY, "no effect": "#b4bcc6"}
"""Colours of the answers of the study of poisoned data."""
METHODS = {
    "dhat": "DH-AT", "distilled": "guided distillation", "ensemble": "ensemble of two",
    "dhat_fitted": "DH-AT, fitted aggregator", "base_larger_eps": "TRADES, larger eps", "base_short": "TRADES, shorter",
}  # fmt: skip
ON = {"study": "CIFAR-10, WRN-10-1, 2,250 training images", "small": "digits"}


def poisoning(found: dict[str, Any], part: str) -> str:
    """Draw what each attack costs a method more than the base method at equal cost, for both families of attacks."""
    told = found[part]["answers"]
    families = {"backdoors": "success rate, points", "others": "accuracy, points"}
    rows = {name: [each for each in told if each["family"] == name] for name in families}
    step, top = 26, 92
    height = top + step * max(len(of) for of in rows.values()) + 86
    drawing = Drawing(880, height, "Costs of poisons to methods beyond those to the base method at equal cost")
    drawing.text(24, 34, "What a poison costs beyond what it costs the base method at equal training cost", "b")
    drawing.text(24, 54, "Left of 0: the method loses less. " + ON[part], "s")
    for column, (family, label) in enumerate(families.items()):
        ends = [abs(100 * end) for each in rows[family] for end in each["difference"]["interval"] or ()]
        ends += [abs(100 * each["difference"]["mean"]) for each in rows[family]]
        wide = next((size for size in (5, 10, 20, 50) if size >= max(ends, default=0)), 100)
        axes = Axes(206 + 430 * column, top, 190, step * max(len(of) for of in rows.values()), (-wide, wide), (0, 1))
        drawing.text(axes.left + 95, 78, label, "m s")
        bottom = axes.top + axes.height
        for value in (-wide, 0, wide):
            x = axes.at(value, 0)[0]
            drawing.line(x, axes.top, x, bottom, GREY if value == 0 else FAINT, 1)
            drawing.text(x, bottom + 18, f"{value:+g}" if value else "0", "s m")
        for number, each in enumerate(rows[family]):
            y, colour = top + step * number + 14, ANSWERS[each["answer"]]
            name = each["attack"].replace("_", " ").replace(" self", ", adaptive")
            drawing.text(axes.left - 12, y - 2, name, "s e")
            drawing.text(axes.left - 12, y + 10, METHODS[each["method"]], "s e")
            middle = axes.at(100 * each["difference"]["mean"], 0)[0]
            if each["difference"]["interval"]:
                low, high = (axes.at(max(-wide, min(wide, 100 * end)), 0)[0] for end in each["difference"]["interval"])
                drawing.line(low, y, high, y, colour, 2)
            fill = colour if len(each["seeds"]) > 1 else "#f6f7f9"
            drawing.add(
                f'<circle cx="{middle:.1f}" cy="{y}" r="4.5" fill="{fill}" stroke="{colour}" stroke-width="2"/>'
            )
    x = 24.0
    for answer, colour in ANSWERS.items():
        drawing.add(f'<circle cx="{x + 5:.1f}" cy="{height - 36}" r="4.5" fill="{colour}"/>')
        drawing.text(x + 16, height - 32, answer, "s")
        x += 96
    drawing.text(24, height - 12, "95 %, paired t over seeds; hollow: one seed. Colours after Holm's correction", "s")
    return drawing.svg()


def column(drawing: Drawing, axes: Axes, title: str, ticks: Sequence[float], lines: Sequence[Line]) -> None:
    """Draw means over seeds below one another, with intervals as far as the column is wide; hollow of one seed."""
    step, bottom = axes.height / len(lines), axes.top + axes.height
    drawing.text(axes.left + axes.width / 2, axes.top - 14, title, "m s")
    for value in ticks:
        x = axes.at(value, 0)[0]
        drawing.line(x, axes.top, x, bottom, FAINT, 1)
        drawing.text(x, bottom + 18, f"{value:g}", "s m")
    for number, (of, colour) in enumerate(lines):
        if of is None:
            continue
        y = axes.top + step * (number + 0.5)
        if of["interval"]:
            low, high = (axes.at(min(max(100 * end, axes.x[0]), axes.x[1]), 0)[0] for end in of["interval"])
            drawing.line(low, y, high, y, colour, 2, 'opacity="0.45"')
        fill = colour if of["interval"] else "#f6f7f9"
        place = f'cx="{axes.at(100 * of["mean"], 0)[0]:.1f}" cy="{y:.1f}" r="4.5"'
        drawing.add(f'<circle {place} fill="{fill}" stroke="{colour}" stroke-width="2"/>')


def reach(told: Sequence[Mapping[str, Any] | None], *, whole: bool = False) -> tuple[int, int]:
    """Return the whole tens around means, of which none is left out; `whole`: around their intervals too."""
    known = [of for of in told if of is not None]
    ends = [100 * end for of in known for end in (of["mean"], *((of["interval"] or ()) if whole else ()))]
    return 10 * math.floor(min(ends) / 10), 10 * math.ceil(max(ends) / 10 + 1e-9)


VARIANTS = {
    "sat-linf": "SAT, Linf", "sat-l2": "SAT, L2", "sat-l1": "SAT, L1", "random": "random norm", "e-at": "E-AT",
    "max": "MAX", "avg": "AVG", "msd": "MSD", "ramp": "RAMP's pairing",
}  # fmt: skip
"""Of the study of many threats, as benchmarks/threats calls them."""


def threats(found: dict[str, Any]) -> str:
    """Draw clean accuracy, robust accuracy under each norm and under all of them."""
    step, top = 28, 84
    height = top + step * len(VARIANTS) + 60
    drawing = Drawing(880, height, "Accuracy of ways to train against three norms at equal cost")
    drawing.text(24, 34, "Trained against one norm or several, at equal cost; accuracy, %", "b")
    for number, name in enumerate(VARIANTS):
        drawing.text(24, top + step * (number + 0.5) + 4, VARIANTS[name], "s")
    columns = {"clean": "clean", "Linf": "Linf 8/255", "L2": "L2 0.5", "L1": "L1 12", "union": "all three"}
    for number, (key, title) in enumerate(columns.items()):
        lines = [
            (found["variants"].get(name, {}).get(key), GREY if name.startswith("sat") else BLUE) for name in VARIANTS
        ]
        low, high = reach([of for of, _ in lines])
        axes = Axes(146 + 146 * number, top, 120, step * len(VARIANTS), (low, high), (0, 1))
        column(drawing, axes, title, range(low, high + 1, 10), lines)
    under_way = " Under way." if found["under_way"] else ""
    drawing.text(
        24, height - 14,
        "APGD-CE and APGD-T, 1,000 test images of CIFAR-10, JPEG-75; WRN-10-1, 2,250 training images; 95 % over seeds, "
        "hollow: one." + under_way, "s",
    )  # fmt: skip
    return drawing.svg()


SEQUENCES = {
    "finetune": "fine-tuning", "lwf": "LwF", "alr": "ALR", "ewc": "EWC", "air": "after AIR",
    "interpolate-lost": "interpolation", "routed-lost": "after DDeR", "seen": "E-AT, seen", "replay": "replay",
    "derpp": "DER++", "agem": "A-GEM", "ramp": "RAMP's pairing", "interpolate-kept": "interpolation",
    "routed-kept": "after DDeR", "joint": "knows all three",
}  # fmt: skip
"""Methods of benchmarks/continual: seven without old attacks, seven with them, and the bound."""


def continual(found: dict[str, Any]) -> str:
    """Draw what methods forget and what stands under all threats, in both orders, beside the static protocol."""
    step, top = 24, 104
    height = top + step * len(SEQUENCES) + 74
    drawing = Drawing(960, height, "Forgetting, union and the static protocol's union of methods in both orders")
    drawing.text(24, 34, "Three threats one after another, at equal cost; %", "b")
    names = list(SEQUENCES)
    colours = {name: GREY if name == "joint" else VIOLET if number < 7 else BLUE for number, name in enumerate(names)}
    for number, name in enumerate(names):
        drawing.text(24, top + step * (number + 0.5) + 4, SEQUENCES[name], "s", colours[name])
    orders = {"forward": "Linf, L2, L1", "reverse": "L1, L2, Linf"}
    methods = {order: {**found[order], "joint": found["bounds"].get("joint", {})} for order in orders}
    columns = {
        "forgets": lambda of: of.get("forgetting"),
        "all three, attacked": lambda of: of.get("union"),
        "all three, static": lambda of: of.get("transfer", {}).get("union"),
    }
    for number, (title, of) in enumerate(columns.items()):
        told = {order: [of(methods[order].get(name, {})) for name in names] for order in orders}
        if not any(map(any, told.values())):
            continue
        low, high = reach([each for one in told.values() for each in one], whole=True)
        for side, order in enumerate(orders):
            axes = Axes(146 + 408 * side + 128 * number, top, 108, step * len(names), (low, high), (0, 1))
            lines = list(zip(told[order], colours.values(), strict=True))
            column(drawing, axes, title, range(low, high + 1, 10), lines)
    for side, words in enumerate(orders.values()):
        drawing.text(146 + 408 * side + 186, 62, words, "b m")
    for x, words, colour in ((24, "old attacks lost", VIOLET), (170, "old attacks kept", BLUE), (316, "bound", GREY)):
        drawing.add(f'<circle cx="{x + 5}" cy="{height - 38}" r="4.5" fill="{colour}"/>')
        drawing.text(x + 16, height - 34, words, "s")
    under_way = " Under way." if found["under_way"] else ""
    drawing.text(
        24, height - 12,
        "APGD-CE on the network itself; static: images made once against another network, which flatters. 95 % over "
        "seeds, hollow: one." + under_way, "s",
    )  # fmt: skip
    return drawing.svg()


# ---- how it works


def box(
    drawing: Drawing, x: float, y: float, words: Sequence[str], fill: str, width: int = 130, height: int = 56
) -> None:
    drawing.add(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}"/>')
    middle = x + width / 2
    drawing.text(middle, y + height / 2 - 4 if len(words) > 1 else y + height / 2 + 5, words[0], "w")
    if len(words) > 1:
        drawing.text(middle, y + height / 2 + 15, words[1], "ws")


def arrow(drawing: Drawing, path: str, colour: str = "#66758a", dashed: bool = False) -> None:
    dashes = ' stroke-dasharray="6 4"' if dashed else ""
    drawing.add(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes} marker-end="url(#a)"/>')


MARKER = (
    '<defs><marker id="a" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
    'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="#66758a"/></marker></defs>'
)


def paper() -> str:
    """Draw the paper's network."""
    drawing = Drawing(
        430,
        300,
        "DH-AT: an image runs through one trunk; head 1 and head 2 give logits; a trained aggregator merges them",
    )
    drawing.add(MARKER)
    drawing.text(20, 32, "DH-AT (the paper's)", "b")
    box(drawing, 20, 118, ("trunk", "shared"), GREY, 90)
    box(drawing, 160, 60, ("head 1", "stage 1"), BLUE, 100)
    box(drawing, 160, 176, ("head 2", "stage 2"), RED, 100)
    box(drawing, 306, 118, ("aggregator", "stage 3"), GREEN, 108)
    arrow(drawing, "M110 138H134V88H158")
    arrow(drawing, "M110 154H134V204H158")
    arrow(drawing, "M260 88H282V138H304")
    arrow(drawing, "M260 204H282V154H304")
    drawing.text(20, 264, "Stage 1 trains trunk and head 1 robustly and", "s")
    drawing.text(20, 282, "freezes them; each stage sees attacked images.", "s")
    return drawing.svg()


def guided_distillation() -> str:
    """Draw the two stages of guided distillation."""
    drawing = Drawing(
        430, 300,
        "Guided distillation: in stage 1 a natural head 2 guides head 1; in stage 2 the frozen head 1 teaches head 2; "
        "the mean of both is deployed, or head 2 alone",
    )  # fmt: skip
    drawing.add(MARKER)
    drawing.text(20, 32, "Guided distillation", "b")
    drawing.text(20, 64, "stage 1", "s")
    box(drawing, 20, 76, ("head 1", "attacked images"), BLUE, 122)
    box(drawing, 20, 180, ("head 2", "clean images"), "#8a6d1a", 122)
    arrow(drawing, "M81 180V136")
    drawing.text(90, 162, "guides", "s")
    drawing.text(176, 64, "stage 2", "s")
    box(drawing, 176, 76, ("head 1", "frozen"), "#66758a", 122)
    box(drawing, 176, 180, ("head 2", "attacked images"), RED, 122)
    arrow(drawing, "M237 132V178")
    drawing.text(246, 160, "teaches", "s")
    drawing.text(332, 64, "deployed", "s")
    box(drawing, 332, 76, ("mean", "2 networks"), GREEN, 82)
    box(drawing, 332, 180, ("head 2", "1 network"), RED, 82)
    arrow(drawing, "M298 104H330")
    arrow(drawing, "M298 200H314V118H330")
    arrow(drawing, "M298 216H330", dashed=True)
    drawing.text(20, 264, "The heads are whole networks: they share no layer. Stage 2", "s")
    drawing.text(20, 282, "uses no labels. Head 2 alone answers at half the cost.", "s")
    return drawing.svg()


# ---- tables


def tables(found: dict[str, Any]) -> dict[str, str]:
    """Return all measured rows and paired differences as CSV, by name of file; accuracies as shares of images."""
    rows, pairs = io.StringIO(), io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(
        ["study", "model", "seeds", "accuracy", "share", "low", "high", "parameters", "training_flops", "training_cost"]
    )
    unit = row(found, "trades and sat", "trades-base")["training_cost"]["flops"]
    for study, content in found.items():
        for of in content.get("rows", []):
            shares = {"clean": of["clean_accuracy"], **of["robust_accuracy"]}
            ends = {**of["intervals"], "clean": of["intervals"]["clean_accuracy"]}
            flops = of["training_cost"]["flops"]
            for accuracy, share in shares.items():
                low, high = ends[accuracy]
                told = [f"{value:.4f}" for value in (share, low, high)]
                seeds = " ".join(map(str, of["seeds"]))
                writer.writerow(
                    [study, of["name"], seeds, accuracy, *told, of["parameters"], f"{flops:.4g}", f"{flops / unit:.2f}"]
                )
    writer = csv.writer(pairs, lineterminator="\n")
    writer.writerow(["study", "model", "less", "accuracy", "difference", "low", "high", "p_value", "test"])
    for study, content in found.items():
        for of in content.get("pairs", []):
            told = [f"{value:+.4f}" for value in (of["difference"], *of["interval"])]
            p_value = f"{of['p_value']:.2g}" if "p_value" in of else ""
            writer.writerow([study, of["name"], of["reference"], of["accuracy"], *told, p_value, of["test"]])
    return {"rows.csv": rows.getvalue(), "differences.csv": pairs.getvalue()}


def made() -> dict[Path, str]:
    """Return the content of every file that this script makes, by path."""
    found = results()
    figures = {
        "trade-off": trade_off(found),
        "equal-cost": forest(found),
        "cost": cost(found),
        "dhat": paper(),
        "guided-distillation": guided_distillation(),
    }
    if FRONTIER.is_file():
        figures["frontier"] = frontier(json.loads(FRONTIER.read_text(encoding="utf-8")))
    if POISONING.is_file():
        told = json.loads(POISONING.read_text(encoding="utf-8"))
        figures |= {
            name: poisoning(told, part)
            for name, part in (("poisoning", "study"), ("poisoning-digits", "small"))
            if told.get(part, {}).get("answers")
        }
    for name, draw in {"threats": threats, "continual": continual}.items():
        if (RESULTS.parent / f"{name}.json").is_file():
            figures[name] = draw(json.loads((RESULTS.parent / f"{name}.json").read_text(encoding="utf-8")))
    return {IMAGES / f"{name}.svg": text for name, text in figures.items()} | {
        TABLES / name: text for name, text in tables(found).items()
    }


# ---- screenshots of the report and of the page to play with


def screenshots(demo: Path) -> None:
    """Write the pictures of the pages, as they are now, from the runs of the demonstration."""
    import threading

    from playwright.sync_api import expect, sync_playwright

    from dualhead.commands.play import Playground, serve
    from dualhead.commands.resolve import Request, resolve
    from dualhead.report import write_report

    guided, natural = demo / "digits_guided_distillation", demo / "digits_natural"
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    shown, beside = (resolve(Request(model=str(run), device="cpu")) for run in (guided, natural))
    server = serve(Playground(shown.model, shown.images, shown.threat, beside=(natural.name, beside.model)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_of_run = write_report([guided], Path(folder) / "run.html").as_uri()
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])

        def opened(address: str, width: int, height: int) -> Any:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(120_000)
            expect.set_options(timeout=120_000)
            page.goto(address)
            return page

        small(opened(page_of_run, 1280, 1000).screenshot(), "report")
        small(opened(page_of_run, 390, 844).screenshot(), "report-phone")
        page = opened(page_of_run, 1000, 760)
        page.get_by_role("button", name="Look closer at sample 2", exact=True).click()
        expect(page.locator("dialog canvas")).to_be_visible()
        small(page.get_by_role("dialog").screenshot(), "closer")
        page = opened(f"http://127.0.0.1:{server.server_port}/", 1000, 760)
        page.locator(".strip button").nth(6).click()
        rows = page.locator("#says tr")
        expect(rows).to_have_count(4)
        for left in (3, 2, 1, 0):
            page.locator("#says button").first.click()
            expect(page.locator("#says button")).to_have_count(left)
        small(page.screenshot(full_page=True), "play")
        browser.close()
    server.shutdown()


def small(png: bytes, name: str) -> None:
    """Write a screenshot in at most 128 colours, which is enough for it."""
    from PIL import Image

    path = IMAGES / f"{name}.png"
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path.relative_to(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--screenshots", type=Path, metavar="DEMO", help="folder of the demonstration's runs")
    demo = parser.parse_args().screenshots
    if demo is not None:
        screenshots(demo)
        return
    for path, text in made().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
