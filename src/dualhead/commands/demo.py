"""The demonstration: on real digits, what natural training, the base method and DH-AT do under attack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualhead.evaluation import EvaluationProgress
from dualhead.names import BASE
from dualhead.recipe import load_recipe
from dualhead.report import write_report
from dualhead.runs import train
from dualhead.system.files import write_json
from dualhead.training import TrainingProgress

RECIPES = ("digits_natural", "digits")


@dataclass(frozen=True)
class Demonstration:
    """What the demonstration found.

    Args:
        title: of the table.
        rows: as `comparison.json` holds them: natural training, base model, heads, their mean and aggregate.
        remarks: lines to read below the table.
    """

    title: str
    rows: list[dict[str, Any]]
    remarks: list[str]


def run_demo(
    folder: Path,
    *,
    progress: TrainingProgress | None = None,
    evaluation_progress: Callable[[str], EvaluationProgress] | None = None,
    stop: Callable[[], bool] = lambda: False,
    command: str | None = None,
) -> Demonstration:
    """Train the recipes `digits_natural` and `digits` and compare all outputs.

    Args:
        folder: gets a run for each, and `comparison.json`; an interrupted demonstration goes on there.
        progress: told of training.
        evaluation_progress: as in `train`.
        stop: as in `train`.
        command: as in `train`.
    """
    rows: list[dict[str, Any]] = []
    for name in RECIPES:
        result = train(
            load_recipe(name),
            run_dir=folder / name,
            progress=progress,
            evaluation_progress=evaluation_progress,
            stop=stop,
            command=command,
        )
        rows += [row.describe() for row in result.rows]
    rows[0]["name"] = "natural training"
    write_json(folder / "comparison.json", {"rows": rows})
    report = write_report([folder / name for name in RECIPES], folder / "report.html")
    samples, recipe = result.rows[0].evaluation.num_samples, load_recipe("digits")
    title = (
        f"digits, {samples} test images, {recipe.threat.kind} eps {recipe.threat.eps:g}, "
        "accuracy in percent with 95 % intervals"
    )
    natural, base = rows[0], next(row for row in rows if row["output"] == BASE)
    remarks = [
        f"PGD-40 leaves natural training {_robust(natural):.1%} of the images, TRADES {_robust(base):.1%}.",
        "head 1 is the base model: later stages leave it untouched.",
        f"Report: {report}",
        f"The runs lie in {folder}; try `dualhead evaluate {folder / 'digits'} --attack pgd-100 --eps 0.1`.",
    ]
    return Demonstration(title, rows, remarks)


def _robust(row: dict[str, Any]) -> float:
    return float(row["robust_accuracy"]["worst"])
