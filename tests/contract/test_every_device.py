"""All of the package on a device that is not the CPU, where tensors do not mix and waiting is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from dualhead.attacks import attacks
from dualhead.recipe import load_recipe, shipped_recipes
from helpers.frozen_recipes import VIT

EXACT = ("runtime={precision: float32, layout: contiguous, lanes: 1}",)
"""Arithmetic that is not chosen by a clock, so that devices can be compared."""
TINY = (
    "data.source=digits", "data.train_limit=50", "data.validation=20", "validation.attack.steps=2",
    "evaluate={attacks: [pgd-3], limit: 8, gallery: 0}", *EXACT,
)  # fmt: skip
SHORT = ("stages.*.epochs=1", "stages.*.batch_size=8")
"""Three steps of each stage that trains."""
NETWORKS = {
    "wrn34": ["model.backbone={name: wideresnet, depth: 10, width: 1}"],
    "imagenet_resnet50": [
        "model.backbone.depth=18", "model.normalize=data", "data.image_size=[16, 16]", "data.train_size=[20, 20]",
        "data.augment.random_resized_crop.size=[16, 16]",
    ],
    "resnet18_guided": ["model.backbone=wideresnet-10-1"],
    "vit": VIT,
    "resnet18_dual_bn": ["model.backbone={name: wideresnet, depth: 10, width: 1}"],
    "resnet18_advprop": ["model.backbone={name: wideresnet, depth: 10, width: 1}"],
}  # fmt: skip
"""What else makes recipes small whose names hold these words."""
WAITS = {"training/loop.py:_check_streak: a number"}
"""What `docs/speed.md` names: every ten steps the loop looks whether steps were dropped."""
_DRAWN = {"training/curriculum.py:<dictcomp>: a number", "training/curriculum.py:add: a number"}
DRAWS = dict.fromkeys(("cifar10_cpu_union", "digits_continual", "cifar10_cpu_ar_at", "cifar10_resnet18_ar_at"), _DRAWN)
"""Likewise: a threat is drawn for each step, from what the steps before met; AR-AT's balance moves after each epoch."""
QUICK = ("apgd-t", "cw", "fab-t", "fgsm", "pgd", "square")
"""Attacks of all kinds."""


def do(*jobs, timeout=1500):
    """Results of jobs (name, arguments) in a process that has the pretend accelerator."""
    ended = subprocess.run(
        [sys.executable, "-m", "helpers.every_device_job"], input=json.dumps([list(map(str, job)) for job in jobs]),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-4000:]
    return json.loads(ended.stdout)


def waiting_steps(told, every=10):
    """The places at which steps waited for the device; steps after the first."""
    for place, numbers in told["later"].items():
        assert place not in WAITS or all(number % every == 1 for number in numbers), f"{place}: steps {numbers}"
    return set(told["later"])


def test_the_device_is_as_strict_as_others_and_counts():
    (found,) = do(("strict",))
    assert found["refused"] == found["mixed"]
    assert found["waited"] == {
        "item": ["a number"], "bool": ["a number"], "tolist": ["to the CPU"], "cpu": ["to the CPU"],
        "sent": ["to the device"], "made": ["to the device"], "mask": ["boolean indexing"], "nonzero": ["nonzero"],
        "list": ["to the device"], "equal": ["a number"],
        "index of the device": [], "scalar": [], "masked fill": [], "written by mask": [],
        "sent without waiting": [], "gradient": [],
    }  # fmt: skip


@pytest.mark.slow  # run by `make bits`
def test_a_run_from_training_to_export(tmp_path):
    tiny = (
        *TINY, *SHORT, "model.backbone={name: cnn, width: 4, stages: 2, convolutions: 1}", "stages.*.attack.steps=2",
        "stages.main_head.batch_size=2",
    )  # fmt: skip
    run, cpu = tmp_path / "run", tmp_path / "cpu"
    stopped, gone_on, _, unequal, *attacked, evaluated, shown, _ = do(
        ("stop", run, 17, "digits", *tiny),
        ("train", run, "digits", *tiny),
        ("train_on_the_cpu", cpu, "digits", *tiny),
        ("compare", run, cpu),
        *(("attack", run, tmp_path / name, name) for name in QUICK),
        ("command", "evaluate", run, "--device", "pretend", "--attack", "pgd-3", "--limit", 8, "--json"),
        ("command", "gallery", run, "--device", "auto", "--limit", 3, "--json"),
        ("command", "export", run, "--to", tmp_path / "exported", "--json"),
    )
    assert stopped["steps"] == {"main_head": 15, "second_head": 2}
    assert gone_on["steps"] == {"second_head": 1, "aggregator": 3}
    assert gone_on["devices"] == ["pretend:0"]
    assert waiting_steps(stopped) == WAITS
    assert not waiting_steps(gone_on)
    assert not unequal
    for name, found in zip(QUICK, attacked, strict=True):
        assert found["pretend"] == found["cpu"], name
        assert found["where"] == ["cpu", "pretend:0"], name
    assert evaluated["environment"]["device"] == "pretend:0"
    assert shown["images"] == 3
    assert (tmp_path / "exported" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_attack(tmp_path):
    # Suites, which cannot be shortened, are made of searches that are here by themselves.
    others = [name for name in attacks.names() if name not in QUICK and not name.startswith("autoattack")]
    _, *found = do(
        ("train_on_the_cpu", tmp_path / "run", "digits", *TINY, *SHORT, "stages.*.attack.steps=1"),
        *(("attack", tmp_path / "run", tmp_path / name, name) for name in others),
        ("command", "export", tmp_path / "run", "--to", tmp_path / "exported", "--onnx", "--json"),
    )
    for name, here in zip(others, found[:-1], strict=True):
        assert here["pretend"] == here["cpu"], name
    assert found[-1]["onnx"]["images"]


def small(recipe):
    """Overrides by which a shipped recipe takes three steps of each stage on small images."""
    yield from TINY
    for word, network in NETWORKS.items():
        yield from network if word in recipe else ()
    for stage in load_recipe(recipe).stages:
        if stage.trains:
            yield from (override.replace("*", stage.name) for override in SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", shipped_recipes())
def test_every_recipe_trains_without_waiting(recipe, tmp_path):
    told, _, unequal = do(
        ("train", tmp_path / "run", recipe, *small(recipe)),
        ("train_on_the_cpu", tmp_path / "cpu", recipe, *small(recipe)),
        ("compare", tmp_path / "run", tmp_path / "cpu"),
    )
    assert waiting_steps(told) <= DRAWS.get(recipe, set())
    if "vit" not in recipe:  # torch fuses attention on the CPU alone, which rounds otherwise, in the seventh digit
        assert not unequal
