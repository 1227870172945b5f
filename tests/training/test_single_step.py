"""Catastrophic overfitting: seen where one step fails and several do not, told, and looked for where it can happen."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from dualhead.data import Loader, Split
from dualhead.evaluation.diagnostics import check_single_steps
from dualhead.statistics import overfits_single_steps
from dualhead.system.arithmetic import FLOAT32
from dualhead.threats.lp import ThreatModel
from dualhead.training import MetricsLog, Passes, SingleStepWatch, StageFiles, StageRun
from dualhead.training.checkpoint import CheckpointStore, Position
from dualhead.training.progress import Silent
from dualhead.training.single_step import WATCHED
from helpers.training import THREAT, plain_model, stage_of

FGSM = {"name": "fgsm"}
GREY = 127 / 255


class Bent(nn.Module):
    """Right on grey images and at eps beyond them, wrong halfway: one step jumps over what two steps find."""

    def __init__(self, eps, depth):
        super().__init__()
        self.eps, self.depth = eps, depth

    def forward(self, x):
        far = (x.mean((1, 2, 3)) - GREY) / self.eps
        margin = 1 - self.depth * far * (1 - far)
        return torch.stack((margin, torch.zeros_like(margin)), 1)


def grey(count=WATCHED + 6):
    images = torch.full((count, 3, 4, 4), 127, dtype=torch.uint8)
    return Split.from_arrays(images, torch.zeros(count, dtype=torch.int64), ["right", "wrong"])


@pytest.mark.parametrize(("depth", "pgd"), [(8.0, 0.0), (2.0, 1.0)])
def test_one_step_and_several_are_compared_on_the_same_images(depth, pgd):
    threat = ThreatModel("Linf", 0.1)
    model = Bent(0.1, depth).train()
    found = SingleStepWatch(grey(), threat)(Passes(model, {"model"}), FLOAT32, torch.device("cpu"))
    assert found == {"watched_fgsm": 1.0, "watched_pgd": pgd}
    assert overfits_single_steps(found["watched_fgsm"], found["watched_pgd"]) == (pgd == 0.0)
    assert model.training


def test_a_look_leaves_the_network_and_random_numbers_as_they_were():
    model = plain_model().train()
    images = torch.randint(0, 256, (8, 3, 12, 12), dtype=torch.uint8)
    split = Split.from_arrays(images, torch.arange(8), [str(label) for label in range(10)])
    before, generator = {n: v.clone() for n, v in model.state_dict().items()}, torch.get_rng_state()
    SingleStepWatch(split, THREAT)(Passes(model, {"model"}), FLOAT32, torch.device("cpu"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("fgsm", "pgd", "found"),
    [(0.8, 0.0, True), (0.6, 0.29, True), (0.6, 0.4, False), (0.2, 0.0, False), (0.3, 0.3, False), (0.5, 0.27, False)],
)
def test_half_and_a_quarter_of_the_images_must_lie_between(fgsm, pgd, found):
    assert overfits_single_steps(fgsm, pgd) is found


@pytest.mark.parametrize(
    ("objective", "settings", "single"),
    [
        ("sat", {"attack": FGSM}, True),
        ("sat", {"attack": "n_fgsm"}, True),
        ("sat", {"attack": "pgd-1"}, True),
        ("sat", {"attack": "pgd-2"}, False),
        ("trades", {"attack": FGSM}, True),
        ("grad_align", {"attack": FGSM}, True),
        ("elle", {"attack": "pgd-10"}, False),
        ("sat", {"free": {"replays": 4}}, True),
        ("natural", {"attack": FGSM}, False),
        ({"name": "energy", "start_steps": 1}, {"attack": "pgd-10"}, False),
    ],
    ids=str,
)
def test_stages_say_whether_they_train_on_single_steps(objective, settings, single):
    assert stage_of(objective, ("model",), **settings).single_step is single


def run(folder, answers):
    """Lines of metrics of a stage whose watch says what it is told to say."""

    class Scripted(SingleStepWatch):
        def __call__(self, *seen):
            fgsm, pgd = next(answers)
            return {"watched_fgsm": fgsm, "watched_pgd": pgd}

    images = torch.randint(0, 256, (8, 3, 12, 12), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    split = Split.from_arrays(images, torch.arange(8), [str(label) for label in range(10)])
    stage = stage_of("sat", ("model",), attack=FGSM, epochs=4, batch_size=8)
    files = StageFiles(CheckpointStore(folder / "states"), folder / "best.safetensors", folder / "last.safetensors")
    StageRun(
        stage, Passes.of(plain_model(), stage), Loader(split, 8, seed=5, device="cpu"), validator=None, threat=THREAT,
        arithmetic=FLOAT32, seed=7, device=torch.device("cpu"), files=files, log=MetricsLog(folder / "metrics.jsonl"),
        progress=Silent(), stop=lambda: False, save_minutes=60.0, watch=Scripted(split, THREAT),
    ).run(Position())  # fmt: skip
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_is_told_once_until_it_recovers(tmp_path, caplog):
    lines = run(tmp_path, iter([(0.4, 0.35), (0.7, 0.1), (0.8, 0.0), (0.4, 0.3)]))
    assert [line["watched_pgd"] for line in lines] == [0.35, 0.1, 0.0, 0.3]
    (told,) = [record.getMessage() for record in caplog.records if "catastrophic" in record.getMessage()]
    assert "epoch 2: catastrophic overfitting: of a few images 70 % stay right under one step of FGSM and 10 %" in told
    (finding,) = check_single_steps(lines)
    assert finding.status == "warning"
    assert "in 2 of 4 epochs, last in epoch 3 of stage stage: of a few images 80% stayed right" in finding.message


def test_runs_that_do_not_train_on_single_steps_have_no_such_check():
    assert check_single_steps([{"stage": "base", "epoch": 1}]) == []
    (fine,) = check_single_steps([{"stage": "base", "epoch": 1, "watched_fgsm": 0.4, "watched_pgd": 0.38}])
    assert replace(fine, message="") == replace(fine, status="ok", message="")
