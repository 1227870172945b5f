"""What `dualhead evaluate` is asked for reaches the evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dualhead.commands import evaluate as commands
from dualhead.commands import resolve as resolving
from dualhead.commands.resolve import Request, resolve
from dualhead.data import load_split
from dualhead.errors import UserError
from dualhead.recipe import load_recipe
from dualhead.runs.network import architecture_of
from dualhead.saving import save_model
from helpers.e2e import dualhead as command


@pytest.fixture(autouse=True)
def factory(tmp_path, monkeypatch):
    """A module of the user's own, `own_factory:make`."""
    source = "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    (tmp_path / "own_factory.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)


def handed_over(monkeypatch, **options):
    """The folder, and what `assess` gives to `evaluate` for a request of digits."""
    given = {}

    def evaluate(model, images, labels, **more):
        given.update(model=model, images=images, labels=labels, **more)

    monkeypatch.setattr(commands, "evaluate", evaluate)
    asked = {"model": "own_factory:make", "data": "digits", "eps": "0.1", "device": "cpu", **options}
    folder, _ = commands.assess(Request(**asked))
    return folder, given


def test_what_is_asked_for_is_what_is_evaluated(monkeypatch, tmp_path):
    told = {"seed": 5, "batch_size": 16, "precision": "float32", "save_adversarial": True}
    more = {"eps": "0, 0.02, 0.08, 0.01", "norm": "L2", "limit": 7, "overwrite": True, "output_dir": tmp_path / "out"}
    folder, given = handed_over(monkeypatch, attacks=("fgsm",), **told, **more)
    test = load_split("digits", "test")
    assert folder == tmp_path / "out" == given["output_dir"]
    assert torch.equal(given["images"], test.images[:7])
    assert torch.equal(given["labels"], test.labels[:7])
    assert (given["threat"].norm, given["threat"].eps) == ("L2", 0.08)
    assert list(map(float, given["eps"])) == [0.0, 0.02, 0.08, 0.01]
    assert {name: given[name] for name in told} == told
    assert [attack.label for attack in given["attacks"]] == ["fgsm"]
    assert not given["resume"]
    assert not given["model"].training


def test_a_note_names_its_attack_once(tmp_path):
    asked = ["--attack", "autoattack-fast", "--eps", 0.1, "--limit", 4, "--output", tmp_path / "out", "--quiet"]
    ended = command("evaluate", "own_factory:make", "--data", "digits", *asked)
    assert ended.status == 0, ended.err
    assert "\nautoattack-fast: an upper bound" in ended.out


def test_what_is_not_asked_for_is_as_it_is_by_default(monkeypatch, tmp_path):
    _, given = handed_over(monkeypatch, output_dir=tmp_path / "out")
    assert (given["seed"], given["resume"], list(given["eps"]), len(given["images"])) == (0, True, [], 400)
    assert (given["threat"].norm, given["threat"].eps, given["precision"]) == ("Linf", 0.1, "auto")


def saved(folder, **more):
    """A saved model of ten classes of grey 8x8 images, which tells what it was trained for."""
    recipe = load_recipe("digits_natural")
    architecture = architecture_of(recipe, load_split("digits", "train"))
    facts = {"output": "model", "class_names": list(map(str, range(10))), **more}
    save_model(folder, architecture.create(), architecture, facts)
    return folder


def test_images_come_to_size_as_the_saved_model_says(monkeypatch, tmp_path):
    asked = {}

    def load_images(source, part, **more):
        asked.update(source=source, part=part, **more)
        return load_split("digits", "test")

    monkeypatch.setattr(resolving, "load_split", load_images)
    folder = saved(tmp_path / "model", image_size=[24, 20], crop=0.875, threat={"norm": "L2", "eps": 0.5})
    found = resolve(Request(model=str(folder), data="there", device="cpu"))
    assert (asked["source"], asked["part"], asked["image_size"], asked["crop"]) == ("there", "test", [24, 20], 0.875)
    assert (found.framing.crop, found.threat.norm, found.threat.eps) == (0.875, "L2", 0.5)
    resolve(Request(model=str(folder), data="there", image_size="32x16", device="cpu"))
    assert (asked["image_size"], asked["crop"]) == ((32, 16), 0.875)


def test_a_name_is_looked_up_once(monkeypatch, tmp_path):
    """A name of the Hub would be downloaded as often."""
    folder, looked = saved(tmp_path / "model", threat={"norm": "Linf", "eps": 0.1}), []
    monkeypatch.setattr(resolving, "find_model", lambda name: looked.append(name) or folder)
    found = resolve(Request(model="someone/model", data="digits", device="cpu"))
    assert looked == ["someone/model"]
    assert ([each.label for each in found.attacks], found.results) == (["pgd-40"], Path("evaluations/model/digits"))
    assert found.gallery == found.results
    assert not found.model.training


def test_a_factory_makes_what_fits_the_images():
    asked = {"model": "own_factory:make", "data": "digits", "device": "cpu"}
    with pytest.raises(UserError, match="--eps is needed"):
        resolve(Request(**asked))
    with pytest.raises(UserError, match="--stage is for runs, and own_factory:make is none"):
        resolve(Request(**asked, eps="0.1", stage="main_head"))
    found = resolve(Request(**asked, eps="0.1"))
    assert found.model(found.images.images[:2].float() / 255).shape == (2, 10)
    assert found.results == Path("evaluations/own_factory.make/0.1_digits")


def test_routes_of_a_network_with_one_head_are_refused_by_what_it_lacks():
    ended = command("evaluate", "own_factory:make", "--data", "digits", "--eps", "0.1", "--routes", "all")
    assert ended.err.splitlines()[-1].endswith("--routes: own_factory:make has no tied heads (model.second_head: tied)")


def test_held_out_images_of_routers_have_the_size_that_the_network_takes(monkeypatch):
    recipe = load_recipe("digits_natural", ["data.validation=20", "data.image_size=[8, 8]", "data.train_size=[12, 12]",
                                            "data.augment=[{name: random_resized_crop, size: [8, 8]}]"])  # fmt: skip
    monkeypatch.setattr(commands, "read_recipe", lambda path: recipe)
    images, labels = commands._held_out(Request(model="run"), 5)
    assert images.shape == (5, 1, 8, 8)
    assert len(labels) == 5


def test_images_of_another_size_than_the_networks_are_told(monkeypatch, tmp_path, caplog):
    folder = str(saved(tmp_path / "model", threat={"norm": "Linf", "eps": 0.1}))
    resolve(Request(model=folder, data="digits", device="cpu"))
    assert "--image-size" not in caplog.text
    resolve(Request(model=folder, data="digits", image_size="12x16", device="cpu"))
    assert "of 8x8 and is measured on images of 12x16, as they are; --image-size 8x8 resizes" in caplog.text
