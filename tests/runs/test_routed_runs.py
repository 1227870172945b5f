"""Routers that a run adds one by one: what it tells, that it resumes to the bit, and what it leaves behind."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
import yaml

from dualhead.commands.resolve import Request, resolve
from dualhead.errors import Interrupted, UserError
from dualhead.evaluation import Evaluation
from dualhead.recipe import parse_recipe
from dualhead.runs.run import train
from dualhead.saving import export, export_onnx, load
from helpers.e2e import dualhead
from helpers.resume import outcome, run_in_spite_of

ATTACK = {"name": "pgd", "steps": 2}


def stage(name, number, old=(), **settings):
    parts = ["trunk", "head1"] if number == 1 else [f"head{number}"]
    return {"name": name, "train": [*parts, f"router{number}"], "deploy": "aggregate", "keep": "last",
            "objective": {"name": "after_dder", "router": number, "old": list(old)}, "attack": ATTACK, "epochs": 1,
            "batch_size": 32, **settings}  # fmt: skip


EVERYTHING = {
    "name": "routed",
    "data": {"source": "digits", "train_limit": 80, "validation": 16},
    "model": {"backbone": "cnn-4", "attach_at": "stage1", "heads": 2, "second_head": "clone",
              "aggregator": {"name": "after_dder", "routers": 2, "experts": "grown"}},
    "threat": {"norm": "Linf", "eps": 0.1},
    "stages": [stage("linf", 1), stage("l2", 2, ["Linf:0.1"], threat="L2:0.5", average={"name": "ema", "decay": 0.9})],
    "sequence": {},
    "validation": {"attack": ATTACK, "under": "stage"},
    "evaluate": {"attacks": ["pgd-2", "steered-2"], "limit": 24, "gallery": 2, "batch_size": 8},
    "runtime": {"precision": "float32", "layout": "contiguous", "lanes": 1},
}  # fmt: skip


def recipe(**changes):
    return parse_recipe({**EVERYTHING, **changes})


def told(folder):
    """All that must come out the same: weights, log, and what was measured, without times."""
    found = json.loads((folder / "evaluation" / "results.json").read_text())["sequence"]
    for row in found["rows"]:
        del row["training_cost"]["seconds"]
    visit = Evaluation.load(folder / "evaluation" / "sequence" / "linf")
    columns = {key: column.tolist() for key, column in visit.correct.items()}
    return {**outcome(folder), "sequence": found, "visit": columns}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(recipe(), run_dir=folder)
    return folder


@pytest.mark.slow
def test_what_a_run_tells(undisturbed):
    found = told(undisturbed)["sequence"]
    assert found["arrived"] == {"Linf": "linf", "L2": "l2"}
    assert [row["old_attacks"] for row in found["rows"]] == [None, "kept"]
    rows = json.loads((undisturbed / "comparison.json").read_text())["rows"]
    assert [row["output"] for row in rows] == ["head1", "head2", "mean", "router1", "router2", "aggregate"]
    assert [row["name"] for row in rows][3] == "router 1"
    page = (undisturbed / "report.html").read_text()
    assert "Threats one after another" in page
    assert "router 2" in page
    card = (undisturbed / "model" / "README.md").read_text()
    assert "the aggregator after_dder" in card


@pytest.mark.slow
def test_each_router_counts_as_trained(undisturbed):
    model = load(undisturbed)
    assert [int(model.part(name).trained) for name in model.routers] == [1, 1]


@pytest.mark.slow
def test_exported_it_gives_the_same_logits(undisturbed, tmp_path):
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    folder = export(undisturbed, tmp_path / "exported")
    with torch.no_grad():
        for output in ("router1", "aggregate"):
            assert torch.equal(load(folder, output)(x), load(undisturbed, output)(x))
        assert torch.equal(load(export(undisturbed, tmp_path / "head", output="head1"))(x), load(folder, "head1")(x))
    pytest.importorskip("onnxruntime")
    assert export_onnx(folder).images


@pytest.mark.slow
def test_stopped_again_and_again_it_ends_as_one_that_was_not(undisturbed, tmp_path):
    moments, stops = random.Random(0), 0
    while True:
        try:
            train(recipe(), run_dir=tmp_path / "run", stop=lambda: moments.random() < 0.1)
        except Interrupted:
            stops += 1
            continue
        break
    assert stops >= 4
    assert told(tmp_path / "run") == told(undisturbed)


@pytest.mark.slow
def test_routers_are_measured_on_the_command_line(undisturbed):
    ended = dualhead("evaluate", undisturbed, "--routers", "--limit", 8, "--json")
    assert ended.status == 0, ended.err
    found = json.loads(ended.out)
    assert set(found["routers"]) == {"router1", "router2"}
    assert found["held_out"] == 8
    assert set(found["deployed"]["threats"]) == {"Linf", "L2"}
    assert dualhead("evaluate", undisturbed, "--routers", "--limit", 8).status == 0
    wrong = dualhead("evaluate", undisturbed, "--routers", "--output-of", "router1")
    assert "--routers measures one part after another; leave --output-of out" in wrong.error_line
    poisoned = dualhead("evaluate", undisturbed, "--routers", "--poison", "{name: patch, target: 1}")
    assert "--poison: not with --routers" in poisoned.error_line
    alone = dualhead("evaluate", undisturbed, "--output-of", "router1", "--attack", "pgd-2", "--limit", 8, "--json")
    assert alone.status == 0, alone.err


@pytest.mark.slow
def test_where_no_attack_knows_of_heads_routers_meet_those_of_their_own(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    content = yaml.safe_load(config.read_text())
    content["evaluate"]["attacks"] = ["pgd-2"]
    config.write_text(yaml.safe_dump(content))
    asked = [resolve(Request(str(tmp_path / "run"), routers=routers)).attacks for routers in (False, True)]
    assert [[attack.label for attack in attacks] for attacks in asked] == [["pgd-2", "multihead"], ["pgd-2"]]


@pytest.mark.slow
def test_killed_at_random_moments(undisturbed, tmp_path):
    """kill -9 while it trains a router or measures."""
    content = {**EVERYTHING, "runtime": {**EVERYTHING["runtime"], "save_minutes": 1e-9}}
    assert run_in_spite_of(6, content, tmp_path / "run") >= 3
    assert told(tmp_path / "run") == told(undisturbed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [stage("linf", 3)]}, r"stages.0.train: .* its parts are trunk, head1, head2, router1, router2"),
        (
            {"model": {**EVERYTHING["model"], "aggregator": "mean"}},
            r"stages.0.train: .* its parts are trunk, head1, head2, aggregator; got 'router1'",
        ),
        ({"stages": [{**stage("linf", 2), "train": ["head1", "router1"]}]}, "router1 would learn nothing"),
        ({"stages": [{**stage("linf", 1), "free": {"replays": 2}, "objective": {"name": "after_dder", "router": 2,
          "old": ["Linf:0.1"]}, "train": ["router2"]}]}, "free moves attacked images"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        recipe(sequence=None, **changes)
