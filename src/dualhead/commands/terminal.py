"""Output in a terminal: progress bars, or plain lines where there is no terminal, and tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from dualhead.commands.left import TimeLeft
from dualhead.evaluation import Evaluation
from dualhead.recipe import Recipe
from dualhead.report import (
    OLD_ATTACKS,
    SAMPLE_ROWS,
    accuracy_columns,
    balanced_columns,
    believable,
    duration,
    eps_texts,
    evaluation_row,
    judge_name,
    light_lines,
    measured_in,
    measured_title,
    points,
    sequence_cells,
    share_cell,
    threat_text,
)
from dualhead.runs import Trial
from dualhead.statistics import mean_std, overfits_single_steps

err = Console(stderr=True, highlight=False, markup=False)  # brackets in names are no markup
# A file or a pipe has no width to fit into; a table in it must not lose columns.
out = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)

REFRESH_SECONDS = 0.5
OVERFITS = "  overfits single steps"
DOUBTED = "! a check failed, see above: its accuracies are not to be believed"


LEAST_TEXT = 8
"""Columns that a name gets at least; where there are fewer, rows are printed as lists."""


class NumberTable:
    """A table whose numbers stay whole at any width: names fold, and where that is not enough each row is a list.

    Args:
        columns: name of each, and how it is justified; those to the left hold words, which may fold.
        title: above it.
    """

    def __init__(self, columns: Mapping[str, Any], title: str | None = None) -> None:
        self._columns = dict(columns)
        self._title = title
        self._rows: list[tuple[str, ...]] = []

    def add_row(self, *cells: str) -> None:
        """Add a row, of a cell for each column."""
        self._rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, or the lists."""
        frame = 3 * len(self._columns) + 1
        cells = list(zip(*self._rows, strict=True)) or [()] * len(self._columns)
        whole = [
            max(len(line) for text in (name, *column) for line in text.split("\n"))
            for name, column in zip(self._columns, cells, strict=True)
        ]
        least = [
            max(len(word) for text in (name, *column) for word in text.split() or [""])
            for name, column in zip(self._columns, cells, strict=True)
        ]
        words = [justify == "left" for justify in self._columns.values()]
        widths = whole
        if sum(whole) + frame > options.max_width:
            room = options.max_width - frame - sum(size for size, word in zip(least, words, strict=True) if not word)
            share = room // max(1, sum(words))
            if share < LEAST_TEXT:
                yield from self._lists()
                return
            widths = [min(full, share) if word else size
                      for full, size, word in zip(whole, least, words, strict=True)]  # fmt: skip
        table = Table(title=self._title, title_justify="left")
        for (name, justify), width in zip(self._columns.items(), widths, strict=True):
            table.add_column(name, justify=justify, overflow="fold", width=width)
        for row in self._rows:
            table.add_row(*row)
        yield table

    def _lists(self) -> Iterator[Text]:
        if self._title:
            yield Text(self._title)
        first, *others = self._columns
        for name, *cells in self._rows:
            yield Text(f"{first}: {name}")
            for column, cell in zip(others, cells, strict=True):
                yield Text(f"  {column}: {cell}".replace("\n", " "))


class TrainingDisplay:
    """Draws training: stage, epoch, loss, clean and robust validation accuracy, time left of stage and run.

    Args:
        bar: to draw in; None: lines are printed.
        recipe: of the run, by which the time of what is still to come is judged; None: it is not told.
    """

    def __init__(self, bar: Progress | None, recipe: Recipe | None = None) -> None:
        self._bar = bar
        self._left = None if recipe is None else TimeLeft(recipe)
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
        if self._left is not None:
            self._left.stage(number - 1, steps, done)
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(self._label, total=epochs * steps, completed=done)
        else:
            err.print(f"stage {self._label}: {epochs} epochs of {steps} steps", soft_wrap=True)

    def step(self, epoch: int, loss: Tensor) -> None:
        """See `TrainingProgress.step`. The loss is read twice a second, not at every step."""
        self._pending += 1
        if self._left is not None:
            self._left.step()
        if self._bar is None or self._task is None or time.monotonic() - self._drawn < REFRESH_SECONDS:
            return
        text = (
            f"{self._label}  epoch {epoch}/{self._epochs}  loss {float(loss):.3f}{self._accuracy}{self._in_all('  ')}"
        )
        self._bar.update(self._task, description=text, advance=self._pending)
        self._drawn, self._pending = time.monotonic(), 0

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """See `TrainingProgress.epoch`."""
        if "validation_robust" in metrics:
            clean, robust = metrics["validation_clean"], metrics["validation_robust"]
            self._accuracy = f"  clean {clean:.1%}  robust {robust:.1%}"
            if metrics.get("validation_largest_answer", 0.0) == 1.0:
                self._accuracy += "  all answers are one class"
        if "watched_fgsm" in metrics and overfits_single_steps(metrics["watched_fgsm"], metrics["watched_pgd"]):
            self._accuracy = f"{self._accuracy.removesuffix(OVERFITS)}{OVERFITS}"
        else:
            self._accuracy = self._accuracy.removesuffix(OVERFITS)
        if self._bar is None:
            err.print(
                f"stage {self._label}: epoch {metrics['epoch']}/{self._epochs}, loss {metrics['loss']:.3f}"
                f"{self._accuracy.replace('  ', ', ')}, {metrics['seconds']:.0f} s{self._in_all(', ')}",
                soft_wrap=True,
            )
        elif self._task is not None:
            self._bar.update(self._task, advance=self._pending)
            self._pending = 0

    def _in_all(self, gap: str) -> str:
        seconds = None if self._left is None else self._left.seconds()
        return "" if seconds is None else f"{gap}about {duration(seconds)} left in all"


class EvaluationDisplay:
    """Draws an evaluation: attack, accuracy under it so far, tries left, time left."""

    def __init__(self, bar: Progress | None, row: str) -> None:
        self._bar = bar
        self._row = row
        self._tasks: dict[str, TaskID] = {}
        self._told: set[str] = set()

    def update(self, attack: str, done: int, total: int, robust_so_far: float) -> None:
        """See `EvaluationProgress.update`."""
        text = f"{self._row}: {attack}  correct {robust_so_far:.1%}"
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
    table = NumberTable(columns, title)
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


def accuracy_table(title: str, rows: Sequence[Mapping[str, Any]]) -> NumberTable:
    """Return a table of accuracies with their 95 % intervals.

    Args:
        title: above it.
        rows: as `comparison.json` holds them.
    """
    columns = accuracy_columns(rows)
    table = NumberTable({"model": "left"} | dict.fromkeys(columns, "right"), title)
    gap = "\n" if len(columns) > 3 else " "  # many fit a narrow terminal only with the interval below the share
    for row, *cells in zip(rows, *columns.values(), strict=True):
        table.add_row(row["name"], *(cell.whole(gap) for cell in cells))
    return table


def print_sequence(told: Mapping[str, Any]) -> None:
    """Print what came of threats one after another: the matrix, and below it the measures.

    Args:
        told: as `results.json` holds it under `sequence`.
    """
    columns, cells = sequence_cells(told)
    matrix = 3 + len(told["threats"]) + 1  # stage, old attacks, clean, threats, union
    for first, end, title in ((2, matrix, OLD_ATTACKS.get(told["old_attacks"], "")), (matrix, len(columns), None)):
        names = columns[:2] + columns[first:end]
        rows = [
            [cell.text for cell in row[:2]] + [f"{cell.text}\n{cell.note}".strip() for cell in row[first:end]]
            for row in cells
        ]
        print_table(dict.fromkeys(names[:2], "left") | dict.fromkeys(names[2:], "right"), rows, title)


def print_changed(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print accuracies on changed images by kind, a table for each measurement, such as `corruptions`, and rendering.

    Args:
        rows: as `comparison.json` holds them, with measurements as `results.json` does.
    """
    found = {row["name"]: measured_in(row) for row in rows}
    titles = {model: {name: measured_title(of) for name, of in told.items()} for model, told in found.items()}
    for name, title in dict.fromkeys(pair for told in titles.values() for pair in told.items()):
        told = {model: found[model][name] for model in found if titles[model].get(name) == title}
        kinds = dict.fromkeys(kind for each in told.values() for kind in each["kinds"])
        table = Table(title=f"{title}; percent, 95 % intervals", title_justify="left")
        table.add_column("kind")
        for model in told:
            table.add_column(model, justify="right", overflow="fold")
        for kind in kinds:
            shares = [each["kinds"].get(kind, {}) for each in told.values()]
            cells = [share_cell(each.get("accuracy"), each.get("interval")) for each in shares]
            table.add_row(kind.replace("_", " "), *(cell.whole() for cell in cells))
        out.print(table)


def stage_table(stages: Sequence[Mapping[str, Any]]) -> NumberTable:
    """Return a table of the stages of a run, as `report.summary` tells them."""
    table = NumberTable(
        {"stage": "left", "state": "left"}
        | dict.fromkeys(("epoch", "time", "clean", "robust", "best robust"), "right"),
        "stages, accuracy in percent on held-out training images",
    )
    for stage in stages:
        best, last, seconds = stage["best"], stage["last"], stage["seconds"]
        table.add_row(
            str(stage["name"]), stage["state"], f"{stage['epoch']}/{stage['epochs']}",
            "-" if seconds is None else f"{seconds:.0f} s",
            *(share_cell(last[key]).text for key in ("clean", "robust")),
            "-" if best is None else f"{share_cell(best['robust']).text} (epoch {best['epoch']})",
        )  # fmt: skip
    return table


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of a sweep: a line for each model at each point of the grid, means over seeds."""
    told = ("run", "seed", "model", "checks", "clean_accuracy", "class_sizes", "parameters")
    found = ("robust_", "balanced_", "measured_", "train")
    varied = [key for key in (rows[0] if rows else {}) if key not in told and not key.startswith(found)]
    print_lights([(f"{row['run']}: {row['model']}", row.get("checks", [])) for row in rows])
    points: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        points.setdefault((*(str(row[key]) for key in varied), row["model"]), []).append(row)
    keys = {"clean": "clean_accuracy", "worst": "robust_worst"}
    measured = dict.fromkeys(key for row in rows for key in row if key.startswith("measured_"))
    keys |= {key.removeprefix("measured_"): key for key in measured}
    keys |= {column: f"balanced_{name}" for column, name in balanced_columns(rows).items()}
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
    mean, deviation = mean_std(values)
    return f"{100 * mean:.1f}" + (f" +- {100 * deviation:.1f}" if len(values) > 1 else "")


def print_standings(found: Mapping[str, Any]) -> None:
    """Print what `standings` found."""
    rows = found["rows"]
    print_row_lights(rows)
    shares = accuracy_columns(rows)
    lines = []
    for row, *cells in zip(rows, *shares.values(), strict=True):
        cost = row["training_cost"]
        lines.append([
            _mark(row) + row["name"], str(len(row["seeds"])), *(cell.whole() for cell in cells),
            "-" if row["parameters"] is None else f"{row['parameters']:,}",
            "-" if cost["forward_equivalents"] is None else f"{cost['forward_equivalents']:,.0f}",
            "-" if cost["seconds"] is None else f"{cost['seconds']:,.0f}",
        ])  # fmt: skip
    columns = {"model": "left"} | dict.fromkeys(("seeds", *shares, "parameters", "cost", "seconds"), "right")
    print_table(columns, lines, "accuracy in percent, 95 % intervals; cost in forward passes of one image")
    print_changed(rows)
    out.print("* nothing of equal or lower training cost is better in one accuracy and no worse in the other")
    if not all(believable(row.get("checks", [])) for row in rows):
        out.print(f"{DOUBTED}, and it is not ranked")
    for note in found["notes"]:
        out.print(note, soft_wrap=True)
    pairs = found["pairs"]
    if pairs:
        over_images = {"over images": "right"} if any("images_interval" in pair for pair in pairs) else {}
        print_table(
            {"compared": "left", "accuracy": "left", "points, 95 % interval": "right", **over_images, "p": "right",
             "verdict": "left", "test": "left"},
            [
                [f"{pair['name']} - {pair['reference']}", pair["accuracy"],
                 f"{points(pair['difference'])} {_signed(pair['interval'])}",
                 *(_signed(pair["images_interval"]) if "images_interval" in pair else "-" for _ in over_images),
                 f"{pair['p_value']:.2g}", _verdict(pair), pair["test"]]
                for pair in pairs
            ],
        )  # fmt: skip
        if over_images:
            out.print("over images: of the same difference, were these very runs to face other images")


def print_samples(found: Mapping[str, Any]) -> None:
    """Print what `compare_samples` found: a row for each measure, a column for each classifier, and paired tests."""
    forms = {key: (name, form) for name, key, form in SAMPLE_ROWS} | {
        "diversity": ("diversity within classes", "{:.2f}"), "judge_agreement": ("judge names the class", "{:.1%}"),
    }  # fmt: skip
    rows = found["rows"]
    if rows:
        title = (
            f"{found['samples']:,} samples against {found['test_images']:,} test images, judge "
            f"{judge_name(found['judge'])}; 95 % intervals"
        )
        table = Table(title=title, title_justify="left")
        table.add_column("measure")
        for row in rows:
            table.add_column(row["name"], justify="right", overflow="fold")
        table.add_column("training images", justify="right", overflow="fold")
        table.add_row("seeds", *(str(len(row["seeds"])) for row in rows), "-")
        table.add_row("steps", *(", ".join(map(str, row["steps"])) for row in rows), "-")
        for key, (name, form) in forms.items():
            floor = form.format(found["floor"][key]) if key in found["floor"] else "-"
            table.add_row(name, *(_ended(row["values"][key], row["intervals"].get(key), form) for row in rows), floor)
        out.print(table)
    if found["pairs"]:
        print_table(
            {"compared": "left", "samples": "left", "difference, 95 % interval": "right", "p": "right",
             "verdict": "left", "test": "left"},
            [
                [f"{pair['name']} - {pair['reference']}", forms[pair["measure"]][0],
                 _ended(pair["difference"], pair["interval"], forms[pair["measure"]][1].replace("{:", "{:+")),
                 f"{pair['p_value']:.2g}", pair["verdict"], pair["test"]]
                for pair in found["pairs"]
            ],
        )  # fmt: skip
    for note in found["notes"]:
        out.print(note, soft_wrap=True)


def _ended(value: float, ends: Sequence[float] | None, form: str) -> str:
    """A number with its interval, if there is one."""
    told = form.format(value)
    return told if not ends else f"{told} [{form.format(ends[0])}, {form.format(ends[1])}]"


def print_sequences(found: Sequence[Mapping[str, Any]]) -> None:
    """Print what `sequences` found: what is left under each threat at the end, and what was forgotten."""
    if not found:
        return
    threats = list(dict.fromkeys(name for each in found for name in each["threats"]))
    shares = {"clean": "clean_accuracy", **{name: f"robust {name}" for name in threats}, "union": "union",
              "seen": "average_seen"}  # fmt: skip
    differences = {"forgetting": "forgetting", "plasticity": "plasticity"}

    def cell(each: Mapping[str, Any], key: str, *, signed: bool) -> str:
        value, reach = each["means"].get(key), each["spread"].get(key)
        if value is None:
            return "-"
        told = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
        return told if reach is None else f"{told} ± {100 * reach:.1f}"

    rows = [
        [each["name"], " ".join(each["order"]), each["old_attacks"] or "-", str(len(each["seeds"])),
         *(cell(each, key, signed=False) for key in shares.values()),
         *(cell(each, key, signed=True) for key in differences.values()),
         f"{each['means']['forward_equivalents']:,.0f}"]
        for each in found
    ]  # fmt: skip
    left = dict.fromkeys(("model", "threats", "old attacks"), "left")
    right = dict.fromkeys(("seeds", *shares, *differences, "passes"), "right")
    print_table(left | right, rows, "threats one after another, at the end: percent and points; ± 95 % over seeds")


def _verdict(pair: Mapping[str, Any]) -> str:
    return str(pair["verdict"]) + ("" if pair.get("believable", True) else " (a check failed)")


def _mark(row: Mapping[str, Any]) -> str:
    return "* " if row["pareto"] else "  " if believable(row.get("checks", [])) else "! "


def _signed(ends: Sequence[float]) -> str:
    return f"[{points(ends[0])}, {points(ends[1])}]"


def print_costs(trial: Trial) -> None:
    """Print what a trial of a few steps says of the cost of training."""
    columns = {"stage": "left"} | dict.fromkeys(("epochs", "steps", "forward passes", "time"), "right")
    rows = [
        [stage.name, str(stage.epochs), f"{stage.steps * stage.epochs:,}", f"{stage.forward_equivalents:,.0f}",
         duration(stage.seconds)]
        for stage in trial.stages
    ]  # fmt: skip
    rows.append(["all", "", "", f"{trial.forward_equivalents:,.0f}", duration(trial.seconds)])
    print_table(columns, rows, "cost in forward passes of one image, time on this machine as busy as it is")
    out.print("validation and the evaluation come on top", soft_wrap=True)


def print_runs(found: Sequence[Mapping[str, Any]]) -> None:
    """Print runs as `list_of` gives them."""
    print_lights([(run["run"], run["checks"]) for run in found])
    columns = {"run": "left", "recipe": "left", "state": "left"} | dict.fromkeys(("epochs", "clean", "worst"), "right")
    rows = []
    for run in found:
        robust, ends = run["robust_accuracy"] or {}, run["intervals"] or {}
        shares = (run["clean_accuracy"], ends.get("clean_accuracy")), (robust.get("worst"), ends.get("worst"))
        state = f"{run['state']}, at work" if run["at_work"] else run["state"]
        rows.append([
            run["run"], str(run["recipe"] or "-"), state, f"{run['epoch']}/{run['epochs']}",
            *(share_cell(*share).whole() for share in shares),
        ])  # fmt: skip
    print_table(columns, rows, "deployed models on test images, percent, 95 % intervals")
    for run in found:
        for note in run["notes"]:
            out.print(f"{run['run']}: {note}", soft_wrap=True, markup=False)


def table_title(evaluation: Evaluation) -> str:
    """Return the title of a table of accuracies: how many images were attacked within what."""
    met = f"{evaluation.num_samples:,} test images, {threat_text(evaluation.results['threat'])}"
    return f"{met}; percent, 95 % intervals"


def print_evaluation(name: str, evaluation: Evaluation) -> None:
    """Print all that an evaluation says, its checks that are not fine first.

    Args:
        name: of the model.
        evaluation: of it.
    """
    results, rows = evaluation.results, [evaluation_row(name, evaluation.results)]
    print_lights([("", evaluation.checks)])
    out.print(accuracy_table(table_title(evaluation), rows))
    print_changed(rows)
    for line in [*_under_each(results), *_targeted(results), *_transfer(results)]:
        out.print(line, soft_wrap=True)
    curve = results.get("curve", [])
    radii = eps_texts([point["eps"] for point in curve], results["threat"].get("norm"))
    for point, radius in zip(curve, radii, strict=True):
        robust, ends = point["robust_accuracy"]["worst"], point["intervals"]["worst"]
        out.print(f"eps {radius}: {robust:.1%} [{ends[0]:.1%}, {ends[1]:.1%}]")
    for attack, record in results["attacks"].items():
        for note in record["notes"]:
            out.print(note if note.startswith(f"{attack}: ") else f"{attack}: {note}", soft_wrap=True)
    for table in _further_tables(results):
        out.print(table)
    for line in _further_lines(results):
        out.print(line, soft_wrap=True, style="yellow")


def _under_each(results: Mapping[str, Any]) -> list[str]:
    """Return lines on the accuracy under each of several threats, under one on average, and what was left out."""
    if "threats" not in results:
        return []
    lines = [
        f"{label}: {told['robust_accuracy']:.1%} [{told['interval'][0]:.1%}, {told['interval'][1]:.1%}]"
        for label, told in results["threats"].items()
    ]
    return [*lines, f"average: {results['average']:.1%}", *results["left_out"]]


def _targeted(results: Mapping[str, Any]) -> list[str]:
    """Return a line on how often each targeted attack got the answer that it wanted."""
    lines = []
    for name, record in results["attacks"].items():
        told = record.get("targeted")
        if told and told["attacked"]:
            low, high = told["interval"]
            share = f"{told['success']:.1%} [{low:.1%}, {high:.1%}]"
            lines.append(f"{name}: got its target for an answer on {share} of {told['attacked']:,} attacked images")
    return lines


def _transfer(results: Mapping[str, Any]) -> list[str]:
    """Return a line on what images made against another network alone say."""
    told = results.get("transfer")
    return [f"transfer: {told['note']}"] if told else []


def _further_tables(results: Mapping[str, Any]) -> list[NumberTable]:
    """Return tables of samples and of images out of distribution; none where neither was measured."""
    return [
        *([_generation_table(results["generation"])] if results.get("generation") else []),
        *([_ood_table(results["ood"])] if results.get("ood") else []),
    ]


def _generation_table(told: Mapping[str, Any]) -> NumberTable:
    title = (
        f"{told['samples']:,} samples, {told['steps']} steps of {told['step_size']:g} from {told['seeds']}; judge "
        f"{judge_name(told['judge'])}, {told['judge']['accuracy']:.1%} right; beside them as many training images"
        + (f"; checkpoint {told['checkpoint']['chosen']}" if told.get("checkpoint") else "")
    )
    table = NumberTable({"measure, against test images": "left", "samples": "right", "training images": "right"}, title)
    for name, key, digits in SAMPLE_ROWS:
        table.add_row(name, *(_with_ends(each, key, digits) for each in (told, told["floor"])))
    near = told["nearest"]
    table.add_row("distance to nearest training image (test: " + f"{near['test']:.3g})", f"{near['samples']:.3g}", "-")
    table.add_row("diversity within classes, of test images' own", f"{told['diversity']:.2f}", "-")
    table.add_row("judge names the class", f"{told['judge_agreement']:.1%}", "-")
    return table


def _further_lines(results: Mapping[str, Any]) -> list[str]:
    """Return a line for each check of samples that is not fine."""
    checks = (results.get("generation") or {}).get("checks", [])
    return [f"{each['name'].replace('_', ' ')}: {each['message']}" for each in checks if each["status"] != "ok"]


def _with_ends(told: Mapping[str, Any], key: str, digits: str) -> str:
    return _ended(told[key], told.get(f"{key}_interval"), digits)


def _ood_table(told: Mapping[str, Any]) -> NumberTable:
    title = (
        f"AUROC against {told['test_images']} test images; attacked: {told['attack']}, {threat_text(told['threat'])}"
    )
    table = NumberTable({"source": "left", "score": "left", "clean": "right", "attacked": "right"}, title)
    for source, found in told["sources"].items():
        for score, each in found["scores"].items():
            pairs = ((each["auroc"], each["interval"]), (each["auroc_attacked"], each["interval_attacked"]))
            table.add_row(source, score, *(f"{v:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]" for v, ends in pairs))
    return table
