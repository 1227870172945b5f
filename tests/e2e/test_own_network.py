"""A network in one file of the user's own: trained by a recipe, evaluated, exported, loaded elsewhere; and transfer."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

from dualhead import load
from dualhead.saving.architecture import Architecture
from dualhead.saving.models import save_model
from helpers.e2e import TINY, dualhead

NETWORK = '''
import torch
from torch import nn


class Block(nn.Module):
    """A residual block that takes another way on small feature maps, and a third one for bright images."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.small = nn.Conv2d(width, width, 1)

    def forward(self, x):
        if x.shape[-1] < 8:
            return x + self.small(x)
        if x.mean() > 0.5:
            x = x * 0.5
        return x + torch.relu(self.bn(self.conv(x)))


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.block1, self.block2 = Block(6), Block(6)
        self.head = nn.Linear(6 * 16, num_classes)

    def forward(self, x):
        x = self.block1(torch.relu(self.stem(x)))
        x = self.block2(nn.functional.avg_pool2d(x, 2))
        return {"logits": self.head(x.view(x.shape[0], -1)), "features": x}


def make(num_classes):
    return Net(num_classes)
'''
RECIPE = """
extends: digits
model: {backbone: "my_network:make", attach_at: model.block1}
runtime: {layout: auto}  # `digits` pins one that `view` in the network above does not take
"""
SHORT = (*TINY, "evaluate.gallery=0")
OPTIONS = [word for word in SHORT if not word.startswith("model.backbone")]
IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the network's file and a recipe, as a user's project has."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "my_network.py").write_text(NETWORK)
    (folder / "mine.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        ended = dualhead("train", "mine.yaml", *OPTIONS, "--run-dir", "run", "--json", "--quiet")
        assert ended.status == 0, ended.err
        yield [row["name"] for row in json.loads(ended.out)["rows"]]


def test_it_is_trained_and_evaluated(folder, trained):
    assert trained == ["base model", "head 1", "head 2", "mean of heads", "aggregate of heads"]
    ended = dualhead("evaluate", folder / "run", "--attack", "pgd-2", "--limit", "16", "--device", "cpu", "--json")
    assert ended.status == 0, ended.err
    assert json.loads(ended.out)["num_samples"] == 16


def test_exported_and_loaded_in_another_process_it_gives_the_same_logits_to_the_bit(folder, trained):
    del trained
    assert dualhead("export", folder / "run", "--to", folder / "exported").status == 0
    torch.save(IMAGES, folder / "images.pt")
    code = (
        "import torch, dualhead; model = dualhead.load('exported'); "
        "torch.save(model(torch.load('images.pt')).detach(), 'logits.pt')"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True, timeout=300)
    for source in ("run", "exported"):
        assert torch.equal(load(folder / source)(IMAGES), torch.load(folder / "logits.pt"))


# ---- weights that exist


def architecture(classes, backbone=None, **changes):
    backbone = backbone or {"name": "cnn", "width": 4, "stages": 2, "convolutions": 1}
    return Architecture(
        backbone=backbone, num_classes=classes, image_shape=(1, 8, 8), mean=(0.3,), std=(0.4,), **changes
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """An exported model for seven classes."""
    folder = tmp_path_factory.mktemp("published")
    save_model(folder, architecture(7).create(), architecture(7), {})
    return folder


def weights_of(run, stage):
    return load_state_file(run / "checkpoints" / stage / "last.safetensors")


def load_state_file(path):
    from dualhead.models import read_state

    return read_state(path)


def test_a_robust_model_becomes_head_1_and_stage_1_is_skipped(tmp_path):
    plain = architecture(10).create()
    torch.save({"state_dict": {f"module.{k}": v for k, v in plain.state_dict().items()}}, tmp_path / "robust.pt")
    ended = dualhead(
        "train", "digits", *SHORT, "stages.main_head.init=" + str(tmp_path / "robust.pt"), "stages.main_head.epochs=0",
        "model.normalize={mean: [0.3], std: [0.4]}", "--run-dir", tmp_path / "run", "--quiet",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    torch.testing.assert_close(load(tmp_path / "run", "head1")(IMAGES), plain.eval()(IMAGES))


def test_weights_that_carry_their_normalisation_set_it(tmp_path):
    plain = architecture(10).create()
    state = {"mu": torch.full((1, 1, 1, 1), 0.3), "sigma": torch.full((1, 1, 1, 1), 0.4), **plain.state_dict()}
    torch.save(state, tmp_path / "robust.pt")
    words = [*SHORT, "stages.main_head.init=" + str(tmp_path / "robust.pt"), "stages.main_head.epochs=0"]
    for _ in range(2):  # the second time from the finished run
        ended = dualhead("train", "digits", *words, "--run-dir", tmp_path / "run", "--quiet")
        assert ended.status == 0, ended.err
    kept = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["architecture"]
    assert (kept["mean"], kept["std"]) == ([pytest.approx(0.3)], [pytest.approx(0.4)])
    torch.testing.assert_close(load(tmp_path / "run", "head1")(IMAGES), plain.eval()(IMAGES))
    ended = dualhead("train", "digits", *words, "model.normalize=none", "--run-dir", tmp_path / "other")
    assert ended.status == 2
    assert "set model.normalize: {mean: [0.3], std: [0.4]}" in ended.error_line
    assert not (tmp_path / "other").exists()


def test_transfer_to_other_classes_trains_from_all_but_the_last_layer(tmp_path, published):
    words = [*SHORT, f"stages.main_head.init={published}"]
    refused = dualhead("train", "digits", *words, "--run-dir", tmp_path / "no")
    assert refused.status == 2
    assert "of another shape (fc.weight is (7, 8), (10, 8) in the model" in refused.error_line
    ended = dualhead(
        "train", "digits", *words, "stages.main_head.replace_classifier=true", "stages.*.epochs=0",
        "stages.*.keep=last", "--run-dir", tmp_path / "run", "--quiet",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    before, after = load_state_file(published / "model.safetensors"), weights_of(tmp_path / "run", "main_head")
    for name, tensor in before.items():
        part = "trunk" if name.startswith("stage1.") else "head1"
        found = after[f"{part}.{name}"]
        assert len(found) == 10 if name.startswith("fc.") else torch.equal(found, tensor)
    kept = yaml.safe_load((tmp_path / "run" / "model" / "config.json").read_text())["architecture"]
    assert (kept["num_classes"], kept["mean"]) == (10, [0.3])


def test_a_classifier_is_replaced_only_in_weights(tmp_path):
    ended = dualhead("train", "digits", *SHORT, "stages.main_head.replace_classifier=true", "--run-dir", tmp_path / "r")
    assert ended.status == 2
    assert "replace_classifier is for weights that init names" in ended.error_line


@pytest.mark.slow
@pytest.mark.parametrize("deployed", ["mean", "head2"])
def test_guided_distillation_takes_any_network(deployed, tmp_path, monkeypatch):
    """Also one that has no layer of its own for normalisation: its heads begin at the images."""
    (tmp_path / "own_net.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    ended = dualhead(
        "train", "guided_distillation", "data.source=digits", "model.backbone=own_net:make", *SHORT[1:],
        "threat.eps=0.1", f"stages.distilled.deploy={deployed}", "data.augment=[]", "--run-dir", "run", "--quiet",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    assert load("run")(torch.rand(2, 1, 8, 8)).shape == (2, 10)
