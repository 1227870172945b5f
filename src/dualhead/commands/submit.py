"""The runs of a sweep as jobs of a scheduler, Slurm or processes of this machine, through submitit."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from dualhead.commands.sweep import Job, refuse_other_runs, write_table
from dualhead.components.plugins import searched_in, sources_in
from dualhead.errors import Interrupted, RunError, UserError
from dualhead.recipe import parse_recipe
from dualhead.runs import RunFolder, train

SCHEDULERS: Final = ("local", "slurm")
DEFAULTS: Final = {"timeout_min": 24 * 60}
"""Minutes that a job may take; submitit's default is 5."""
FOLDER: Final = "jobs"
"""Where submitit keeps its files and the output of jobs, in the folder of the sweep."""


class TrainRun:
    """A job: trains by a recipe, or goes on with that training.

    Args:
        recipe: in full, as plain data.
        folder: folder of the run.
        command: the command as the user typed it.
    """

    def __init__(self, recipe: Mapping[str, Any], folder: Path, command: str | None) -> None:
        self.recipe, self.folder, self.command = recipe, folder, command
        self.searched = [source.folder for source in sources_in(recipe)]

    def __call__(self) -> None:
        """Train, in the job's process."""
        with searched_in(self.searched):
            recipe = parse_recipe(self.recipe)
        train(recipe, run_dir=self.folder, command=self.command)

    def checkpoint(self) -> Any:
        """Queue the job again; submitit calls this when it is pre-empted or out of time, and it goes on by itself."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def dispatch_sweep(
    jobs: Sequence[Job],
    folder: Path,
    *,
    scheduler: str,
    settings: Sequence[str] = (),
    at_once: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] = lambda: False,
    command: str | None = None,
    poll_seconds: float = 5.0,
) -> list[dict[str, Any]]:
    """Queue the runs that are not done yet, one job each, wait for them, and write the table after each.

    Args:
        jobs: as `plan` returned them.
        folder: as for `run_sweep`; jobs must see it under the same path.
        scheduler: `slurm`, or `local` for processes of this machine.
        settings: `KEY=VALUE` of submitit's `AutoExecutor`, e.g. `slurm_partition=gpu`, `timeout_min=600`.
        at_once: jobs that are queued or run at a time; None: all on Slurm, one on this machine.
        tell: given a line for each run.
        stop: asked while waiting; when true all jobs are cancelled, and the same call goes on with them.
        command: the command as the user typed it.
        poll_seconds: between two looks at the jobs.

    Returns:
        As `run_sweep`.

    Raises:
        UserError: if submitit is not installed, the scheduler is not there, a setting is unknown, or the folder holds
            runs of another recipe.
        Interrupted: when stopped.
        RunError: if runs have failed; the others are done first.
    """
    refuse_other_runs(jobs, folder)
    executor = _executor(folder, scheduler, settings)
    limit = at_once or (1 if scheduler == "local" else len(jobs))
    waiting = [job for job in jobs if not RunFolder(folder / job.name).report.is_file()]
    tell(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are done already")
    running: dict[str, Any] = {}
    failed: list[str] = []
    while waiting or running:
        while waiting and len(running) < limit:
            job = waiting.pop(0)
            place = (folder / job.name).absolute()
            running[job.name] = executor.submit(TrainRun(job.recipe.resolved(), place, command))
            tell(f"queued: {job.name} (job {running[job.name].job_id})")
        if stop():
            for submitted in running.values():
                submitted.cancel()
            raise Interrupted(f"stopped with {len(running) + len(waiting)} runs unfinished; the same command goes on")
        for name in [name for name, submitted in running.items() if submitted.done()]:
            failed += _failure(name, running.pop(name), folder)
            tell(f"failed: {failed[-1]}" if failed and failed[-1].startswith(f"{name}: ") else f"done: {name}")
            write_table(jobs, folder)
        if running:
            time.sleep(poll_seconds)
    rows = write_table(jobs, folder)
    if failed:
        raise RunError(f"{len(failed)} of {len(jobs)} runs failed, the others are done; the first: {failed[0]}")
    return rows


def _failure(name: str, submitted: Any, folder: Path) -> list[str]:
    """Say what went wrong in a job that has ended; nothing if its run is there."""
    if RunFolder(folder / name).report.is_file():
        return []
    raised = re.findall(r"^[\w.]+: .+", str(submitted.exception()), re.MULTILINE)  # the last lines of its tracebacks
    reason = raised[-1].partition(": ")[2] if raised else "ended without a result"
    return [f"{name}: {reason} (log: {submitted.paths.stderr})"]


def _executor(folder: Path, scheduler: str, settings: Sequence[str]) -> Any:
    try:
        import submitit
    except ImportError:
        raise UserError("--on: submitit is not installed; pip install 'dualhead[submitit]'") from None
    if scheduler not in SCHEDULERS:
        raise UserError(f"--on {scheduler}: use {' or '.join(SCHEDULERS)}")
    parameters: dict[str, Any] = dict(DEFAULTS)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key or not value:
            raise UserError(f"--job {setting}: write KEY=VALUE, e.g. slurm_partition=gpu")
        parameters[key] = int(value) if value.isdigit() else value
    try:
        executor = submitit.AutoExecutor(folder=str(folder / FOLDER), cluster=scheduler)
        executor.update_parameters(**parameters)
    except Exception as error:  # submitit's own, of several kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--on {scheduler}: {reason}") from None
    return executor
