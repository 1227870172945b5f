"""The recipe for ImageNet under torchrun: the documented command, on a small folder of real JPEG files."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dualhead.models import read_state

CLASSES = ("n01440764", "n01443537", "n01484850")
SMALL = (
    "data.image_size=[32, 32]", "data.train_size=[40, 40]", "data.augment.random_resized_crop.size=[32, 32]",
    "data.validation=4", "data.workers=1", "model.backbone.depth=18",
    "stages.*.batch_size=8", "stages.*.epochs=1", "stages.*.attack.steps=1", "validation.attack.steps=1",
    "evaluate.attacks=[pgd-2]", "evaluate.limit=4", "evaluate.gallery=0",
    "runtime.device=cpu", "runtime.precision=float32", "runtime.layout=contiguous", "runtime.lanes=1",
)  # fmt: skip
"""The same recipe at a size for a CPU, with an arithmetic that is not chosen by timing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ImageNet's layout: JPEG files of many sizes, train/CLASS and val/CLASS."""
    root, draw = tmp_path_factory.mktemp("data") / "imagenet", np.random.default_rng(0)
    for part, each in (("train", 7), ("val", 2)):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for number in range(each):
                height, width = draw.integers(40, 90, 2)
                pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{name}_{number}.JPEG", "JPEG")
    return root


def train(run, *words, recipe="imagenet_resnet50", small=SMALL):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "dualhead", "train", recipe, *small, *words, "--run-dir", str(run), "--quiet",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return run


@pytest.mark.slow
def test_it_trains_on_images_from_disk_as_on_images_in_memory(folder, tmp_path):
    disk, memory = (
        train(tmp_path / word, f"data.source={folder}", f"data.stream={word}") for word in ("true", "false")
    )
    for stage in ("main_head", "second_head", "aggregator"):
        ours, theirs = (read_state(run / "checkpoints" / stage / "last.safetensors") for run in (disk, memory))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    results = json.loads((disk / "evaluation" / "results.json").read_text())
    assert results["num_samples"] == 4
    assert results["environment"]["processes"] == 2
    architecture = json.loads((disk / "model" / "config.json").read_text())["architecture"]
    assert architecture["image_shape"] == [3, 32, 32]
    assert architecture["backbone"]["stem"] == "imagenet"


@pytest.mark.slow
def test_aligned_heads_train_for_free(folder, tmp_path):
    small = [word for word in SMALL if not word.startswith("stages.*.attack")]
    run = train(
        tmp_path / "run",
        f"data.source={folder}",
        "stages.*.epochs=2",
        recipe="imagenet_resnet50_aligned_free",
        small=small,
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all({"clean", "adversarial", "alignment"} <= line.keys() for line in lines)
    results = json.loads((run / "evaluation" / "results.json").read_text())
    assert results["environment"]["processes"] == 2
    assert json.loads((run / "model" / "config.json").read_text())["architecture"]["backbone"]["stem"] == "imagenet"
