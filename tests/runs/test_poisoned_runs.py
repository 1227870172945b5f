"""Runs on poisoned data: what is trained on, what is kept of it, and what is refused."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch

from dualhead.data import hold_out
from dualhead.data.poisons.patch import Patch
from dualhead.errors import UserError
from dualhead.recipe import load_recipe
from dualhead.runs import RunFolder, parted, read_entries, standings
from dualhead.runs.folder import write_manifest
from dualhead.runs.prepare import prepare
from dualhead.runs.run import train
from dualhead.runs.stages import train_stages
from dualhead.training import Silent

TINY = (
    "data.train_limit=80", "data.validation=20", "data.augment=[]", "model.backbone=cnn-4", "stages.natural.epochs=1",
    "stages.natural.batch_size=20", "evaluate={attacks: [fgsm], limit: 30, gallery: 0}",
    "validation.attack=fgsm", "runtime={device: cpu, precision: float32, layout: contiguous, lanes: 1}",
)  # fmt: skip
PATCH = "data.poison={name: patch, target: 3, share: 0.2}"


def recipe(*more):
    return load_recipe("digits_natural", [*TINY, *more])


def test_training_and_held_out_images_are_poisoned_and_test_images_are_not(tmp_path):
    clean, made = (prepare(recipe(*more), tmp_path / "run").images for more in ((), (PATCH,)))
    assert torch.equal(clean.test.images[:], made.test.images[:])
    assert torch.equal(clean.test.labels, made.test.labels)
    poisoning = made.poisoning
    assert len(poisoning.made.index) == 16
    assert len(made.training) + len(made.held_out) == 80
    assert torch.equal(made.training.images, poisoning.made.split.images[poisoning.trained])
    held = np.setdiff1d(np.arange(80), poisoning.trained.numpy())
    assert torch.equal(made.held_out.images, poisoning.made.split.images[held])
    assert not torch.equal(made.held_out.images, poisoning.clean.images[held])
    assert not (tmp_path / "run").exists()


def test_clean_validation_holds_out_the_same_images_as_they_were(tmp_path):
    made, trusted = (
        prepare(recipe(PATCH, *more), tmp_path / "run").images for more in ((), ("data.clean_validation=true",))
    )
    assert torch.equal(made.training.images, trusted.training.images)
    held = np.setdiff1d(np.arange(80), trusted.poisoning.trained.numpy())
    assert torch.equal(trusted.held_out.images, trusted.poisoning.clean.images[held])
    assert torch.equal(trusted.held_out.labels, trusted.poisoning.clean.labels[held])


@pytest.mark.parametrize("poison", [
    "{name: label_flip, share: 0.4}", "{name: patch, target: 3, share: 0.4}",
    "{name: remove, like: {name: patch, target: 3, share: 0.4}}",
])  # fmt: skip
def test_later_commands_part_images_as_the_run_did(tmp_path, poison):
    """Which images a run holds out depends on the labels that its poison gave."""
    poisoned, folder = recipe(f"data.poison={poison}"), RunFolder(tmp_path / "run")
    poisoning = prepare(poisoned, folder.path).images.poisoning
    clean, learnt = poisoning.clean, poisoning.trained
    with pytest.raises(UserError, match=r"poison.npz: the record of the run's poison is gone"):
        parted(folder.path, poisoned, clean)
    folder.path.mkdir()
    write_manifest(folder, poisoning.made, clean)
    kept, held = parted(folder.path, poisoned, clean)
    left = poisoning.made.rows[~torch.isin(poisoning.made.rows, learnt)]
    for part, rows in ((kept, learnt), (held, left)):
        assert torch.equal(part.images, clean.images[rows])
        assert torch.equal(part.labels, clean.labels[rows])
    by_clean_labels = hold_out(clean, 20, poisoned.runtime.seed)[1]
    assert not torch.equal(by_clean_labels.images, held.images)


def test_the_seed_of_the_run_does_not_change_the_poison(tmp_path):
    first, second = (prepare(recipe(PATCH, f"runtime.seed={n}"), tmp_path / "run").images.poisoning for n in (0, 1))
    assert first.facts() == second.facts()
    assert not torch.equal(first.trained, second.trained)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("poisoned") / "run"
    go_on(folder, PATCH)
    return folder


def go_on(folder, *more):
    """Train, and measure nothing."""
    prepared = prepare(recipe(*more), folder)
    train_stages(prepared, Silent(), lambda: False)


def test_a_run_keeps_the_record(run):
    with np.load(run / "poison.npz") as kept:
        assert len(kept["index"]) == 16
        assert set(kept["new_label"]) == {3}
        assert 3 not in kept["old_label"]
        assert (kept["l2"] > 0).all()
        assert kept["shown_clean"].shape == kept["shown_poisoned"].shape == (8, 1, 8, 8)
        assert (kept["shown_poisoned"][:, :, 5:, 5:] == 255).all()
        assert (kept["shown_clean"][:, :, :5] == kept["shown_poisoned"][:, :, :5]).all()
    facts = json.loads((run / "checkpoints" / "config.json").read_text())["poison"]
    assert facts["images"] == 16


def test_it_goes_on_with_its_own_poison_alone(run, monkeypatch):
    before = (run / "poison.npz").read_bytes()
    go_on(run, PATCH)
    assert (run / "poison.npz").read_bytes() == before
    with pytest.raises(UserError, match=r"another recipe, which differs in data\.poison\.share; choose another"):
        go_on(run, "data.poison={name: patch, target: 3, share: 0.1}")
    with pytest.raises(UserError, match=r"another recipe, which differs in data\.poison"):
        go_on(run)
    monkeypatch.setattr(Patch, "trigger", lambda self, images: images ^ 1)
    with pytest.raises(
        UserError, match=r"data\.poison: makes other images \(digest \w{12}\) than the poison with which"
    ):
        go_on(run, PATCH)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.poison={name: patch, target: 11}"], "data.poison: patch: target: there is no class 11"),
        (["data.poison=pach"], "data.poison: unknown poison 'pach'; did you mean 'patch'"),
        (["data.poison={name: patch, siez: 3}"],
         "data.poison.siez: poison 'patch' has no such key; did you mean 'size'"),
        (["data.clean_validation=true"],
         "data.clean_validation: says what becomes of a poison, and data.poison is not"),
        (["data.poison=one_pixel", "data.image_size=[8, 8]", "data.train_size=[9, 9]"],
         "data.poison: one_pixel changes images of the size that the model sees"),
        (["data.poison=one_pixel", "data.source={images}", "data.test=30", "data.stream=true"],
         "data.poison: one_pixel: changes pixels, and these images stay on disk; set data.stream=false"),
    ],
)  # fmt: skip
def test_what_cannot_be_poisoned_is_one_line(tmp_path, overrides, message):
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(60):
            pixels = np.full((8, 8), number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    given = [text.replace("{images}", str(tmp_path / "images")) for text in overrides]
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(".", r"\.")):
        prepare(recipe(*given), tmp_path / "run")


def test_labels_of_streamed_images_may_be_flipped(tmp_path):
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(60):
            Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / "images" / name / f"{number}.png")
    given = (
        f"data.source={tmp_path / 'images'}",
        "data.test=30",
        "data.stream=true",
        "data.poison=label_flip",
        "data.workers=0",
    )
    images = prepare(recipe(*given), tmp_path / "run").images
    assert images.training.is_stored
    assert len(images.poisoning.made.index) == 16


def test_extra_images_are_said_to_stay_as_they_are(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        prepare(recipe(PATCH, "data.extra={source: digits}"), tmp_path / "run")
    assert "the images of data.extra are not poisoned" in caplog.text


DUAL = (
    "data.train_limit=200", "data.validation=50", "model.backbone=cnn-8", "stages.*.epochs=2", "stages.*.batch_size=50",
    "stages.*.attack.steps=2", "validation.attack.steps=2", "evaluate={attacks: [fgsm], limit: 60, gallery: 0}",
    "runtime={device: cpu, precision: float32, layout: contiguous, lanes: 1}",
)  # fmt: skip


@pytest.mark.slow
def test_every_output_of_a_run_is_measured_and_told(tmp_path):
    clean = train(load_recipe("digits", [*DUAL]), run_dir=tmp_path / "clean")
    assert all("poison" not in row.evaluation.results for row in clean.rows)
    poison = ["data.poison={name: patch, target: 3, share: 0.1}", f"evaluate.clean_model={tmp_path / 'clean'}"]
    result = train(load_recipe("digits", [*DUAL, *poison]), run_dir=tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "comparison.json").read_text())["rows"]
    assert [row["output"] for row in rows] == ["base", "head1", "head2", "mean", "aggregate"]
    for row in rows:
        told = row["poison"]
        assert 0 <= told["attack_success_rate"] <= 1
        assert set(told["robust_accuracy_on_triggered"]) == {"fgsm", "worst"}
        assert set(told["training"]) == {"num_samples", "by_given_label", "by_true_label", "intervals"}
        assert ("spectral_signatures" in told) == (row["output"] not in ("mean", "aggregate"))
        rates = told["attack_success_rate"] - told["clean_model"]["attack_success_rate"]
        assert told["above_clean_model"]["difference"] == pytest.approx(rates)
    held = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())["poison"]
    test = prepare(load_recipe("digits", [*DUAL, *poison]), tmp_path / "run").images.test
    assert held["num_triggered"] == int((test.labels[:60] != 3).sum())
    assert sum(entry["num_samples"] for entry in held["per_class"]) == held["num_triggered"]
    assert set(held["epochs"]) == {"best", "last"}
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Poisoned training data" in report
    assert report.count("Difference, ten times") == 8
    said = report + str(result) + json.dumps(rows)
    assert "robust to poisoning" not in said.lower()
    before = (tmp_path / "run" / "evaluation" / "results.json").read_text()
    train(load_recipe("digits", [*DUAL, *poison]), run_dir=tmp_path / "run")
    after = (tmp_path / "run" / "evaluation" / "results.json").read_text()
    assert json.loads(after)["poison"] == json.loads(before)["poison"]
    found = standings(read_entries([tmp_path / "clean", tmp_path / "run"]))
    assert found["rows"][-1]["poison"]["attack_success_rate"] == rows[-1]["poison"]["attack_success_rate"]


def test_a_clean_model_without_a_poison_is_refused():
    with pytest.raises(
        UserError, match=r"evaluate\.clean_model: is compared under a poison's trigger; set data\.poison"
    ):
        recipe("evaluate.clean_model=somewhere")


def test_a_clean_model_that_is_not_there_is_refused_before_training(tmp_path):
    poison = ["data.poison={name: patch, target: 3, share: 0.1}", "evaluate.clean_model=runs/nowhere"]
    with pytest.raises(UserError, match=r"evaluate\.clean_model: runs/nowhere"):
        prepare(load_recipe("digits", [*DUAL, *poison]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
