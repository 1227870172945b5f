"""The script for a GPU does each part once, goes on where it was stopped, and at a tiny size runs on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image

from dualhead.recipe import load_recipe
from helpers import studies
from helpers.studies import ROOT

RECORDER = """#!/usr/bin/env bash
[[ $1 != -c || $2 == *pyautoattack* ]] || exit 0
[[ $1 != -c ]] || exit ${NO_REFERENCE:-0}
printf '%s\\n' "$@" END >> "$ASKED"
trap 'exit 130' INT
[[ -z ${FAILS_ON:-} || $* != *"$FAILS_ON"* ]] || exit 1
"""
"""In place of python: writes down what it was asked."""
PARTS = [
    "device", "training", "train-base", "attack-base", "train-distilled", "attack-distilled", "compare", "autoattack",
]  # fmt: skip


def asked_of(folder, *more, **environment):
    words = ("DATA", str(folder / "out"), *more)
    return studies.asked_of("benchmarks/gpu.sh", folder, *words, recorder=RECORDER, **environment)


def done(folder):
    return {path.stem for path in (folder / "out").glob("*.done")}


def test_each_part_is_done_once(tmp_path):
    ended, asked = asked_of(tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [*PARTS, f"all done: {tmp_path / 'out'}"]
    assert len(asked) == len(PARTS)
    assert done(tmp_path) == set(PARTS)
    ended, asked = asked_of(tmp_path)
    assert (ended.returncode, asked) == (0, [])


def test_the_pair_costs_the_same_and_is_the_published_schedule(tmp_path):
    _, asked = asked_of(tmp_path, "runtime.seed=3")
    base, distilled = (words for words in asked if words[:3] == ["-m", "dualhead", "train"])
    for words in (base, distilled):
        assert "runtime.seed=3" in words
    recipes = [
        load_recipe(str(ROOT / words[3]), [word for word in words if "=" in word and not word.startswith("-")])
        for words in (base, distilled)
    ]
    (trades,) = recipes[0].stages
    assert (trades.epochs, trades.objective.beta, trades.attack.steps) == (15, 6, 10)
    assert trades.schedule.registered_name == "cyclic"
    # A whole run of `gpu_distilled`, 104 + 112 epochs, costs what 233 epochs of the base method do.
    guided, taught = (stage.epochs for stage in recipes[1].stages)
    assert (guided * 233 / 216 + taught * 233 / 216) / trades.epochs == pytest.approx(1.0, abs=0.02)


def test_without_time_left_it_says_to_go_on(tmp_path):
    ended, asked = asked_of(tmp_path, MINUTES="0")
    assert ended.returncode == 3
    assert "device: next time; say the same again" in ended.stdout
    assert asked == []


def test_what_fails_is_told_and_not_done(tmp_path):
    ended, _ = asked_of(tmp_path, FAILS_ON="training.py")
    assert ended.returncode == 1
    assert "training: failed with 1; see" in ended.stderr
    assert done(tmp_path) == {"device"}
    assert asked_of(tmp_path)[0].returncode == 0


def test_without_the_reference_that_part_is_left_out(tmp_path):
    ended, _ = asked_of(tmp_path, NO_REFERENCE="1")
    assert ended.returncode == 0
    assert "autoattack: left out" in ended.stdout


@pytest.mark.parametrize(("arguments", "environment"), [([], {}), (["DATA", "OUT"], {"SIZE": "huge"})])
def test_wrong_words_are_refused(arguments, environment, tmp_path):
    ended = subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), *arguments], cwd=tmp_path, check=False, capture_output=True, text=True,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )  # fmt: skip
    assert ended.returncode == 2
    assert ("SIZE=huge: use full or tiny" if environment else "benchmarks/gpu.sh DATA OUT") in ended.stderr


@pytest.mark.slow  # three trainings and the benchmark of training, in processes of their own
def test_at_a_tiny_size_all_of_it_runs_here(tmp_path):
    data, generator = tmp_path / "data", np.random.default_rng(0)
    data.mkdir()
    for part, count in (("train", 60), ("test", 8)):
        pixels = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        rows = {"img": [PIL.Image.fromarray(image) for image in pixels], "label": (np.arange(count) % 10).tolist()}
        features = Features({"img": Image(), "label": ClassLabel(num_classes=10)})
        Dataset.from_dict(rows, features=features).to_parquet(data / f"{part}-00000-of-00001.parquet")
    out = tmp_path / "out"
    ended = subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), str(data), str(out)], cwd=ROOT, check=False, capture_output=True,
        text=True, env={**os.environ, "PYTHON": sys.executable, "SIZE": "tiny", "DEVICE": "cpu", "IMAGES": "4",
             "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "all done" in ended.stdout
    found = json.loads((out / "device.json").read_text())
    assert all(row["agrees"] for row in found["agreement"])
    assert all(step["peak_mib"] > 0 for step in found["memory"])
    assert json.loads((out / "training.json").read_text())["rows"]
    assert json.loads((out / "comparison.json").read_text())
