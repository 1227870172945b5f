"""`--transfer-from` on the command line: the static protocol beside attacks on the model itself."""

from __future__ import annotations

import json

import pytest

from helpers.e2e import dualhead

MODELS = """
import torch
from helpers.own_net import OwnNet

def made(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return OwnNet()

def attacked(): return made(0)
def other(): return made(1)
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "two_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    return "two_models:attacked", "two_models:other"


def evaluated(tmp_path, model, *options):
    ended = dualhead(
        "evaluate", model, "--data", "digits", "--eps", "0.2", "--attack", "pgd-3", "--limit", 24,
        "--output", tmp_path / "out", "--json", *options,
    )  # fmt: skip
    assert ended.status == 0, ended.err
    return json.loads(ended.out)


def test_images_made_against_another_model_are_told_apart(models, tmp_path):
    model, other = models
    alone = evaluated(tmp_path / "a", model)
    found = evaluated(tmp_path / "b", model, "--transfer-from", other)
    assert "transfer" not in alone
    assert found["robust_accuracy"] == alone["robust_accuracy"]  # it decides nothing about the model itself
    told = found["transfer"]
    assert told["from"] == "two_models:other"
    assert "no attack saw this model" in told["note"]
    assert set(told["attacks"]) == {"pgd-3"}
    assert 0 <= told["accuracy"] <= found["clean_accuracy"]


def test_against_itself_images_say_what_attacks_on_it_say(models, tmp_path):
    model, _ = models
    found = evaluated(tmp_path, model, "--transfer-from", model)
    assert found["transfer"]["accuracy"] == found["robust_accuracy"]["worst"]


def test_a_model_that_is_not_there_is_one_clear_line(models, tmp_path):
    ended = dualhead(
        "evaluate", models[0], "--data", "digits", "--eps", "0.2", "--attack", "pgd-3", "--limit", 8,
        "--output", tmp_path / "out", "--transfer-from", "two_models:nobody",
    )  # fmt: skip
    assert ended.status in {1, 2}
    assert "nobody" in ended.error_line
