"""Methods of one's own with streams, a teacher, own heads and a curriculum, as runs that are stopped and resumed."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from dualhead import Interrupted, train
from dualhead.models import read_state
from dualhead.recipe import parse_recipe
from helpers import new_methods

assert new_methods.METHODS  # registers them
FIRST = {
    "name": "first", "train": ["trunk", "head1"], "keep": "last", "objective": "sat", "attack": "pgd-2", "epochs": 1,
    "batch_size": 16, "optimiser": {"name": "sgd", "lr": 0.05},
}  # fmt: skip


def recipe(objective, parts, **settings):
    second = {**FIRST, "name": "second", "train": parts, "objective": objective, "epochs": 2, **settings}
    content = {
        "name": "test",
        "data": {"source": "digits", "train_limit": 112, "validation": 32},
        "model": {"backbone": "cnn-4", "attach_at": "stage1"},
        "threat": {"norm": "Linf", "eps": 0.1},
        "stages": [FIRST, second],
        "validation": {"attack": "pgd-1"},
        "evaluate": {"attacks": ["pgd-1"], "limit": 16, "gallery": 0},
        "runtime": {
            "precision": "float32",
            "layout": "contiguous",
            "lanes": 1,
            "device": "cpu",
            "save_minutes": 0.0001,
        },
    }
    return parse_recipe(content, "test")


METHODS = {
    "energy": ({"name": "test_energy", "every": 3, "longest": 3}, ["trunk", "head1"]),
    "dat": ({"name": "energy", "auc": 0.5, "every": 3, "max_steps": 3}, ["trunk", "head1"]),
    "align": ({"name": "test_align"}, ["trunk", "head1", "head2"]),
    "lwf": ({"name": "lwf"}, ["trunk", "head1"]),
}
SETTINGS = {"dat": {"batch_norm": "frozen", "average": {"name": "ema", "decay": 0.9}}}


def weights(folder):
    return read_state(folder / "checkpoints" / "second" / "last.safetensors")


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders of runs that were not stopped, by the method's name; each is trained when it is first asked for."""
    done = {}

    def folder(name):
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name) / "run"
            train(recipe(*METHODS[name], **SETTINGS.get(name, {})), run_dir=done[name])
        return done[name]

    return folder


@pytest.mark.slow  # run by `make bits`
@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_was_stopped_in_the_middle_ends_as_one_that_was_not(name, tmp_path, whole):
    steps = 0

    def stop():
        nonlocal steps
        steps += 1
        return steps in (8, 9, 13)  # in the first epoch of the second stage, twice, and in its second

    while True:
        try:
            train(recipe(*METHODS[name], **SETTINGS.get(name, {})), run_dir=tmp_path / "stopped", stop=stop)
            break
        except Interrupted:
            continue
    assert steps > 13
    expected, found = weights(whole(name)), weights(tmp_path / "stopped")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert lines(whole(name)) == lines(tmp_path / "stopped")


def test_a_curriculum_moves_and_its_figures_are_logged(whole):
    told = [line for line in lines(whole("energy")) if line["stage"] == "second"]
    assert all({"gap", "energy", "adversarial"} <= line.keys() for line in told)
    states = sorted((whole("energy") / "checkpoints" / "states").glob("*.pt"))
    objectives = [torch.load(path, weights_only=True)["objective"] for path in states]
    moved = [each["curriculum"]["state"]["steps"] for each in objectives if each is not None]
    assert moved[-1] == 3.0  # of 1 at the beginning, one more every 3 steps


def test_what_the_stage_began_with_is_kept_for_those_who_learn_from_it(whole):
    before = read_state(whole("lwf") / "checkpoints" / "second" / "before.safetensors")
    first = read_state(whole("lwf") / "checkpoints" / "first" / "last.safetensors")
    assert all(torch.equal(before[key], first[key]) for key in first)
    assert not all(torch.equal(before[key], value) for key, value in weights(whole("lwf")).items())


def test_own_heads_are_left_out_of_what_is_saved(whole):
    assert not any("predictor" in key for key in weights(whole("align")))
    config = yaml.safe_load((whole("align") / "config.yaml").read_text(encoding="utf-8"))
    assert config["stages"][1]["objective"]["name"] == "test_align"


@pytest.mark.slow
def test_the_steps_of_an_energy_rise_and_statistics_of_batch_norm_stay(whole):
    folder = whole("dat")
    assert {line["steps"] for line in lines(folder) if line["stage"] == "second"} != {0.0}
    first, second = read_state(folder / "checkpoints" / "first" / "last.safetensors"), weights(folder)
    statistics = [name for name in first if "running_" in name]
    assert statistics
    assert all(torch.equal(first[name], second[name]) for name in statistics if "aggregator" not in name)
