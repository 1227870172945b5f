"""What a run costs, told before: it is what the run then costs; and the time that is left."""

from __future__ import annotations

import json

import pytest

from dualhead.commands.left import TimeLeft
from dualhead.recipe import load_recipe
from helpers.e2e import TINY, dualhead

TOLD = (*TINY, "runtime.precision=float32", "runtime.layout=contiguous", "runtime.lanes=1")
"""Nothing is measured beforehand."""


def test_the_cost_told_before_is_the_cost_counted_after(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tried = dualhead("train", "digits", *TOLD, "--dry-run", "--json")
    assert tried.status == 0, tried.err
    assert not list(tmp_path.iterdir())  # nothing is begun
    cost = json.loads(tried.out)["cost"]
    assert [stage["stage"] for stage in cost["stages"]] == ["main_head", "second_head", "aggregator"]
    assert all(stage["seconds"] is None or stage["seconds"] >= 0 for stage in cost["stages"])
    trained = dualhead("train", "digits", *TOLD, "--json", "--quiet")
    deployed = json.loads(trained.out)["rows"][-1]
    assert deployed["training_cost"]["forward_equivalents"] == pytest.approx(cost["forward_equivalents"], rel=0.002)
    listed = json.loads(dualhead("runs", "--json").out)
    assert [(run["run"], run["recipe"], run["state"], run["epoch"], run["epochs"]) for run in listed] == [
        ("runs/digits", "digits", "finished", 3, 3)
    ]
    assert listed[0]["clean_accuracy"] == deployed["clean_accuracy"]
    shown = dualhead("runs").out
    assert "runs/digits" in shown and "finished" in shown
    again = dualhead("train", "digits", *TOLD)
    assert "runs/digits: was finished already, nothing is trained again" in again.err


def test_what_cannot_be_tried_is_said_and_the_recipe_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = dualhead("show", "digits", "data.source=./gone")
    assert ended.status == 0
    assert ended.out.startswith("name: digits\n") or "name: digits\n" in ended.out
    assert ended.out.splitlines()[-1].startswith("cost: not known, since a few steps cannot be tried: data.source")
    assert dualhead("train", "digits", "data.source=./gone", "--dry-run").status == 2


def test_corruptions_take_time_too():
    told = []
    for attacks in ("[pgd-4]", "[pgd-4, corruptions]"):
        recipe = load_recipe("digits_natural", ["evaluate.limit=10", f"evaluate.attacks={attacks}"])
        left = TimeLeft(recipe, clock=iter(range(10)).__next__)
        left.stage(0, steps=1, done=0)
        left.step()
        told.append(left.seconds())
    assert told[1] - told[0] == pytest.approx(10 * 75 / recipe.stages[0].batch_size)  # 15 kinds, 5 severities


def test_time_left_shrinks_to_that_of_the_evaluation():
    clock = [0.0]
    recipe = load_recipe("digits_natural", ["stages.*.epochs=2", "evaluate.limit=10", "evaluate.attacks=[pgd-4]"])
    left = TimeLeft(recipe, clock=lambda: clock[0])
    assert left.seconds() is None
    left.stage(0, steps=5, done=0)
    told = []
    for _ in range(10):
        clock[0] += 1.0
        left.step()
        told.append(left.seconds())
    assert told == sorted(told, reverse=True)
    batch = recipe.stages[0].batch_size
    assert told[0] == pytest.approx(9 + 10 * 4 / batch)  # a second a batch, one pass of each image
    assert told[-1] == pytest.approx(10 * 4 / batch)
