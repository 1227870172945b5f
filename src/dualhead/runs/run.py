"""Train as a recipe says and measure what came of it: the order of events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dualhead.errors import UserError
from dualhead.evaluation import EvaluationProgress
from dualhead.recipe import Recipe, load_recipe
from dualhead.report import write_report
from dualhead.runs.folder import taken
from dualhead.runs.measure import Row, measure
from dualhead.runs.prepare import prepare
from dualhead.runs.stages import train_stages
from dualhead.saving import view
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


def train(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    plugins: Sequence[str] = (),
    run_dir: str | Path | None = None,
    progress: TrainingProgress | None = None,
    evaluation_progress: Callable[[str], EvaluationProgress] | None = None,
    stop: Callable[[], bool] = lambda: False,
    command: str | None = None,
    profile: bool = False,
) -> RunResult:
    """Train as a recipe says and evaluate what came of it; in a folder with an unfinished run, go on with it.

    In a group of processes (`dualhead.system.processes`) each calls this with the same arguments and trains on its
    share of every batch; the first one writes, and is the only one to tell of progress.

    Args:
        recipe: a recipe, the name of a shipped one, or a path to a YAML file.
        overrides: `KEY=VALUE` with dotted keys, for a recipe by name or path.
        plugins: files or modules that register components, besides those that a recipe by name or path names.
        run_dir: the run's folder; None for `runs/NAME`.
        progress: told of stages, steps and epochs.
        evaluation_progress: gives, for the name of a row, who is told of its evaluation.
        stop: asked after every step; when true the run saves itself and raises `Interrupted`.
        command: what the user typed, kept with the results.
        profile: look at a few steps of each stage, and leave what takes how long in the run's folder, in `profile`.

    Raises:
        UserError: for a bad recipe, bad data, or a folder that holds another run or where another process works;
            nothing is written then.
        Interrupted: when stopped.
        RunError: when training fails.
    """
    recipe, processes = _read(recipe, overrides, plugins), group()
    if not processes.first:
        progress = evaluation_progress = None
    prepared = prepare(recipe, Path(run_dir) if run_dir is not None else Path("runs") / recipe.name)
    folder = prepared.folder
    with taken(folder):
        model = train_stages(prepared, progress or Silent(), stop, profile=profile)
        rows = measure(prepared, model, evaluation_progress, stop, command=command)
    processes.lead(lambda: write_report([folder.path], folder.report))
    return RunResult(folder.path, view(model, prepared.output), tuple(rows))


def _read(recipe: Recipe | str | Path, overrides: Sequence[str], plugins: Sequence[str]) -> Recipe:
    if not isinstance(recipe, Recipe):
        return load_recipe(str(recipe), overrides, plugins)
    if overrides or plugins:
        what = "overrides" if overrides else "plugins"
        raise UserError(f"{what} apply to a recipe by name or path, not to one that is built already")
    return recipe
