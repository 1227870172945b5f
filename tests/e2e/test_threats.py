"""A threat that is no norm through the command line: trained, stopped and resumed, evaluated, reported, compared."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from dualhead.errors import Interrupted
from dualhead.recipe import load_recipe
from dualhead.runs import train
from dualhead.saving import load
from helpers.e2e import TINY, dualhead

RECIPE = """
extends: digits
name: bent
threat: {name: flow, eps: 0.1}
stages: [{name: second_head, threat: {norm: L2, eps: 0.5}}]
evaluate: {attacks: [pgd-3, apgd-ce-3]}
"""
SHORT = [change for change in TINY if not change.startswith("evaluate.attacks")] + ["evaluate.gallery=4"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "bent.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """A finished run that was stopped in its first stage."""
    folder = tmp_path_factory.mktemp("runs") / "bent"
    steps = iter(range(10**6))
    with pytest.raises(Interrupted):
        train(load_recipe(str(recipe), SHORT), run_dir=folder, stop=lambda: next(steps) == 4)
    ended = dualhead("train", recipe, *SHORT, "--run-dir", folder, "--json")
    assert ended.status == 0, ended.err
    return folder


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_one_that_was_not(run, recipe, tmp_path):
    ended = dualhead("train", recipe, *SHORT, "--run-dir", tmp_path / "whole", "--quiet")
    assert ended.status == 0, ended.err
    first, second = load(str(run)), load(str(tmp_path / "whole"))
    for name, values in first.state_dict().items():
        assert torch.equal(values, second.state_dict()[name]), name


def test_every_file_names_the_threat(run):
    results = json.loads((run / "evaluation" / "results.json").read_text())
    assert results["threat"] == {"name": "flow", "eps": 0.1}
    assert set(results["robust_accuracy"]) == {"pgd-3", "apgd-ce-3", "worst"}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["threat"] == {"name": "flow", "eps": 0.1}
    assert [stage["threat"] for stage in config["stages"]] == [None, {"norm": "L2", "eps": 0.5}, None]
    assert json.loads((run / "model" / "config.json").read_text())["threat"] == {"name": "flow", "eps": 0.1}
    card = (run / "model" / "README.md").read_text()
    assert "Evaluated against flow of at most 0.1; trained against flow 0.1, L2 eps 0.5." in card
    page = (run / "report.html").read_text()
    assert "flow 0.1" in page
    assert "flow eps" not in page


def test_evaluate_takes_the_models_threat_or_another(run, tmp_path):
    def measured(*options):
        ended = dualhead("evaluate", run, *options, "--limit", 24, "--attack", "pgd-2", "--json", "--device", "cpu")
        assert ended.status == 0, ended.err
        return json.loads(ended.out)["threat"]

    assert measured() == {"name": "flow", "eps": 0.1}
    assert measured("--eps", "0.2") == {"name": "flow", "eps": 0.2}
    assert measured("--norm", "L2", "--eps", "0.5") == {"norm": "L2", "eps": 0.5}
    assert dualhead("report", run, "--output", tmp_path / "both.html").status == 0
    assert "L2 eps 0.5" in (tmp_path / "both.html").read_text()


def test_a_model_of_a_norm_is_measured_under_flow(finished_run, tmp_path):
    ended = dualhead(
        "evaluate", finished_run, "--threat", "flow", "--eps", "0.05,0.1", "--limit", 24, "--attack", "pgd-2",
        "--output", tmp_path / "out", "--quiet", "--device", "cpu",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["threat"] == {"name": "flow", "eps": 0.1}
    assert [point["eps"] for point in results["curve"]] == [0.05, 0.1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--norm", "L2"), "--norm L2: --eps is needed, since the model's is of flow; e.g. --eps 0.5"),
        (("--threat", "flow", "--norm", "L2"), "--threat and --norm: give one of them"),
        (("--threat", "flo", "--eps", "0.1"), "unknown threat 'flo'; did you mean 'flow'?"),
        (("--attack", "square"), "attack square is defined for Linf, L2, L1, not for threat flow; use"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(run, options, told):
    ended = dualhead("evaluate", run, *options, "--limit", 8)
    assert ended.status != 0
    assert told in ended.error_line


def test_a_gallery_and_a_comparison_are_made(run, tmp_path):
    assert dualhead("gallery", run, "--limit", 3, "--output", tmp_path / "out", "--device", "cpu").status == 0
    compared = dualhead("compare", run, "--json")
    assert compared.status == 0, compared.err


def test_several_threats_in_one_evaluation_are_told_and_compared(finished_run, tmp_path):
    options = ("--threat", "Linf:8/255", "--threat", "L1:3", "--attack", "pgd-2", "--limit", 24, "--device", "cpu")
    ended = dualhead("evaluate", finished_run, *options, "--output", tmp_path / "union")
    assert ended.status == 0, ended.err
    assert "Linf eps 8/255, L1 eps 3" in ended.out
    assert "average: " in ended.out
    ended = dualhead("compare", tmp_path / "union", "--specialist", tmp_path / "union")
    assert ended.status == 0, ended.err
    assert "worst 100.0%" in ended.out
    assert dualhead("evaluate", finished_run, "--threat", "L2").error_line.endswith("as in --threat L2:0.5")
    assert "leave --norm and --eps out" in dualhead("evaluate", finished_run, *options, "--eps", "1").error_line
    ended = dualhead("report", tmp_path / "union", "--output", tmp_path / "page.html")
    assert ended.status == 0, ended.err
    assert "pgd-2@L1" in (tmp_path / "page.html").read_text()
