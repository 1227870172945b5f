"""Threats one after another in a run: what is told, what is refused, and that it resumes to the bit."""

from __future__ import annotations

import json
import random

import pytest
import torch
from torch import nn

from dualhead.errors import Interrupted, UserError
from dualhead.evaluation import Evaluation, evaluate
from dualhead.recipe import parse_recipe
from dualhead.runs.prepare import prepare
from dualhead.runs.run import train
from dualhead.runs.stages import train_stages
from dualhead.training import Silent
from dualhead.training.metrics import read_metrics
from helpers.resume import outcome, run_in_spite_of

ATTACK = {"name": "pgd", "steps": 2}


def stage(name, objective="sat", **settings):
    return {"name": name, "train": ["model"], "keep": "last", "objective": objective, "attack": ATTACK, "epochs": 1,
            "batch_size": 32, **settings}  # fmt: skip


AGAINST = {"among": ["Linf:0.1", "L2:0.5"]}
STAGES = [
    stage("linf", {"name": "alr", "base": "sat"}),
    stage("l2", {"name": "lwf", "base": {"name": "any_of", **AGAINST}}, threat="L2:0.5"),  # draws adaptively
    stage("l1", {"name": "ewc", "old": "L2:0.5", "images": 8, "base": {"name": "replay", "images": 8, **AGAINST}},
          threat="L1:3"),
    {"name": "mixed", "train": ["model"], "keep": "last", "threat": "L1:3",
     "interpolate": {"between": ["l2", "l1"], "shares": [0, 0.5]}},
]  # fmt: skip
EVERYTHING = {
    "name": "sequence",
    "data": {"source": "digits", "train_limit": 80, "validation": 16},
    "model": {"backbone": "cnn-4"},
    "threat": {"norm": "Linf", "eps": 0.1},
    "stages": STAGES,
    "sequence": {},
    "validation": {"attack": ATTACK, "under": "stage"},
    "evaluate": {"attacks": ["pgd-2"], "limit": 24, "gallery": 0, "batch_size": 8},
    "runtime": {"precision": "float32", "layout": "contiguous", "lanes": 1},
}


def recipe(**changes):
    return parse_recipe({**EVERYTHING, **changes})


def told(folder):
    """All that must come out the same: weights, log, and what was measured, without times."""
    found = json.loads((folder / "evaluation" / "results.json").read_text())["sequence"]
    for row in found["rows"]:
        del row["training_cost"]["seconds"]
    visits = {
        name: {key: column.tolist() for key, column in Evaluation.load(path).correct.items()}
        for name in ("linf", "l2", "l1")
        for path in [folder / "evaluation" / "sequence" / name]
    }
    return {**outcome(folder), "sequence": found, "visits": visits}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    result = train(recipe(), run_dir=folder)
    assert "kept" in str(result)
    return folder


@pytest.mark.slow
def test_what_a_run_tells(undisturbed):
    found = told(undisturbed)["sequence"]
    assert found["arrived"] == {"Linf": "linf", "L2": "l2", "L1": "l1"}
    assert [row["old_attacks"] for row in found["rows"]] == [None, "kept", "kept", "lost"]
    assert found["rows"][-1]["robust_accuracy"].keys() == {"Linf", "L2", "L1"}
    comparison = json.loads((undisturbed / "comparison.json").read_text())
    assert comparison["sequence"]["rows"][-1]["union"] == comparison["rows"][-1]["robust_accuracy"]["worst"]
    costs = [row["training_cost"]["forward_equivalents"] for row in found["rows"]]
    assert costs == sorted(costs)
    page = (undisturbed / "report.html").read_text()
    assert "Threats one after another" in page
    assert "After each stage, under each threat" in page
    saved = torch.load(next((undisturbed / "checkpoints" / "states").glob("*.pt")), weights_only=False)
    assert saved is not None
    assert (undisturbed / "checkpoints" / "l1" / "memory.safetensors").is_file()


@pytest.mark.slow
def test_stopped_again_and_again_it_ends_as_one_that_was_not(undisturbed, tmp_path):
    moments, stops = random.Random(0), 0
    while True:
        try:
            train(recipe(), run_dir=tmp_path / "run", stop=lambda: moments.random() < 0.4)
        except Interrupted:
            stops += 1
            continue
        break
    assert stops >= 4
    assert told(tmp_path / "run") == told(undisturbed)


@pytest.mark.slow
def test_killed_at_random_moments(undisturbed, tmp_path):
    """kill -9 while it trains, remembers, chooses weights or measures."""
    content = {**EVERYTHING, "runtime": {**EVERYTHING["runtime"], "save_minutes": 1e-9}}
    assert run_in_spite_of(8, content, tmp_path / "run") >= 3
    assert told(tmp_path / "run") == told(undisturbed)


def test_a_recipe_says_what_its_sequence_is_measured_under():
    made = recipe()
    assert [threat.kind for threat in made.threats_measured] == ["Linf", "L2", "L1"]
    assert [s.name for s in made.sequence_stages] == ["linf", "l2", "l1", "mixed"]
    assert [s.name for s in recipe(sequence=["l2", "mixed"]).sequence_stages] == ["l2", "mixed"]
    further = recipe(sequence={"threats": ["Linf:0.1", "L1:3", "Linf:0.2"]})
    assert [threat.eps for threat in further.threats_measured] == [0.1, 3, 0.2]
    assert recipe(sequence=None).sequence_stages == ()
    again = parse_recipe(made.resolved())
    assert again == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence": ["nobody"]}, "sequence.stages.0: no stage is called 'nobody'"),
        ({"sequence": ["l2", "linf"]}, "in their order, with mixed"),
        ({"sequence": ["linf", "l2"]}, "in their order, with mixed"),
        ({"sequence": ["linf", "linf"]}, "is named twice"),
        ({"sequence": {"threats": ["L2:0.5"]}}, "has one threat alone"),
        ({"sequence": {"order": []}}, "unknown key"),
        ({"evaluate": {"threats": ["Linf:0.1", "L2:1"]}}, "evaluate.threats: a sequence is measured under its own"),
        ({"stages": STAGES[2:]}, "'l2' is no earlier stage"),
        ({"validation": {"attack": ATTACK, "under": "x"}}, "validation.under"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        recipe(**changes)


def test_a_specialist_that_was_measured_otherwise_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"sequence.specialists.0: .* holds no finished evaluation"):
        train(recipe(sequence={"specialists": [str(tmp_path)]}), run_dir=tmp_path / "run")
    made = recipe()
    weaker = [threat.within(threat.eps / 2) for threat in made.threats_measured]
    evaluate(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), torch.rand(8, 1, 8, 8), torch.arange(8), threat=weaker,
        attacks=["pgd-2"], output_dir=tmp_path / "weaker", diagnostics=False,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"measured under Linf eps 0.05, .* the sequence is under Linf eps 0.1, "):
        train(recipe(sequence={"specialists": [str(tmp_path / "weaker")]}), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "objective",
    [
        "{name: replay, among: [Linf:0.1], images: 20}",
        "{name: ewc, images: 20}",
        "{name: energy, seeds: {name: gaussian, covariance: full}}",
    ],
)
def test_a_network_sees_images_of_its_own_size_alone_where_larger_ones_are_cut_from(tmp_path, monkeypatch, objective):
    seen, usual = set(), nn.Conv2d.forward

    def noted(layer, x):
        if layer.in_channels == 1:
            seen.add(tuple(x.shape[-2:]))
        return usual(layer, x)

    monkeypatch.setattr(nn.Conv2d, "forward", noted)
    train(
        "digits_natural",
        [
            "data.train_limit=80", "data.validation=20", "data.image_size=[8, 8]", "data.train_size=[12, 12]",
            "data.augment=[{name: random_resized_crop, size: [8, 8]}]", "model.backbone=cnn-4",
            "stages.natural.epochs=1", "stages.natural.batch_size=20", "stages.natural.attack=fgsm",
            f"stages.natural.objective={objective}", "evaluate={attacks: [fgsm], limit: 16, gallery: 0}",
            "validation.attack=fgsm", "runtime={device: cpu, precision: float32, layout: contiguous, lanes: 1}",
        ],
        run_dir=tmp_path / "run",
    )  # fmt: skip
    assert seen == {(8, 8)}


@pytest.mark.parametrize("deploy", [None, "mean"])
def test_what_is_held_to_the_network_as_it_was_is_the_output_that_learns(tmp_path, deploy):
    """In the only step of a stage the network is the one of before, also where the mean of the heads is deployed."""
    held = stage("held", {"name": "lwf"}, deploy=deploy, batch_norm="frozen") | {"train": ["head2"]}
    made = recipe(
        model={"backbone": "cnn-4", "attach_at": "stage1"}, stages=[held], sequence=None, validation={"attack": ATTACK},
        data={"source": "digits", "train_limit": 48, "validation": 16},
    )  # fmt: skip
    prepared = prepare(made, tmp_path)
    train_stages(prepared, Silent(), lambda: False)
    (line,) = read_metrics(prepared.folder.metrics)
    assert line["before"] == pytest.approx(0.0, abs=1e-6)
