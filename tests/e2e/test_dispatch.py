"""A grid as jobs of a scheduler, for real with submitit's executor for this machine."""

from __future__ import annotations

import csv
import json

import pytest

from dualhead.commands.submit import TrainRun, dispatch_sweep
from dualhead.commands.sweep import plan, run_sweep
from dualhead.errors import Interrupted, RunError, UserError
from helpers.e2e import dualhead

SHORT = [
    "stages.natural.epochs=1,2", "model.backbone=cnn-2", "data.train_limit=256", "data.validation=32",
    "validation.attack.steps=1", "evaluate.limit=32", "evaluate.attacks=[pgd-2]", "runtime.device=cpu",
    "evaluate.gallery=0", "runtime.lanes=1", "runtime.precision=float32",
]  # fmt: skip


def table(folder):
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    return [{key: value for key, value in row.items() if key != "training_seconds"} for row in rows]


@pytest.mark.slow  # each run is a process of its own: about 20 s
def test_jobs_of_a_scheduler_give_the_table_that_runs_in_turn_give(tmp_path):
    told = []
    jobs = plan("digits_natural", SHORT)
    settings = {"scheduler": "local", "poll_seconds": 0.1, "tell": told.append}
    dispatch_sweep(jobs, tmp_path / "jobs", at_once=2, **settings)
    run_sweep(jobs, tmp_path / "turn")
    assert table(tmp_path / "jobs") == table(tmp_path / "turn")
    assert len(table(tmp_path / "jobs")) == 2
    assert sum(line.startswith("queued: ") for line in told) == sum(line.startswith("done: ") for line in told) == 2
    told.clear()
    dispatch_sweep(jobs, tmp_path / "jobs", **settings)
    assert told == ["2 of 2 runs are done already"]


@pytest.mark.slow  # likewise
def test_stopped_while_waiting_it_cancels_and_goes_on(tmp_path):
    jobs = plan("digits_natural", SHORT)
    asked = []
    with pytest.raises(Interrupted, match="2 runs unfinished; the same command goes on"):
        dispatch_sweep(jobs, tmp_path, scheduler="local", poll_seconds=0.1, stop=lambda: not asked.append(0))
    ended = dualhead("sweep", "digits_natural", *SHORT, "--on", "local", "--out", tmp_path, "--json")
    assert ended.status == 0, ended.err
    assert len(json.loads(ended.out)["rows"]) == 2


@pytest.mark.slow  # with `make bits`
def test_a_job_that_fails_is_told_and_the_others_are_done(tmp_path):
    jobs = plan("digits_natural", SHORT)
    (tmp_path / jobs[0].name).mkdir(parents=True)
    (tmp_path / jobs[0].name / "something_else").write_text("")  # no run is put into such a folder
    with pytest.raises(RunError, match=r"1 of 2 runs failed.*holds something that is not a run"):
        dispatch_sweep(jobs, tmp_path, scheduler="local", poll_seconds=0.1)
    assert len(table(tmp_path)) == 1


def test_a_job_out_of_time_is_queued_again_as_it_was(tmp_path):
    job = TrainRun(plan("digits_natural", SHORT)[0].recipe.resolved(), tmp_path, None)
    assert job.checkpoint().function is job


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheduler": "moon"}, "--on moon: use local or slurm"),
        ({"scheduler": "slurm"}, "--on slurm: "),
        ({"scheduler": "local", "settings": ["speed"]}, "--job speed: write KEY=VALUE"),
        ({"scheduler": "local", "settings": ["speed=3"]}, "--on local: .*speed"),
    ],
)
def test_a_scheduler_that_cannot_be_is_refused(settings, message, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no Slurm here
    with pytest.raises(UserError, match=message):
        dispatch_sweep(plan("digits_natural", SHORT), tmp_path / "out", **settings)


def test_options_that_do_not_go_together():
    assert "name it with --on" in dualhead("sweep", "digits", "--at-once", 2).error_line
    assert "use one of them" in dualhead("sweep", "digits", "--on", "local", "--shard", "0/2").error_line
