"""A grid of runs: planned before anything starts, resumed after a kill, collected in one table, and compared."""

from __future__ import annotations

import csv
import json
import multiprocessing
import time

import pytest

from dualhead.commands.sweep import plan, run_sweep, split_values
from dualhead.errors import UserError
from helpers.e2e import TINY, dualhead

GRID = ["stages.main_head.objective.beta=1,6", *(setting for setting in TINY if "," not in setting)]


def test_values_are_split_at_commas_outside_brackets_and_quotes():
    assert split_values("1, 2,3") == ["1", "2", "3"]
    assert split_values("{name: a, b: [1, 2]},sat") == ["{name: a, b: [1, 2]}", "sat"]
    assert split_values('"a,b",c') == ['"a,b"', "c"]


def test_a_plan_is_the_grid_times_seeds():
    jobs = plan("digits", ["stages.main_head.objective.beta=1,6", "threat.eps=0.1,0.2", "data.validation=50"], 3)
    assert len({job.name for job in jobs}) == len(jobs) == 12
    assert {(j.recipe.stages[0].objective.beta, j.recipe.threat.eps, j.recipe.runtime.seed) for j in jobs} == {
        (beta, eps, seed) for beta in (1, 6) for eps in (0.1, 0.2) for seed in range(3)
    }
    assert all(job.recipe.data.validation == 50 for job in jobs)
    assert jobs[0].settings == {"stages.main_head.objective.beta": "1", "threat.eps": "0.1"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["beta"], "'beta' is not understood; write KEY=A,B,C"),
        (["threat.eps=0.1,"], "is not understood"),
        (["threat.eps=0.1,-1"], "eps must be greater than 0"),
        (["threat.eps=0.1,0.1"], "two runs would be called"),
        (["runtime.seed=1,2"], "use --seeds"),
        (["threat.eps=0.1", "threat.eps=0.2"], "is given twice"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_before_anything_starts(settings, message):
    with pytest.raises(UserError, match=message):
        plan("digits", settings)


def sweep_in_process(folder):
    import torch

    torch.set_num_threads(1)
    run_sweep(plan("digits_natural", ["stages.natural.epochs=1,2", *SHORT], 2), folder)


SHORT = [
    "model.backbone=cnn-2", "data.train_limit=256", "data.validation=32", "validation.attack.steps=1",
    "evaluate.limit=32", "evaluate.attacks=[pgd-2]", "runtime.device=cpu", "evaluate.gallery=0",
]  # fmt: skip


@pytest.mark.slow  # with `make bits`
def test_killed_and_begun_again_a_sweep_ends_as_one_that_was_not(tmp_path):
    sweep_in_process(tmp_path / "whole")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dualhead.commands.sweep"])
    folder, kills = tmp_path / "killed", 0
    for awaited in ("*/config.yaml", "*/comparison.json", "*seed=1/config.yaml"):
        process = context.Process(target=sweep_in_process, args=(folder,))
        process.start()
        while not list(folder.glob(awaited)) and process.exitcode is None:
            time.sleep(0.002)
        process.kill()
        process.join()
        kills += process.exitcode != 0
    assert kills >= 2
    sweep_in_process(folder)

    def table(place):
        rows = list(csv.DictReader((place / "sweep.csv").open()))
        return [{key: value for key, value in row.items() if key != "training_seconds"} for row in rows]

    assert table(folder) == table(tmp_path / "whole")
    assert len(table(folder)) == 4
    finished = json.loads((folder / "sweep.json").read_text())
    assert (finished["runs"], len(finished["rows"])) == (4, 4)

    found = json.loads(dualhead("compare", folder, "--json").out)
    assert [(row["name"], row["seeds"]) for row in found["rows"]] == [
        ("stages.natural.epochs=1: digits_natural", [0, 1]), ("stages.natural.epochs=2: digits_natural", [0, 1]),
    ]  # fmt: skip
    cheap, dear = (row["training_cost"]["forward_equivalents"] for row in found["rows"])
    assert dear == pytest.approx(2 * cheap)
    assert {pair["accuracy"] for pair in found["pairs"]} == {"clean", "pgd-2", "worst"}
    for pair in found["pairs"]:
        means = [
            row["clean_accuracy"] if pair["accuracy"] == "clean" else row["robust_accuracy"][pair["accuracy"]]
            for row in found["rows"]
        ]
        assert pair["difference"] == pytest.approx(means[1] - means[0])
        assert pair["test"] == "paired t, 2 seeds"
    assert "Traceback" not in dualhead("compare", folder).out


def test_a_run_that_ended_after_its_results_is_done_to_its_report(tmp_path, monkeypatch):
    jobs = plan("digits_natural", ["stages.natural.epochs=0", *SHORT[:-1], "evaluate.gallery=4"], 1)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dualhead.runs.measure.make_gallery", killed)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(jobs, tmp_path)
    assert (tmp_path / "seed=0/comparison.json").is_file()
    run_sweep(jobs, tmp_path)
    assert (tmp_path / "seed=0/evaluation/gallery.npz").is_file()
    assert (tmp_path / "seed=0/report.html").is_file()


def test_shards_share_the_runs(tmp_path):
    jobs = plan("digits_natural", ["stages.natural.epochs=0", *SHORT], 2)
    run_sweep(jobs, tmp_path, shard=(1, 2))
    assert [path.parent.name for path in tmp_path.glob("*/comparison.json")] == ["seed=1"]
    ended = dualhead("sweep", "digits_natural", "stages.natural.epochs=0", *SHORT, "--seeds", 2, "--out", tmp_path)
    assert ended.status == 0, ended.err
    assert "seed=1: done already" in ended.err
    assert len(json.loads((tmp_path / "sweep.json").read_text())["rows"]) == 2
    other = ["stages.natural.epochs=1", *SHORT, "--seeds", 2, "--out", tmp_path]
    refused = dualhead("sweep", "digits_natural", *other)
    assert refused.status == 2
    assert "holds a run of another recipe, which differs in stages.0.epochs; choose another --out" in refused.error_line
    assert "--shard 2/2: write I/N" in dualhead("sweep", "digits", "--shard", "2/2").error_line


def test_a_point_of_the_grid_that_cannot_be_is_told_and_the_others_are_done(tmp_path, caplog):
    settings = [setting for setting in SHORT if not setting.startswith("data.validation")]
    grid = ["data.validation=32,300,16", "stages.natural.epochs=0", *settings, "--out", tmp_path]
    ended = dualhead("sweep", "digits_natural", *grid)
    assert ended.status == 2
    assert "1 of 3 runs failed, the others are done; the first: data.validation=300,seed=0: data.val" in ended.err
    assert len(list(tmp_path.glob("*/comparison.json"))) == 2

    (tmp_path / "data.validation=16,seed=0" / "comparison.json").unlink()  # as of a run that is still at work
    with caplog.at_level("WARNING"):
        found = json.loads(dualhead("compare", tmp_path, "--json").out)
    assert [row["seeds"] for row in found["rows"]] == [[0]]
    assert "left out what is not finished: data.validation=16,seed=0" in caplog.text
    (tmp_path / "data.validation=32,seed=0" / "comparison.json").unlink()
    assert "holds no finished run of 2" in dualhead("compare", tmp_path).error_line
