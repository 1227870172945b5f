"""The order of events of a run is one function that fits a screen; each step is entered once."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path

import pytest
import torch

from dualhead.data import Split
from dualhead.errors import UserError
from dualhead.evaluation import Evaluation
from dualhead.recipe import load_recipe
from dualhead.runs import images, measure, network, prepare, read_entries, run, stages, standings
from helpers.e2e import TINY

MOST_LINES = 40
STEPS = ("prepare", "train_stages", "measure", "write_report")


def body_of(function):
    """The statements of a function, without its signature and docstring."""
    (node,) = ast.parse(inspect.getsource(function)).body
    return node.body[1:]


def calls(nodes):
    return [
        inner.func.id
        for node in nodes
        for inner in ast.walk(node)
        if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name)
    ]


def test_the_order_of_events_is_told_once_and_fits_a_screen():
    body = body_of(run.train)
    assert body[-1].end_lineno - body[0].lineno < MOST_LINES // 2
    assert [name for name in calls(body) if name in STEPS] == list(STEPS)


@pytest.mark.parametrize("module", [run, images, network, prepare, stages, measure], ids=lambda module: module.__name__)
def test_every_function_fits_a_screen(module):
    nodes = ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
    for node in (node for node in nodes if isinstance(node, ast.FunctionDef)):
        body = node.body[1:] if ast.get_docstring(node) else node.body
        assert body[-1].end_lineno - body[0].lineno < MOST_LINES, f"{module.__name__}.{node.name}"


def test_steps_know_only_those_before_them():
    order = [
        "folder",
        "clean",
        "crafted",
        "images",
        "network",
        "prepare",
        "stages",
        "crafting",
        "poisoned",
        "measure",
        "run",
    ]
    for place, name in enumerate(order):
        source = Path(run.__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        known = {
            node.module.removeprefix("dualhead.runs.")
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dualhead.runs.")
        }
        assert known <= set(order[:place])


def test_nothing_is_written_before_training_begins(tmp_path):
    prepared = prepare.prepare(load_recipe("digits", TINY), tmp_path / "run")
    assert not prepared.folder.path.exists()
    assert (prepared.output, len(prepared.images.test)) == ("aggregate", len(prepared.images.test.labels))


@pytest.mark.parametrize(
    ("given", "expected"),
    [("balanced", [0.5, 10 / 6, 1.0, 2.5]), ({"1": 4, "3": 0.5}, [1, 4, 1, 0.5]), (None, None)],
)
def test_weights_of_classes(given, expected):
    recipe = load_recipe("digits", [] if given is None else [f"data.class_weights={given}"])
    labels = torch.tensor([0] * 20 + [1] * 6 + [3] * 4)
    split = Split(torch.zeros(30, 1, 2, 2, dtype=torch.uint8), labels, ("0", "1", "2", "3"))
    found = images.class_weights(recipe, split)
    assert expected is None or found.tolist() == pytest.approx(expected)
    assert (found is None) == (expected is None)


def test_a_weight_for_no_class_is_refused():
    split = Split(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1]), ("cat", "dog"))
    with pytest.raises(UserError, match="'bee' is no class of these images; they are cat, dog"):
        images.class_weights(load_recipe("digits", ["data.class_weights={bee: 2}"]), split)


def test_weights_of_classes_reach_the_loss(tmp_path):
    """Nine digits of a weight of 1/1000 leave little of the loss."""
    light = ", ".join(f"{digit}: 0.001" for digit in range(1, 10))
    short = [
        *TINY[:4], "data.train_limit=100", "stages.*.objective=natural", "data.validation=0", "stages.*.keep=last",
        "evaluate.gallery=0", "evaluate.limit=8", "evaluate.attacks=[fgsm]", "runtime.device=cpu", "runtime.lanes=1",
    ]  # fmt: skip
    losses = []
    for name, weights in (("equal", "null"), ("unequal", f"{{{light}}}")):
        run.train("digits_sat", [*short, f"data.class_weights={weights}"], run_dir=tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append(json.loads(lines[0])["loss"])
    assert 0 < losses[1] < losses[0] / 3


def test_corruptions_of_a_recipe_reach_results_tables_report_and_comparison(tmp_path):
    short = [
        *TINY[:3], "data.train_limit=80", "stages.*.epochs=1", "evaluate.gallery=0", "evaluate.limit=8",
        "evaluate.attacks=[fgsm, corruptions]", "runtime.device=cpu", "runtime.lanes=1", "validation.attack.steps=1",
        "stages.*.attack.steps=1",
    ]  # fmt: skip
    for seed in (0, 1):
        result = run.train("digits_sat", [*short, f"runtime.seed={seed}"], run_dir=tmp_path / str(seed))
    rows = json.loads((tmp_path / "0" / "comparison.json").read_text())["rows"]
    assert all("corruptions" in each for each in rows)
    row = rows[-1]
    stored = Evaluation.load(tmp_path / "0" / "evaluation")
    assert row["corruptions"] == stored.results["corruptions"]
    assert stored.measured["corruptions"].shape[0] == 8
    assert set(row["robust_accuracy"]) == {"fgsm", "worst"}
    assert "corruptions" in str(result)
    assert "corruptions after Hendrycks and Dietterich" in (tmp_path / "0" / "report.html").read_text()
    compared = standings(read_entries([tmp_path / "0", tmp_path / "1"]))["rows"][-1]
    assert compared["corruptions"]["kinds"].keys() == row["corruptions"]["kinds"].keys()
    assert compared["seeds"] == [0, 1]


def test_what_is_deployed_can_be_measured_alone(tmp_path):
    short = [
        *TINY[:3], "data.train_limit=80", "stages.*.epochs=1", "evaluate.gallery=0", "evaluate.limit=8",
        "evaluate.attacks=[fgsm]", "runtime.device=cpu", "runtime.lanes=1", "validation.attack.steps=1",
        "stages.*.attack.steps=1",
    ]  # fmt: skip
    told = {}
    for outputs in ("all", "deployed"):
        result = run.train("digits", [*short, f"evaluate.outputs={outputs}"], run_dir=tmp_path / outputs)
        assert result.rows[-1].name in str(result)
        told[outputs] = json.loads((tmp_path / outputs / "comparison.json").read_text())["rows"]
        assert (tmp_path / outputs / "report.html").is_file()
        assert read_entries([tmp_path / outputs])
    (alone,) = told["deployed"]
    assert alone["training_cost"].pop("seconds") >= 0
    assert told["all"][-1]["training_cost"].pop("seconds") >= 0
    assert alone == told["all"][-1]
    assert len(told["all"]) > 3
    assert not (tmp_path / "deployed" / "evaluation" / "rows").exists()
