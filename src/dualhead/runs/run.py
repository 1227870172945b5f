"""Train as a recipe says and measure what came of it: the order of events."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dualhead.errors import UserError
from dualhead.evaluation import EvaluationProgress
from dualhead.recipe import Overrides, Recipe, load_recipe
from dualhead.report import rows_html, rows_text, sequence_text, write_report
from dualhead.runs.crafting import craft
from dualhead.runs.folder import RunFolder, taken
from dualhead.runs.measure import Row, measure
from dualhead.runs.prepare import prepare
from dualhead.runs.stages import train_stages
from dualhead.saving import remember, view
from dualhead.system.processes import group
from dualhead.training import Silent, TrainingProgress


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Args:
        run_dir: the folder that holds it.
        model: the deployed classifier, in eval mode.
        rows: the evaluations, the deployed one last.
    """

    run_dir: Path
    model: nn.Module
    rows: tuple[Row, ...]

    def report(self, *, open: bool = False) -> Path:
        """Write the report anew, and show it in a browser if asked to.

        Args:
            open: show it.

        Returns:
            The file, one page of HTML.
        """
        path = RunFolder(self.run_dir).report
        write_report([self.run_dir], path)
        if open:
            webbrowser.open(path.absolute().as_uri())
        return path

    @property
    def sequence(self) -> dict[str, Any] | None:
        """Return what came of threats one after another, as `results.json` has it; None without a `sequence`."""
        found: dict[str, Any] | None = self.rows[-1].evaluation.results.get("sequence")
        return found

    def __str__(self) -> str:
        told = rows_text([row.describe() for row in self.rows])
        return told if self.sequence is None else f"{told}\n\n{sequence_text(self.sequence)}"

    def __repr__(self) -> str:
        return f"RunResult({str(self.run_dir)!r}, {len(self.rows)} rows)"

    def _repr_html_(self) -> str:
        return rows_html([row.describe() for row in self.rows])


def train(
    recipe: Recipe | str | Path,
    overrides: Overrides = (),
    *,
    plugins: str | Sequence[str] = (),
    run_dir: str | Path | None = None,
    progress: TrainingProgress | None = None,
    evaluation_progress: Callable[[str], EvaluationProgress] | None = None,
    stop: Callable[[], bool] = lambda: False,
    command: str | None = None,
    profile: bool = False,
    begin_with: nn.Module | None = None,
) -> RunResult:
    """Train as a recipe says and evaluate what came of it; in a folder with an unfinished run, go on with it.

    In a group of processes (`dualhead.system.processes`) each calls this with the same arguments and trains on its
    share of every batch; the first one writes, and is the only one to tell of progress.

    Args:
        recipe: a recipe, the name of a shipped one, or a path to a YAML file.
        overrides: of a recipe by name or path, as `load_recipe` takes them.
        plugins: a file or module that registers components, or several, besides those that a recipe by name or path
            names.
        run_dir: the run's folder; None for `runs/NAME`.
        progress: told of stages, steps and epochs.
        evaluation_progress: gives, for the name of a row, who is told of its evaluation.
        stop: asked after every step; when true the run saves itself and raises `Interrupted`.
        command: what the user typed, kept with the results.
        profile: look at a few steps of each stage, and leave what takes how long in the run's folder, in `profile`.
        begin_with: a network whose weights the run begins with, as `dualhead.fit` has it; None for fresh ones.

    Raises:
        UserError: for a bad recipe, bad data, or a folder that holds another run or where another process works;
            nothing is written then.
        Interrupted: when stopped.
        RunError: when training fails.
    """
    recipe, processes = _read(recipe, overrides, plugins), group()
    if not processes.first:
        progress = evaluation_progress = None
    path = Path(run_dir) if run_dir is not None else Path("runs") / recipe.name
    craft(recipe, path, progress or Silent(), stop)
    prepared = prepare(recipe, path, begin_with)
    folder = prepared.folder
    with taken(folder):
        model = train_stages(prepared, progress or Silent(), stop, profile=profile)
        rows = measure(prepared, model, evaluation_progress, stop, command=command)
    processes.lead(lambda: write_report([folder.path], folder.report))
    deployed = view(model, prepared.output)
    remember(deployed, model, prepared.architecture, prepared.facts)
    return RunResult(folder.path, deployed, tuple(rows))


def _read(recipe: Recipe | str | Path, overrides: Overrides, plugins: str | Sequence[str]) -> Recipe:
    if isinstance(recipe, nn.Module):
        raise UserError(f"recipe: got a network ({type(recipe).__name__}); dualhead.fit(model, ...) trains one")
    if not isinstance(recipe, Recipe):
        return load_recipe(str(recipe), overrides, plugins)
    if overrides or plugins:
        what = "overrides" if overrides else "plugins"
        raise UserError(f"{what} apply to a recipe by name or path, not to one that is built already")
    return recipe
