"""A model that hides its gradients: the red light stands before the numbers, wherever they are shown."""

from __future__ import annotations

import csv
import json

import pytest

from dualhead.commands.demo import Demonstration
from helpers.e2e import dualhead

NETWORK = """
import torch
from torch import nn


class Steps(nn.Module):
    \"\"\"Linear behind four grey levels: no gradient gets through.\"\"\"

    def __init__(self, num_classes):
        super().__init__()
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x):
        return self.linear(torch.floor(4 * x).clamp(max=3).flatten(1) / 3)


def make(num_classes):
    return Steps(num_classes)
"""
RECIPE = """
extends: digits_sat
name: steps
model: {backbone: "steps_network:make", attach_at: null, aggregator: null}
stages: [{name: one, train: [model], objective: natural, epochs: 3, batch_size: 32, optimiser: {name: sgd, lr: 0.2}}]
threat: {norm: Linf, eps: 0.1}
data: {train_limit: 600, validation: 60}
validation: {attack: {name: pgd, steps: 1}}
evaluate: {attacks: [pgd-3], limit: 100, gallery: 0}
runtime: {layout: auto, device: cpu}
"""
EXPECTED = {"zero_gradient", "large_eps"}


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """The folder of the recipe, and what training printed."""
    folder = tmp_path_factory.mktemp("masked")
    (folder / "steps_network.py").write_text(NETWORK)
    (folder / "steps.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.chdir(folder)
        ended = dualhead("train", "steps.yaml", "--run-dir", "run", "--quiet")
        assert ended.status == 0, ended.err
        yield folder, ended.out


def red(printed):
    """Names of the failed checks that stand before the first table."""
    before = printed.split("┏")[0] if "┏" in printed else printed
    return {line.split()[1].rstrip(":") for line in before.splitlines() if line.startswith("failed: ")}


def failed(checks):
    return {check["name"] for check in checks if check["status"] == "failed"}


def told(*command):
    ended = dualhead(*command)
    assert ended.status == 0, ended.err
    return ended.out


def test_training_and_its_files_tell(masked):
    folder, printed = masked
    assert red(printed) == EXPECTED
    (row,) = json.loads((folder / "run" / "comparison.json").read_text())["rows"]
    assert failed(row["checks"]) == EXPECTED
    assert all(check["message"] for check in row["checks"])
    (row,) = json.loads(told("train", "steps.yaml", "--run-dir", "run", "--json"))["rows"]
    assert failed(row["checks"]) == EXPECTED


@pytest.mark.parametrize("command", [("info", "run"), ("compare", "run"), ("compare", "run/evaluation")])
def test_commands_tell_before_the_table_and_in_json(masked, command):
    assert red(told(*command)) == EXPECTED
    assert red(told(*command, "--quiet")) == EXPECTED
    rows = json.loads(told(*command, "--json"))["rows"]
    assert [failed(row["checks"]) for row in rows] == [EXPECTED]
    assert not any(row.get("pareto") for row in rows)


def test_compare_gives_no_star(masked):
    printed = told("compare", "run")
    assert "! run: steps" in printed
    assert "* run" not in printed


def test_evaluate_tells(masked):
    command = ("evaluate", "run", "--attack", "pgd-2", "--limit", "64", "--device", "cpu", "--quiet")
    assert red(told(*command)) == EXPECTED
    assert failed(json.loads(told(*command, "--json"))["diagnostics"]) == EXPECTED


def test_the_card_tells_before_the_numbers(masked):
    folder, _ = masked
    printed = told("export", "run", "--to", "exported")
    assert red(printed) == EXPECTED
    assert printed.index("failed: ") < printed.index("model: ")
    assert failed(json.loads(told("export", "run", "--to", "exported", "--json"))["checks"]) == EXPECTED
    for card in (folder / "exported" / "README.md", folder / "run" / "model" / "README.md"):
        text = card.read_text()
        for name in EXPECTED:
            assert text.index(f"failed: {name}") < text.index("| clean |")


def test_a_sweep_tells(masked):
    folder, _ = masked
    command = ("sweep", "steps.yaml", "stages.one.epochs=1", "--out", "sweep")
    printed = told(*command)
    assert red(printed) == EXPECTED
    assert "! steps" in printed
    assert "! a check failed" in printed
    (row,) = json.loads(told(*command, "--json"))["rows"]
    assert failed(row["checks"]) == EXPECTED
    (line,) = csv.DictReader((folder / "sweep" / "sweep.csv").open())
    assert line["checks"] == "failed zero_gradient; failed large_eps"


def test_the_demonstration_tells(masked, monkeypatch):
    """With this run in place of its own, which takes minutes."""
    folder, _ = masked
    rows = json.loads((folder / "run" / "comparison.json").read_text())["rows"]
    monkeypatch.setattr("dualhead.commands.demo.run_demo", lambda *_, **__: Demonstration("digits", rows, []))
    assert red(told("demo", "--quiet")) == EXPECTED
    (row,) = json.loads(told("demo", "--json", "--quiet"))["rows"]
    assert failed(row["checks"]) == EXPECTED
