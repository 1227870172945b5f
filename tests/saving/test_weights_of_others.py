"""Weights as the field publishes them, and weights that do not say how they normalise images."""

from __future__ import annotations

import argparse
import datetime
import enum
import logging
import os
import pathlib
import sys
import types

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from dualhead.data import load_split
from dualhead.errors import UserError
from dualhead.models import Normalize, Wrapped, backbones, channel_statistics, load_state, normalisation_in, read_state
from dualhead.recipe.yaml import load_recipe
from dualhead.runs.prepare import prepare
from dualhead.saving.models import normalisation_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
M, S = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def net(normalize=None):
    torch.manual_seed(1)
    return backbones.build("cnn-4").create(10, (3, 16, 16), normalize or Normalize.identity(3))


OWN = net().state_dict()


def under(prefix, state=OWN):
    return {prefix + name: tensor for name, tensor in state.items()}


def madry(dp="module."):
    state = {}
    for part, norm in ((dp, "normalizer"), (f"{dp}attacker.", "normalize")):
        state |= {f"{part}{norm}.new_mean": M, f"{part}{norm}.new_std": S} | under(f"{part}model.")
    return state


WITH = {
    "madry": {"model": madry(), "epoch": 150, "optimizer": {}, "schedule": None},
    "madry without module": {"model": madry("")},
    "sequential": {"state_dict": under("1.") | {"0.mean": M, "0.std": S}},
    "sequential in DataParallel": under("module.1.") | {"module.0.mean": M, "module.0.std": S},
    "sequential in torch.compile": under("_orig_mod.1.") | {"_orig_mod.0.mu": M[None], "_orig_mod.0.sigma": S[None]},
    "Lightning": {"state_dict": under("model.net.") | {"model.normalizer.mean": M, "model.normalizer.std": S}},
    "smoothing": under("1.") | {"0.means": M.flatten(), "0.sds": S.flatten()},
    "0 to 255": under("model.") | {"data_preprocessor.mean": M * 255, "data_preprocessor.std": S * 255},
}


@pytest.mark.parametrize("kind", list(WITH))
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_published_layout_loads_with_its_normalisation(kind, wrapped, tmp_path):
    torch.save(WITH[kind], tmp_path / "w.pt")
    mean, std = normalisation_of(tmp_path / "w.pt")
    assert (mean, std) == (pytest.approx(MEAN), pytest.approx(STD))
    model = Wrapped(Normalize(mean, std), net()) if wrapped else net(Normalize(mean, std))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    load_state(model, read_state(tmp_path / "w.pt"), "w.pt")
    torch.testing.assert_close(model.eval()(IMAGES), net(Normalize(MEAN, STD)).eval()(IMAGES))


def test_a_deviation_of_bytes_tells_them_too(caplog):
    state = {"mean": torch.zeros(1), "std": torch.tensor([255.0])}
    assert normalisation_in(state, "weights.pt") == ((0.0,), (1.0,))
    assert "mean and std are of images from 0 to 255, and read as [0.0] and [1.0]" in caplog.text


def test_a_second_copy_that_is_another_network_is_refused(tmp_path):
    state = madry()
    name = next(name for name in state if name.startswith("module.attacker.model.") and state[name].ndim > 1)
    torch.save({"model": state | {name: state[name] + 1}}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"attacker.model.* is not what"):
        read_state(tmp_path / "w.pt")


def beside(**more):
    return {"net": OWN, "epoch": 3, **more}


@pytest.mark.parametrize(
    "content",
    [
        beside(acc=np.float64(0.5)),
        beside(acc=np.float32(0.5), n=np.int64(3), ok=np.bool_(True)),
        beside(curve=np.arange(5.0), words=np.array(["a", "b"])),
        beside(args=argparse.Namespace(lr=0.1, folder=pathlib.Path("x"))),
        beside(when=datetime.datetime(2020, 1, 1)),
        {"ema": OWN, "model": OWN},
        {"unaveraged_model_state_dict": under("module."), "model_state_dict": under("module.")},
        {"state_dict": under("model.")},
        {"state_dict": under("1.")},
    ],
)
def test_what_lies_beside_the_weights_is_passed_over(content, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    model = net()
    nn.init.zeros_(next(model.parameters()))
    load_state(model, read_state(tmp_path / "w.pt"), "w.pt")
    assert all(torch.equal(tensor, OWN[name]) for name, tensor in model.state_dict().items())


class Runs:
    """What a pickle can ask for beside tensors, among it the names that are allowed."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def test_nothing_in_a_file_is_executed(tmp_path):
    for asked in (Runs(os.mkdir, str(tmp_path / "made")), Runs(pathlib.Path.mkdir, pathlib.Path(tmp_path / "made"))):
        torch.save(beside(acc=asked), tmp_path / "w.pt")
        with pytest.raises(UserError, match="would run code"):
            read_state(tmp_path / "w.pt")
        assert not (tmp_path / "made").exists()
    torch.save(net(), tmp_path / "whole.pt")
    with pytest.raises(UserError, match="would run code"):
        read_state(tmp_path / "whole.pt")
    hidden = np.array([Runs(os.mkdir, str(tmp_path / "made"))], dtype=object)
    torch.save(beside(a=hidden), tmp_path / "w.pt")
    with pytest.raises(UserError, match="would run code"):
        read_state(tmp_path / "w.pt")
    assert not (tmp_path / "made").exists()


def test_several_state_dicts_that_differ_need_a_name(tmp_path, caplog):
    other = {name: tensor + 1 for name, tensor in OWN.items()}
    torch.save({"model": OWN, "ema": other}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"differ.*w.pt#model"):
        read_state(tmp_path / "w.pt")
    name = next(iter(OWN))
    assert torch.equal(read_state(f"{tmp_path}/w.pt#ema")[name], other[name])
    assert torch.equal(read_state(f"{tmp_path}/w.pt#model")[name], OWN[name])
    with pytest.raises(UserError, match="no state dict under 'swa'; there is model, ema"):
        read_state(f"{tmp_path}/w.pt#swa")
    torch.save({"unaveraged_model_state_dict": other, "model_state_dict": OWN}, tmp_path / "w.pt")
    assert torch.equal(read_state(tmp_path / "w.pt")[name], OWN[name])
    assert "averaged" in caplog.text


# ---- weights that do not say how they normalise


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """State dicts of one network on the digits: trained on values in [0, 1], on standardised ones, and not at all."""
    folder = tmp_path_factory.mktemp("weights")
    split = load_split("digits", "train")
    x, y = split.images.float() / 255, split.labels
    mean, std = channel_statistics(split.images)
    for name, normalize in (("raw", Normalize([0.0], [1.0])), ("data", Normalize(mean, std))):
        torch.manual_seed(0)
        model = backbones.build("cnn-4").create(10, (1, 8, 8), normalize)
        if name == "raw":
            torch.save(model.state_dict(), folder / "fresh.pt")
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(6):
            for rows in torch.randperm(len(x)).split(64):
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimiser.step()
        torch.save({"state_dict": model.state_dict()}, folder / f"{name}.pt")
    return folder


def recipe_from(weights, folder, *, heads=False, **stage):
    train = ["trunk", "head1"] if heads else ["model"]
    content = {
        "data": {"source": "digits", "validation": 64},
        "model": {"backbone": "cnn-4", **({"attach_at": "stage1", "aggregator": "mean"} if heads else {})},
        "threat": {"norm": "Linf", "eps": 0.1},
        "stages": [{"name": "one", "train": train, "objective": "natural", "epochs": 0, "init": str(weights),
                    "keep": "last", **stage}],
        "validation": {"attack": "pgd-1"},
        "evaluate": {"attacks": ["pgd-2"], "limit": 16, "gallery": 0},
        "runtime": {"device": "cpu"},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("made", ["raw", "data"])
def test_the_way_that_clearly_wins_is_taken_and_told(made, heads, trained, tmp_path, caplog):
    recipe = load_recipe(recipe_from(trained / f"{made}.pt", tmp_path, heads=heads))
    with caplog.at_level(logging.WARNING):
        prepared = prepare(recipe, tmp_path / "run")
    assert (prepared.architecture.mean == (0.0,)) == (made == "raw")
    assert f"model.normalize: {'none' if made == 'raw' else 'data'}" in caplog.text
    assert "of 512 training images" in caplog.text


def test_weights_for_which_neither_way_is_right_need_the_key_and_leave_nothing(trained, tmp_path):
    path = recipe_from(trained / "fresh.pt", tmp_path)
    with pytest.raises(UserError, match=r"stages.0.init: .*neither is clearly right; set model.normalize"):
        prepare(load_recipe(path), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for way in ("none", "data"):
        prepare(load_recipe(path, [f"model.normalize={way}"]), tmp_path / "run")


def test_weights_whose_classes_are_replaced_cannot_be_tried_and_a_word_says_so(trained, tmp_path, caplog):
    prepare(load_recipe(recipe_from(trained / "raw.pt", tmp_path, replace_classifier=True)), tmp_path / "run")
    assert "says nothing of how it normalises" in caplog.text


# ---- RobustBench


class DataSet(enum.Enum):
    CIFAR = "cifar10"


class Threats(enum.Enum):
    LINF = "Linf"


class Published(nn.Module):
    """As RobustBench has them: normalises by buffers that many files lack."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mu", M[None].clone())
        self.register_buffer("sigma", S[None].clone())
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(self.conv((x - self.mu) / self.sigma).relu().mean((2, 3)))


@pytest.fixture
def bench(monkeypatch, tmp_path):
    module = types.ModuleType("robustbench.model_zoo")
    entries = {"Mine2020": {"model": Published, "gdrive_id": "x"}, "Many2020": {"model": Published, "gdrive_id": ["x"]}}
    module.model_dicts = {DataSet.CIFAR: {Threats.LINF: entries}}
    monkeypatch.setitem(sys.modules, "robustbench", types.ModuleType("robustbench"))
    monkeypatch.setitem(sys.modules, "robustbench.model_zoo", module)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/cifar10/Linf").mkdir(parents=True)
    return tmp_path / "models/cifar10/Linf"


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
@pytest.mark.parametrize("lacks", [False, True])
def test_a_model_of_robustbench_is_the_package_s_with_the_file_s_weights(bench, prefix, lacks):
    torch.manual_seed(5)
    model = Published().eval()
    state = {n: t for n, t in model.state_dict().items() if not (lacks and n in ("mu", "sigma"))}
    torch.save({"state_dict": under(prefix, state)}, bench / "Mine2020.pt")
    found = backbones.build("robustbench:Mine2020").published(10, (3, 16, 16)).eval()
    torch.testing.assert_close(found(IMAGES), model(IMAGES))


def test_a_model_of_robustbench_that_is_not_there_says_what_is_missing(bench):
    for name, words in [
        ("Mine2020", "its weights are not at models/cifar10/Linf/Mine2020.pt"),
        ("Many2020", "ensemble"),
        ("Nobody2020", "is not in RobustBench; there is Many2020, Mine2020"),
    ]:
        with pytest.raises(UserError, match=words):
            backbones.build(f"robustbench:{name}").published(10, (3, 16, 16))
    assert not list(bench.iterdir())


def test_without_the_package_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "robustbench.model_zoo", None)
    with pytest.raises(UserError, match="robustbench cannot be imported"):
        backbones.build("robustbench:Mine2020").published(10, (3, 16, 16))
