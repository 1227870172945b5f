"""A grid of runs over settings and seeds: trained in turn, resumed where it was stopped, collected in one table."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualhead.errors import RunError, UserError
from dualhead.recipe import Recipe, load_recipe
from dualhead.report import measured_in
from dualhead.runs import RunFolder, changes, train
from dualhead.system.files import check_folder, shortened_name, write_json, write_text
from dualhead.training import TrainingProgress

TABLE = "sweep"
"""Name of the table's files, `sweep.csv` and `sweep.json`."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Args:
        name: of its folder.
        settings: what tells it from the others: KEY to text, without the seed.
        seed: `runtime.seed`.
        recipe: in full.
    """

    name: str
    settings: dict[str, str]
    seed: int
    recipe: Recipe


def plan(recipe: str, settings: Sequence[str], seeds: int = 1, plugins: Sequence[str] = ()) -> list[Job]:
    """All runs of a grid; every recipe is read before anything starts.

    Args:
        recipe: name of a shipped one, or path.
        settings: `KEY=A,B,C` with a dotted key for each axis, `KEY=A` for what all share; commas within brackets,
            braces or quotes separate nothing.
        seeds: runs of each point of the grid, with seeds 0, 1, ...
        plugins: as for `load_recipe`.

    Raises:
        UserError: for a setting that is not understood, or a recipe that cannot be.
    """
    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {seeds}")
    axes: dict[str, list[str]] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        values = split_values(text)
        if not equals or not key or not all(values):
            raise UserError(f"{setting!r} is not understood; write KEY=A,B,C, e.g. stages.main_head.objective.beta=3,6")
        if key in axes or key == "runtime.seed":
            raise UserError(f"{key}: " + ("use --seeds" if key == "runtime.seed" else "is given twice"))
        axes[key] = values
    varied = [key for key, values in axes.items() if len(values) > 1]
    jobs = []
    for point in itertools.product(*axes.values()):
        chosen = dict(zip(axes, point, strict=True))
        told = {key: chosen[key] for key in varied}
        for seed in range(seeds):
            overrides = [*(f"{key}={value}" for key, value in chosen.items()), f"runtime.seed={seed}"]
            jobs.append(Job(_name(told, seed), told, seed, load_recipe(recipe, overrides, plugins)))
    twice = {job.name for job in jobs if [other.name for other in jobs].count(job.name) > 1}
    if twice:
        raise UserError(f"two runs would be called {min(twice)}; a value is given twice")
    return jobs


def split_values(text: str) -> list[str]:
    """Text at its commas, except for those within brackets, braces or quotes."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        depth += (character in "[{") - (character in "]}")
        if character == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += character
    return [value.strip() for value in values]


def _name(settings: dict[str, str], seed: int) -> str:
    words = [f"{key}={value}" for key, value in settings.items()] + [f"seed={seed}"]
    return shortened_name(re.sub(r"[^A-Za-z0-9_.=,-]+", "-", ",".join(words).replace("*", "all")))


def run_sweep(
    jobs: Sequence[Job],
    folder: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    progress: TrainingProgress | None = None,
    tell: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] = lambda: False,
    command: str | None = None,
) -> list[dict[str, Any]]:
    """Do the runs that are not done yet, and write the table after each.

    Args:
        jobs: what `plan` gave.
        folder: gets a folder for each run, `sweep.csv` and `sweep.json`.
        shard: (i, n): only every n-th job from the i-th on, for n processes or jobs of a scheduler beside one another.
        progress: told of training.
        tell: given a line for each run.
        stop: as in `train`.
        command: what the user typed.

    Returns:
        The table as far as it is done, as `collect` gives it.

    Raises:
        Interrupted: when stopped.
        UserError: if the folder holds runs of another recipe; or if runs have failed, all for bad input.
        RunError: if runs have failed; the others are done first.
    """
    refuse_other_runs(jobs, folder)
    failed: list[str] = []
    wrong = 0
    for number, job in list(enumerate(jobs))[shard[0] :: shard[1]]:
        place = folder / job.name
        if RunFolder(place).report.is_file():
            tell(f"run {number + 1}/{len(jobs)}: {job.name}: done already")
            continue
        tell(f"run {number + 1}/{len(jobs)}: {job.name}")
        try:
            train(job.recipe, run_dir=place, progress=progress, stop=stop, command=command)
        except (RunError, UserError) as error:
            wrong += isinstance(error, UserError)
            failed.append(f"{job.name}: {error}")
            tell(f"failed: {failed[-1]}")
        write_table(jobs, folder)
    rows = write_table(jobs, folder)
    if failed:
        raise (UserError if wrong == len(failed) else RunError)(
            f"{len(failed)} of {len(jobs)} runs failed, the others are done; the first: {failed[0]}"
        )
    return rows


def refuse_other_runs(jobs: Sequence[Job], folder: Path) -> None:
    """Refuse a folder in which a run of one of these names is of another recipe, before anything starts.

    Raises:
        UserError: naming the run, and what differs.
    """
    check_folder(folder, "--out")
    for job in jobs:
        if RunFolder(folder / job.name).begun:  # what else may lie there, its own run finds
            changes(folder / job.name, job.recipe, "--out")


def collect(jobs: Sequence[Job], folder: Path) -> list[dict[str, Any]]:
    """Return a record for each output of each finished run: settings, seed, model, checks, accuracies and cost.

    `model` is the output; the section `model` of recipes, where it is varied as a whole, is `recipe.model`.
    """
    records = []
    for job in jobs:
        path = RunFolder(folder / job.name).comparison
        if not path.is_file():
            continue
        settings = {"recipe.model" if key == "model" else key: value for key, value in job.settings.items()}
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            even = {f"balanced_{name}": value for name, value in row.get("balanced_accuracy", {}).items()}
            robust = {f"robust_{name}": value for name, value in row["robust_accuracy"].items()}
            worn = {f"measured_{name}": told["accuracy"] for name, told in measured_in(row).items()}
            records.append(
                {
                    "run": job.name, **settings, "seed": job.seed, "model": row["name"],
                    "checks": row.get("checks", []),
                    "clean_accuracy": row["clean_accuracy"], **robust, **worn, **even,
                    **({"class_sizes": row["class_sizes"]} if even else {}), "parameters": row["parameters"],
                    **{f"training_{name}": value for name, value in row["training_cost"].items()},
                }
            )  # fmt: skip
    return records


def _checks_text(checks: Sequence[dict[str, str]]) -> str:
    """Return failed and warning checks as a cell holds them: `failed zero_gradient; warning curve`."""
    return "; ".join(f"{check['status']} {check['name']}" for check in checks)


def write_table(jobs: Sequence[Job], folder: Path) -> list[dict[str, Any]]:
    """Write what is finished to `sweep.csv` and `sweep.json`, and give it."""
    records = collect(jobs, folder)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(k for r in records for k in r)), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**record, "checks": _checks_text(record["checks"])} for record in records)
    write_text(folder / f"{TABLE}.csv", file.getvalue())
    write_json(folder / f"{TABLE}.json", {"runs": len(jobs), "rows": records})
    return records
