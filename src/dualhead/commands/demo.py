"""The demonstration: on real digits, guided distillation beside its base method at equal training cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualhead.evaluation import EvaluationProgress
from dualhead.recipe import load_recipe
from dualhead.report import write_report
from dualhead.runs import read_entries, standings, train
from dualhead.system.files import write_json
from dualhead.training import TrainingProgress

NATURAL, BASE, GUIDED = RECIPES = ("digits_natural", "digits_base", "digits_guided_distillation")
_CALLED = {NATURAL: "natural training", BASE: "TRADES"}


@dataclass(frozen=True)
class Demonstration:
    """Results of the demonstration.

    Args:
        title: of the table.
        rows: as `comparison.json` holds them: natural training, TRADES, both heads of guided distillation, their mean.
        remarks: lines to read below the table; the first is the comparison at equal training cost.
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
    """Train the recipes of the demonstration and compare all outputs.

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
        rows += [{**row.describe(), **({"name": _CALLED[name]} if name in _CALLED else {})} for row in result.rows]
    compared = standings(read_entries([folder / BASE, folder / GUIDED]))
    base = next(row for row in compared["rows"] if row["name"].startswith(BASE))
    guided = next(row for row in compared["rows"] if row["deployed"] and row is not base)
    write_json(folder / "comparison.json", {"rows": rows, "pairs": compared["pairs"]})
    report = write_report([folder / name for name in RECIPES], folder / "report.html")
    samples, recipe = result.rows[0].evaluation.num_samples, load_recipe(GUIDED)
    title = (
        f"digits, {samples} test images, {recipe.threat.kind} eps {recipe.threat.eps:g}, "
        "accuracy in percent with 95 % intervals"
    )
    remarks = [
        honest_comparison({str(pair["accuracy"]): pair for pair in compared["pairs"]}, _cost(guided) / _cost(base)),
        "A gain is measured where more epochs of TRADES no longer help, on CIFAR-10: see docs/results.md.",
        f"TRADES keeps {_robust(rows[1]):.1%} of the images under PGD-40, natural training {_robust(rows[0]):.1%}.",
        f"Report: {report}",
        f"The runs lie in {folder}; try `dualhead evaluate {folder / GUIDED} --attack pgd-100 --eps 0.1`.",
    ]
    return Demonstration(title, rows, remarks)


def honest_comparison(pairs: Mapping[str, Mapping[str, Any]], cost: float) -> str:
    """Return what guided distillation adds to its base method, as a sentence with intervals and a verdict.

    Args:
        pairs: by accuracy, `clean` and `pgd-40`: difference, interval, p-value and verdict, as `compare` finds them.
        cost: of its training, in multiples of the base method's.
    """

    def told(accuracy: str) -> str:
        low, high = pairs[accuracy]["interval"]
        difference = f"{100 * pairs[accuracy]['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        return f"{difference} points (p = {pairs[accuracy]['p_value']:.2g}, {meant[str(pairs[accuracy]['verdict'])]})"

    meant = {"undecided": "undecided", "gain": "a gain", "loss": "a loss"}
    return (
        f"At {cost:.2f} times the training cost of TRADES, its base method, guided distillation differs from it in "
        f"clean accuracy by {told('clean')} and in robust accuracy by {told('pgd-40')}."
    )


def _cost(row: Mapping[str, Any]) -> float:
    return float(row["training_cost"]["flops"])


def _robust(row: Mapping[str, Any]) -> float:
    return float(row["robust_accuracy"]["worst"])
