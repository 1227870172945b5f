"""`dualhead evaluate --poison`: the trigger of a poison on a model that nobody trained here."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from dualhead.commands.evaluate import assess
from dualhead.commands.resolve import Request
from dualhead.data import load_split
from dualhead.errors import UserError
from dualhead.evaluation import Evaluation
from helpers.e2e import dualhead as command


class ByCorner(nn.Module):
    """Class 3 where the bottom right pixel is white, else class 5."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        logits = torch.zeros(len(x), 10)
        logits[:, 5] = 1.0
        marked = torch.zeros(10)
        marked[3] = 5.0
        return self.scale * (logits + (x[:, 0, -1, -1] > 0.99)[:, None] * marked + 0 * x.flatten(1)[:, :10])


@pytest.fixture(autouse=True)
def factory(tmp_path, monkeypatch):
    """Modules of the user's own, `own_triggered:make` and `own_triggered:plain`."""
    (tmp_path / "own_triggered.py").write_text(
        "from test_triggers import ByCorner\nfrom torch import nn\n"
        "def make(): return ByCorner()\ndef plain(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "test_triggers", __import__("sys").modules[__name__])


def asked(tmp_path, **more):
    given = {"data": "digits", "eps": "0.05", "device": "cpu", "attacks": ("fgsm",), "limit": 60}
    given |= {"precision": "float32", "output_dir": tmp_path / "out", **more}
    return Request(model="own_triggered:make", **given)


def test_success_is_over_images_of_other_classes_and_kept_with_the_results(tmp_path):
    folder, evaluation = assess(asked(tmp_path, poison="{name: patch, target: 3}"))
    told = evaluation.results["poison"]
    test = load_split("digits", "test").first(60)
    assert told["num_triggered"] == int((test.labels != 3).sum())
    assert (told["name"], told["target"], told["attack_success_rate"]) == ("patch", 3, 1.0)
    assert told["accuracy_on_triggered"] == 0.0
    assert json.loads((folder / "results.json").read_text())["poison"] == told
    triggered = Evaluation.load(folder / "triggered")
    assert triggered.num_samples == told["num_triggered"]
    _, again = assess(asked(tmp_path, poison="{name: patch, target: 3}"))
    assert again.results["poison"] == told
    _, other = assess(asked(tmp_path, poison="{name: patch, target: 4}", overwrite=True))
    assert other.results["poison"]["attack_success_rate"] == 0.0


def test_it_stands_beside_a_model_of_clean_data(tmp_path):
    from dualhead.recipe import load_recipe
    from dualhead.runs.network import architecture_of
    from dualhead.saving import save_model

    architecture = architecture_of(load_recipe("digits_natural"), load_split("digits", "train"))
    facts = {"output": "model", "class_names": list(map(str, range(10)))}
    save_model(tmp_path / "clean", architecture.create(), architecture, facts)
    _, evaluation = assess(asked(tmp_path, poison="{name: patch, target: 3}", clean_model=str(tmp_path / "clean")))
    told = evaluation.results["poison"]
    assert told["clean_model"]["where"] == str(tmp_path / "clean")
    rate = told["clean_model"]["attack_success_rate"]
    assert told["above_clean_model"]["difference"] == pytest.approx(1.0 - rate)


def saved(folder, names):
    """A model that takes every image for class 3 of its own, with names of its classes."""
    from dualhead.recipe import load_recipe
    from dualhead.runs.network import architecture_of
    from dualhead.saving import save_model

    digits = load_split("digits", "train")
    made = architecture_of(load_recipe("digits_natural"), digits)
    made = made.model_copy(update={"num_classes": len(names)})
    model = made.create()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1].bias[min(3, len(names) - 1)] = 5.0
    save_model(folder, model, made, {"output": "model", "class_names": names})
    return str(folder)


@pytest.mark.parametrize("target", [3, 6])
def test_a_clean_model_that_numbers_classes_otherwise_is_asked_for_the_same_class(tmp_path, target):
    names = [str(9 - number) for number in range(10)]  # its class 3 is the digit 6
    other = saved(tmp_path / "clean", names)
    asked_for = asked(tmp_path, poison=f"{{name: patch, target: {target}}}", clean_model=other, limit=20)
    _, evaluation = assess(asked_for)
    assert evaluation.results["poison"]["clean_model"]["attack_success_rate"] == float(target == 6)


@pytest.mark.parametrize(
    ("names", "message"),
    [(["cat", "dog"], "is for 2 classes of 1-channel images, and the test images are of 10 classes"),
     (None, "there is no such folder")],
)  # fmt: skip
def test_a_clean_model_of_other_classes_is_refused_before_anything_is_measured(tmp_path, names, message):
    other = saved(tmp_path / "clean", names) if names else str(tmp_path / "clean")
    with pytest.raises(UserError, match=f"--clean-model: .*{message}"):
        assess(asked(tmp_path, poison="{name: patch, target: 3}", clean_model=other))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"poison": "pach"}, "--poison: unknown poison 'pach'; did you mean 'patch'"),
        ({"poison": "[1, 2]"}, r"--poison \[1, 2\]: write a name, as patch, or its section of a recipe"),
        ({"poison": "{name: patch"}, "--poison {name: patch: line 1 is not valid YAML"),
        ({"poison": "{name: patch, target: 10}"}, "--poison: patch: target: there is no class 10"),
        ({"poison": "{name: patch, size: 9}"}, "--poison: patch: a patch of 9 pixels"),
        ({"poison": "class_noise"}, "--poison: class_noise has no trigger"),
        ({"clean_model": "runs/clean"}, "--clean-model: is compared under a trigger; say which by --poison"),
        ({"poison": "patch", "limit": 1, "seed": 0}, None),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_leaves_nothing(tmp_path, options, message):
    if message is None:  # the first test image alone may be of the target's class
        first = int(load_split("digits", "test").labels[0])
        options, message = {"poison": f"{{name: patch, target: {first}}}", "limit": 1}, "are of the target's class"
    with pytest.raises(UserError, match=message):
        assess(asked(tmp_path, **options))
    assert not (tmp_path / "out").exists()


def test_the_command_shows_success_in_the_table(tmp_path):
    words = ["evaluate", "own_triggered:make", "--data", "digits", "--eps", "0.05", "--attack", "fgsm", "--limit", 60]
    ended = command(*words, "--poison", "{name: patch, target: 3}", "--output", tmp_path / "out", "--quiet")
    assert ended.status == 0, ended.err
    assert "attack" in ended.out
    assert "success" in ended.out
    assert "100.0" in ended.out
    assert "robust to poisoning" not in ended.out.lower()
