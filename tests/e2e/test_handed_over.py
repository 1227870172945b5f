"""Weights and models of others through the command line: the same numbers as what they were made from."""

from __future__ import annotations

import json

import pytest
import torch

from dualhead.models import read_state
from helpers.e2e import dualhead

MODELS = """
import torch
from torch import nn


class First(nn.Module):
    def __init__(self, in_place, num_classes=10):
        super().__init__()
        torch.manual_seed(0)
        self.in_place = in_place
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

    def forward(self, x):
        return self.net(x.sub_(0.5).div_(0.25) if self.in_place else (x - 0.5) / 0.25)


def inplace():
    return First(True)


def copy():
    return First(False)


def trained_inplace(num_classes):
    return First(True, num_classes)
"""
RAW = [
    "model.backbone=cnn-4", "data.validation=32", "stages.*.epochs=6", "evaluate.limit=200", "evaluate.attacks=[pgd-2]",
    "evaluate.gallery=0", "validation.attack.steps=1", "runtime.device=cpu", "runtime.lanes=1",
]  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "handed_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(*command):
    ended = dualhead(*command, "--json", "--quiet")
    assert ended.status == 0, ended.err
    return json.loads(ended.out)


def test_a_model_that_normalises_in_place_is_evaluated_as_its_copy_and_trained(place):
    found = []
    for name in ("inplace", "copy"):
        command = ("evaluate", f"handed_models:{name}", "--data", "digits", "--attack", "pgd-3", "--eps", "0.1")
        found.append(rows(*command, "--limit", "60", "--device", "cpu", "--output", place / name))
    for key in ("clean_accuracy", "robust_accuracy", "per_class"):
        assert found[0][key] == found[1][key]
    short = [
        "model.backbone=handed_models:trained_inplace", "stages.*.objective=sat", "stages.*.attack=pgd-1",
        "data.train_limit=100", "stages.*.epochs=1", RAW[1], *RAW[3:],
    ]  # fmt: skip
    trained = rows("train", "digits_natural", *short, "--run-dir", "run")
    assert 0 <= trained["rows"][0]["clean_accuracy"] <= 1


@pytest.mark.slow  # tests/saving/test_weights_of_others.py tries both ways without training
def test_weights_made_without_normalisation_keep_their_accuracy_in_a_recipe_that_says_nothing_of_it(place, caplog):
    rows("train", "digits_natural", *RAW, "model.normalize=none", "--run-dir", "raw")
    torch.save(read_state(place / "raw" / "checkpoints" / "natural" / "last.safetensors"), place / "raw_state.pt")
    again = ["stages.natural.init=raw_state.pt", "stages.*.epochs=0", "stages.*.keep=last"]  # after those of RAW
    with caplog.at_level("WARNING"):
        given = rows("train", "digits_natural", *RAW, *again, "--run-dir", "use")
    assert "taken is the former (model.normalize: none)" in caplog.text
    raw, use = (
        rows("evaluate", run, "--checkpoint", "last", "--attack", "pgd-2", "--limit", "200", "--precision", "float32",
             "--output", f"out-{run}")
        for run in ("raw", "use")
    )  # fmt: skip
    assert use["clean_accuracy"] == raw["clean_accuracy"] == given["rows"][0]["clean_accuracy"] > 0.25
    assert use["robust_accuracy"] == raw["robust_accuracy"]
