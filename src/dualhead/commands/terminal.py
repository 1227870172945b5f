"""Output in a terminal: progress bars, or plain lines where there is no terminal, and tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from dualhead.report import believable, light_lines, unequal

err = Console(stderr=True, highlight=False, markup=False)  # brackets in names are no markup
# A file or a pipe has no width to fit into; a table in it must not lose columns.
out = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)

REFRESH_SECONDS = 0.5
DOUBTED = "! a check failed, see above: its accuracies are not to be believed"


class TrainingDisplay:
    """Draws training: stage, epoch, loss, clean and robust validation accuracy, time left."""

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar
        self._task: TaskID | None = None
        self._label = ""
        self._accuracy = ""
        self._epochs = 0
        self._drawn = 0.0
        self._pending = 0

    def stage(self, name: str, number: int, stages: int, epochs: int, steps: int, done: int) -> None:
        """See `TrainingProgress.stage`."""
        self._label = f"{name} ({number}/{stages})"
        self._epochs, self._accuracy, self._pending = epochs, "", 0
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(self._label, total=epochs * steps, completed=done)
        else:
            err.print(f"stage {self._label}: {epochs} epochs of {steps} steps", soft_wrap=True)

    def step(self, epoch: int, loss: Tensor) -> None:
        """See `TrainingProgress.step`. The loss is read twice a second, not at every step."""
        self._pending += 1
        if self._bar is None or self._task is None or time.monotonic() - self._drawn < REFRESH_SECONDS:
            return
        text = f"{self._label}  epoch {epoch}/{self._epochs}  loss {float(loss):.3f}{self._accuracy}"
        self._bar.update(self._task, description=text, advance=self._pending)
        self._drawn, self._pending = time.monotonic(), 0

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """See `TrainingProgress.epoch`."""
        if "validation_robust" in metrics:
            clean, robust = metrics["validation_clean"], metrics["validation_robust"]
            self._accuracy = f"  clean {clean:.1%}  robust {robust:.1%}"
            if metrics.get("validation_largest_answer", 0.0) == 1.0:
                self._accuracy += "  all answers are one class"
        if self._bar is None:
            err.print(
                f"stage {self._label}: epoch {metrics['epoch']}/{self._epochs}, loss {metrics['loss']:.3f}"
                f"{self._accuracy.replace('  ', ', ')}, {metrics['seconds']:.0f} s",
                soft_wrap=True,
            )
        elif self._task is not None:
            self._bar.update(self._task, advance=self._pending)
            self._pending = 0


class EvaluationDisplay:
    """Draws an evaluation: attack, robust accuracy so far, tries left, time left."""

    def __init__(self, bar: Progress | None, row: str) -> None:
        self._bar = bar
        self._row = row
        self._tasks: dict[str, TaskID] = {}
        self._told: set[str] = set()

    def update(self, attack: str, done: int, total: int, robust_so_far: float) -> None:
        """See `EvaluationProgress.update`."""
        text = f"{self._row}: {attack}  robust {robust_so_far:.1%}"
        if self._bar is None:
            if done >= total and attack not in self._told:
                self._told.add(attack)
                err.print(text.replace("  ", ", "), soft_wrap=True)
            return
        if attack not in self._tasks:
            for task in self._tasks.values():
                self._bar.update(task, visible=False)
            self._tasks[attack] = self._bar.add_task(text, total=total)
        self._bar.update(self._tasks[attack], description=text, completed=done, total=total)
        if done >= total:
            self._bar.update(self._tasks[attack], visible=False)


@contextmanager
def progress_bar(*, quiet: bool) -> Iterator[Progress | None]:
    """Return a live bar on a terminal; None where lines are printed instead, or nothing is."""
    if quiet or not err.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        yield bar


def print_table(columns: Mapping[str, Any], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Print a table; the columns say how each is justified."""
    table = Table(title=title, title_justify="left")
    for name, justify in columns.items():
        table.add_column(name, justify=justify)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def print_lights(models: Iterable[tuple[str, Sequence[Mapping[str, str]]]]) -> None:
    """Print failed and warning checks, a line each, as they come before every table of numbers.

    Args:
        models: name and checks of each model, as `dualhead.report.lights` gives them.
    """
    for line in light_lines(models):
        out.print(line, style="red" if line.startswith("failed") else "yellow", soft_wrap=True)


def print_row_lights(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the lights of rows as `comparison.json` holds them."""
    print_lights([(row["name"], row.get("checks", [])) for row in rows])


def accuracy_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of accuracies with their 95 % intervals.

    Args:
        title: above it.
        rows: as `comparison.json` holds them.
    """
    table = Table(title=title, title_justify="left")
    attacks = list(dict.fromkeys(name for row in rows for name in row["robust_accuracy"] if name != "worst"))
    shown = [*attacks, "worst"] if len(attacks) > 1 else attacks
    table.add_column("model", overflow="fold")  # the numbers stay whole on a narrow terminal
    even = shows_balanced(rows)
    for column in ("clean", *shown, *even):
        table.add_column(column, justify="right", overflow="fold")
    gap = "\n" if len(shown) > 2 else " "  # many attacks fit a narrow terminal only with the interval below the share
    for row in rows:
        cells = [_percent(row["clean_accuracy"], row["intervals"]["clean_accuracy"], gap)]
        cells += [_cell(row, name, gap) for name in shown]
        cells += [_balanced_cell(row, name) for name in even.values()]
        table.add_row(row["name"], *cells)
    return table


def shows_balanced(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the further columns of a table in which some row's classes are unequal, and the accuracies they show.

    Args:
        rows: as `comparison.json` holds them; those of earlier versions know nothing of it.
    """
    if not any(unequal(row.get("class_sizes")) for row in rows):
        return {}
    return {"balanced clean": "clean", "balanced robust": "worst"}


def _balanced_cell(row: Mapping[str, Any], name: str) -> str:
    return _share(row.get("balanced_accuracy", {}).get(name))


def _cell(row: Mapping[str, Any], name: str, gap: str) -> str:
    """Return robust accuracy under an attack, or `worst`; a dash where it was not run."""
    share = row["robust_accuracy"].get(name)
    return "-" if share is None else _percent(share, row["intervals"][name], gap)


def stage_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of the stages of a run, as `report.summary` tells them."""
    table = Table(title="stages, accuracy in percent on held-out training images", title_justify="left")
    for column, justify in (
        ("stage", "left"), ("state", "left"), ("epoch", "right"), ("time", "right"), ("clean", "right"),
        ("robust", "right"), ("best robust", "right"),
    ):  # fmt: skip
        table.add_column(column, justify=justify)  # type: ignore[arg-type]  # a literal that the tuple widens
    for stage in stages:
        best, last, seconds = stage["best"], stage["last"], stage["seconds"]
        table.add_row(
            str(stage["name"]), stage["state"], f"{stage['epoch']}/{stage['epochs']}",
            "-" if seconds is None else f"{seconds:.0f} s", *(_share(last[key]) for key in ("clean", "robust")),
            "-" if best is None else f"{_share(best['robust'])} (epoch {best['epoch']})",
        )  # fmt: skip
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _percent(share: float, ends: Sequence[float], gap: str) -> str:
    return f"{100 * share:.1f}{gap}[{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of a sweep: a line for each model at each point of the grid, means over seeds."""
    told = ("run", "seed", "model", "checks", "clean_accuracy", "class_sizes", "parameters")
    found = ("robust_", "balanced_", "train")
    varied = [key for key in (rows[0] if rows else {}) if key not in told and not key.startswith(found)]
    print_lights([(f"{row['run']}: {row['model']}", row.get("checks", [])) for row in rows])
    points: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        points.setdefault((*(str(row[key]) for key in varied), row["model"]), []).append(row)
    keys = {"clean": "clean_accuracy", "worst": "robust_worst"}
    keys |= {column: f"balanced_{name}" for column, name in shows_balanced(rows).items()}
    columns = dict.fromkeys((*varied, "model"), "left") | dict.fromkeys(("seeds", *keys, "cost"), "right")
    lines = []
    for point, members in points.items():
        shares = [_spread([row[key] for row in members if key in row]) for key in keys.values()]
        costs = [row["training_flops"] for row in members if row["training_flops"] is not None]
        cost = f"{sum(costs) / len(costs):.3g}" if costs else "-"
        believed = all(believable(row.get("checks", [])) for row in members)
        lines.append([*point[:-1], point[-1] if believed else f"! {point[-1]}", str(len(members)), *shares, cost])
    print_table(columns, lines, "accuracy in percent, mean and deviation over seeds; cost in floating-point operations")
    if not all(believable(row.get("checks", [])) for row in rows):
        out.print(DOUBTED)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = sum(values) / len(values)
    deviation = (sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)) ** 0.5
    return f"{100 * mean:.1f}" + (f" +- {100 * deviation:.1f}" if len(values) > 1 else "")


def print_standings(found: Mapping[str, Any]) -> None:
    """Print what `standings` found."""
    rows = found["rows"]
    print_row_lights(rows)
    attacks = list(dict.fromkeys(name for row in rows for name in row["robust_accuracy"] if name != "worst"))
    shown = [*attacks, "worst"] if len(attacks) > 1 else attacks
    even = shows_balanced(rows)
    lines = []
    for row in rows:
        ends, cost = row["intervals"], row["training_cost"]
        lines.append([
            _mark(row) + row["name"], str(len(row["seeds"])),
            _percent(row["clean_accuracy"], ends["clean_accuracy"], " "),
            *(_cell(row, name, " ") for name in shown),
            *(_balanced_cell(row, name) for name in even.values()),
            "-" if row["parameters"] is None else f"{row['parameters']:,}",
            "-" if cost["forward_equivalents"] is None else f"{cost['forward_equivalents']:,.0f}",
            "-" if cost["seconds"] is None else f"{cost['seconds']:,.0f}",
        ])  # fmt: skip
    told = ("seeds", "clean", *shown, *even, "parameters", "cost", "seconds")
    columns = {"model": "left"} | dict.fromkeys(told, "right")
    print_table(columns, lines, "accuracy in percent, 95 % intervals; cost in forward passes of one image")
    out.print("* nothing of equal or lower training cost is better in one accuracy and no worse in the other")
    if not all(believable(row.get("checks", [])) for row in rows):
        out.print(f"{DOUBTED}, and it is not ranked")
    for note in found["notes"]:
        out.print(note, soft_wrap=True)
    pairs = found["pairs"]
    if pairs:
        over_images = {"over images": "right"} if any("images_interval" in pair for pair in pairs) else {}
        print_table(
            {"compared": "left", "accuracy": "left", "difference, 95 % interval": "right", **over_images, "p": "right",
             "verdict": "left", "test": "left"},
            [
                [f"{pair['name']} - {pair['reference']}", pair["accuracy"],
                 f"{pair['difference']:+.1%} {_signed(pair['interval'])}",
                 *(_signed(pair["images_interval"]) if "images_interval" in pair else "-" for _ in over_images),
                 f"{pair['p_value']:.2g}", _verdict(pair), pair["test"]]
                for pair in pairs
            ],
        )  # fmt: skip
        if over_images:
            out.print("over images: of the same difference, were these very runs to face other images")


def _verdict(pair: Mapping[str, Any]) -> str:
    return str(pair["verdict"]) + ("" if pair.get("believable", True) else " (a check failed)")


def _mark(row: Mapping[str, Any]) -> str:
    return "* " if row["pareto"] else "  " if believable(row.get("checks", [])) else "! "


def _signed(ends: Sequence[float]) -> str:
    return f"[{ends[0]:+.1%}, {ends[1]:+.1%}]"
