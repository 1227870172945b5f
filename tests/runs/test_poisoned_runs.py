"""Runs on poisoned data: what is trained on, what is kept of it, and what is refused."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch

from dualhead.data.poisons.patch import Patch
from dualhead.errors import UserError
from dualhead.recipe import load_recipe
from dualhead.runs.prepare import prepare
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
