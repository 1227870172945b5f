"""The deployed forward as ONNX: the same logits at any batch size, or one line that says why there is no file."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from dualhead.errors import UserError
from dualhead.saving import onnx as onnx_export
from dualhead.saving.architecture import Architecture
from dualhead.saving.export import export_onnx
from dualhead.saving.models import load, save_model
from dualhead.saving.onnx import TOLERANCE, write_onnx
from helpers.e2e import dualhead


@pytest.fixture(scope="module")
def session_of():
    runtime = pytest.importorskip("onnxruntime")
    return lambda path: runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_a_run_is_exported_as_onnx_and_gives_its_logits(finished_run, tmp_path, session_of):
    ended = dualhead("export", finished_run, "--to", tmp_path / "m", "--onnx")
    assert ended.status == 0, ended.err
    assert "differ by at most" in ended.out
    assert {path.name for path in (tmp_path / "m").iterdir()} == {
        "model.safetensors", "config.json", "README.md", "model.onnx",
    }  # fmt: skip
    assert "`model.onnx` is the same forward" in (tmp_path / "m" / "README.md").read_text()
    model, session = load(finished_run), session_of(tmp_path / "m" / "model.onnx")
    for count in (1, 3, 64):
        images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))
        (found,) = session.run(["logits"], {"images": images.numpy()})
        expected = model(images).detach().numpy()
        assert np.abs(found - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "at", "aggregator", "classes"),
    [
        ("wideresnet-10-1", "block1", "pairwise_shared", 200),
        ("hf:vit", "model.vit.layers.3", "pairwise_cnn", 10),
        ("resnet-18", None, None, 10),
    ],
)
def test_other_networks_and_aggregators(backbone, at, aggregator, classes, tmp_path, session_of):
    if backbone.startswith("hf:"):
        pytest.importorskip("transformers")
    architecture = Architecture(
        backbone={"name": "hf", "config": backbone[3:]} if backbone.startswith("hf:") else shape_of(backbone),
        attach_at=at, aggregator=aggregator and {"name": aggregator}, num_classes=classes, image_shape=(3, 32, 32),
        mean=(0.4,) * 3, std=(0.2,) * 3,
    )  # fmt: skip
    torch.manual_seed(0)
    save_model(tmp_path, architecture.create(), architecture, {"output": "aggregate" if at else "model"})
    check = export_onnx(tmp_path)
    assert check.difference <= 1e-5 * max(1.0, check.scale)
    images = torch.rand(7, 3, 32, 32)
    (found,) = session_of(check.path).run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), load(tmp_path)(images).detach(), rtol=1e-4, atol=1e-4)


def shape_of(backbone):
    from dualhead.models import backbones

    return backbones.describe(backbones.build(backbone))


@pytest.mark.parametrize("package", onnx_export.NEEDED)
def test_without_the_extra_one_line_says_what_to_install_and_nothing_is_written(
    finished_run, tmp_path, monkeypatch, package
):
    monkeypatch.setitem(sys.modules, package, None)
    ended = dualhead("export", finished_run, "--to", tmp_path / "m", "--onnx")
    assert ended.status == 2
    assert ended.error_line.startswith(f"ONNX needs {package}")
    assert "pip install 'dualhead[onnx]'" in ended.error_line
    assert not (tmp_path / "m").exists()


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x.flatten(1)


def test_a_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    """The check is real: it refuses the ONNX of another model."""
    pytest.importorskip("onnxruntime")
    convert = onnx_export._converted
    monkeypatch.setattr(onnx_export, "_converted", lambda model, example: convert(Doubled(), example))
    with pytest.raises(UserError, match=r"other logits.*nothing is written"):
        write_onnx(nn.Flatten().eval(), (1, 2, 2), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


class Branches(nn.Module):
    def forward(self, x):
        return x.flatten(1) if x.mean() > 0.5 else -x.flatten(1)


def test_a_model_that_cannot_be_written_says_so_in_one_line(tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(UserError, match="cannot be written as ONNX") as caught:
        write_onnx(Branches().eval(), (1, 2, 2), tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
