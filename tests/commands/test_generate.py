"""`dualhead sample` and `dualhead counterfactual` on a small run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from dualhead.commands.generate import chosen
from dualhead.errors import UserError
from helpers.e2e import dualhead

TINY = (
    "data.train_limit=80", "data.validation=16", "model.backbone=cnn-4", "stages.*.epochs=1", "evaluate.limit=8",
    "evaluate.gallery=0", "evaluate.attacks=[fgsm]", "validation.attack.steps=1", "runtime.device=cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate") / "run"
    ended = dualhead("train", "digits_natural", *TINY, "--run-dir", folder, "--quiet")
    assert ended.status == 0, ended.err
    return folder


def test_samples_have_their_classes_and_do_not_depend_on_what_is_drawn_beside_them(run, tmp_path):
    ended = dualhead(
        "sample", run, "--classes", "2-4", "--count", "3", "--steps", "2", "--output", tmp_path / "a", "--json"
    )
    assert ended.status == 0, ended.err
    assert json.loads(ended.out)["samples"] == 9
    with np.load(tmp_path / "a" / "samples.npz") as many:
        assert many["image"].shape == (9, 1, 8, 8)
        assert many["image"].dtype == np.uint8
        assert many["label"].tolist() == [2, 2, 2, 3, 3, 3, 4, 4, 4]
        assert (
            dualhead("sample", run, "--classes", "3", "--count", "2", "--steps", "2", "--output", tmp_path / "b").status
            == 0
        )
        with np.load(tmp_path / "b" / "samples.npz") as few:
            assert np.array_equal(few["image"], many["image"][3:5])
    for name in ("sheet.png", "strip.png"):
        with Image.open(tmp_path / "a" / name) as sheet:
            assert sheet.size == (3 * 68 + 4, 3 * 68 + 4)


def test_counterfactuals_say_how_far_they_went(run, tmp_path):
    words = ("--to", "1,7", "--limit", "4", "--radius", "0.5", "--steps", "3", "--output", tmp_path / "c")
    ended = dualhead("counterfactual", run, *words)
    assert ended.status == 0, ended.err
    with np.load(tmp_path / "c" / "counterfactuals.npz") as found:
        assert found["path"].shape == (4, 8, 1, 8, 8)
        assert found["target"].tolist() == [1, 7] * 4
        assert found["index"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert (found["distance"] <= 0.5 + 1e-5).all()
        assert np.allclose(found["probabilities"].sum(1), 1, atol=1e-5)


def test_classes_are_read_by_number_range_or_name():
    names = ("cat", "dog", "t-shirt")
    assert chosen(None, names) == [0, 1, 2]
    assert chosen("t-shirt, 0-1,cat", names) == [2, 0, 1]
    for words in ("3", "2-1", "fish", ","):
        with pytest.raises(UserError, match="class"):
            chosen(words, names)
