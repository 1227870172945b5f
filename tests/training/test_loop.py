"""The loop of a stage against plain expectations: which epoch it keeps, at what rates it learns, and what it counts."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from dualhead.attacks.pgd import PGD
from dualhead.data import Loader, Split
from dualhead.models import read_state
from dualhead.noise import Streams
from dualhead.report.training import best_line
from dualhead.system.arithmetic import FLOAT32
from dualhead.training import Passes, Silent, Validator
from dualhead.training.checkpoint import CheckpointStore, Position
from dualhead.training.loop import StageFiles, StageRun
from dualhead.training.metrics import MetricsLog
from helpers.training import THREAT, dual_model, plain_model, stage_of

EPOCHS = 4
IMAGES, BATCH = 24, 12


class Scripted:
    """In place of a validator: finds what it is told, one epoch after another."""

    every = 1

    def __init__(self, robust, clean):
        self._found = zip(robust, clean, strict=True)

    def __call__(self, program, arithmetic, device):
        robust, clean = next(self._found)
        return {"validation_robust": robust, "validation_clean": clean}


class Weights(Silent):
    """Remembers the live weights at the end of each epoch."""

    def __init__(self, model):
        self._model, self.after = model, []

    def epoch(self, metrics):
        self.after.append({name: value.clone() for name, value in self._model.state_dict().items()})


def trained(folder, model, stage, validator=None):
    """What a stage left: its position, its lines of metrics, and the weights after each epoch."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (IMAGES, 3, 12, 12), generator=generator, dtype=torch.uint8)
    split = Split.from_arrays(images, torch.arange(IMAGES) % 3, [str(label) for label in range(10)])
    files = StageFiles(CheckpointStore(folder / "states"), folder / "best.safetensors", folder / "last.safetensors")
    weights = Weights(model)
    run = StageRun(
        stage, Passes.of(model, stage), Loader(split, BATCH, seed=5, device="cpu"), validator=validator, threat=THREAT,
        arithmetic=FLOAT32, seed=7, device=torch.device("cpu"), files=files, log=MetricsLog(folder / "metrics.jsonl"),
        progress=weights, stop=lambda: False, save_minutes=60.0,
    )  # fmt: skip
    position = run.run(Position())
    return position, [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()], weights.after


def tiny_stage(objective="natural", parts=("model",), **settings):
    return stage_of(objective, parts, epochs=EPOCHS, batch_size=BATCH, **settings)


@pytest.mark.parametrize(
    ("robust", "clean", "best"),
    [
        ([0.2, 0.5, 0.4, 0.3], [0.9, 0.6, 0.9, 0.7], 2),
        ([0.2, 0.5, 0.4, 0.5], [0.9, 0.6, 0.9, 0.7], 4),  # as robust, and more clean accuracy
        ([0.2, 0.5, 0.4, 0.5], [0.9, 0.6, 0.9, 0.6], 2),  # of equals the first
    ],
)
def test_the_most_robust_epoch_is_kept_as_the_best(tmp_path, robust, clean, best):
    position, lines, after = trained(tmp_path, plain_model(), tiny_stage(), Scripted(robust, clean))
    assert position.best["epoch"] == best == best_line(lines)["epoch"]
    for file, epoch in (("best", best), ("last", EPOCHS)):
        kept = read_state(tmp_path / f"{file}.safetensors")
        assert all(torch.equal(kept[name], value) for name, value in after[epoch - 1].items())


def found_by(validator, model):
    return validator(Passes.of(model, stage_of("sat", ("model",))), FLOAT32, torch.device("cpu"))


def test_validation_sees_the_model_in_eval_mode_and_leaves_it_as_it_was():
    model = plain_model().eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, 12, 12), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        labels = model(images / 255).argmax(1)
    labels[::3] = (labels[::3] + 1) % 10
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    split = Split.from_arrays(images, labels, [str(label) for label in range(10)])
    found = found_by(Validator(split, PGD(steps=1), 1, THREAT, seed=0, batch_size=10), model)
    assert found["validation_clean"] == pytest.approx(2 / 3)
    assert found["validation_robust"] <= found["validation_clean"]
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_is_robust_is_right_both_without_and_under_attack():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))  # class 1 is the bright images'
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[-1.0], [1.0]]))
        model[2].bias.copy_(torch.tensor([0.5, -0.5]))
    bright, labels = torch.tensor([1, 0, 0, 0, 0, 0, 1, 1, 1, 1]), torch.tensor([1, 0, 0, 1, 1, 1, 0, 0, 0, 0])
    images = (255 * bright).to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    split = Split.from_arrays(images, labels, ["dark", "bright"])

    def brighten(logits_fn, x, y, threat, *, generator):
        return torch.ones_like(x)

    found = found_by(Validator(split, brighten, 1, THREAT, seed=0), model)
    assert found == {"validation_clean": 3 / 10, "validation_robust": 1 / 10, "validation_largest_answer": 5 / 10}


@pytest.mark.parametrize("collapsed", [True, False])
def test_without_held_out_images_those_of_training_tell_of_one_class(tmp_path, caplog, monkeypatch, collapsed):
    monkeypatch.setattr("dualhead.training.loop.FEWEST_ANSWERS", 2)
    model = plain_model()
    if collapsed:
        with torch.no_grad():
            model.fc.bias[1] = 1e4
    _, lines, _ = trained(tmp_path, model, tiny_stage())
    told = [record.getMessage() for record in caplog.records if "one class" in record.getMessage()]
    assert len(told) == collapsed
    assert all("epoch 1: all training images are taken for one class" in line for line in told)
    assert len(lines) == EPOCHS


def test_a_network_that_answers_everything_with_one_class_is_told_of(tmp_path, caplog):
    answers = iter([0.4, 1.0, 1.0, 0.9])

    class Collapses(Scripted):
        def __call__(self, *seen):
            return {**super().__call__(*seen), "validation_largest_answer": next(answers)}

    _, lines, _ = trained(tmp_path, plain_model(), tiny_stage(), Collapses([0.1] * EPOCHS, [0.1] * EPOCHS))
    assert [line["validation_largest_answer"] for line in lines] == [0.4, 1.0, 1.0, 0.9]
    (told,) = [record.getMessage() for record in caplog.records if "one class" in record.getMessage()]
    assert "epoch 2" in told
    assert "optimiser.lr" in told


def test_the_share_of_the_most_frequent_answer_leaves_out_what_is_no_number():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x):
            level = x.mean((1, 2, 3))
            return self.gain * torch.stack((torch.where(level > 0.9, torch.nan, 0.6), level), 1)

    images = torch.tensor([0, 10, 200, 255, 255]).to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    split = Split.from_arrays(images, torch.tensor([0, 1, 0, 1, 0]), ["dark", "bright"])
    found = found_by(Validator(split, PGD(steps=1), 1, THREAT, seed=0), Odd())
    assert found["validation_largest_answer"] == 2 / 5


def test_the_rate_follows_the_schedule_step_by_step(tmp_path):
    stage = tiny_stage(lr=0.2, schedule={"name": "cyclic", "peak": 0.5})
    _, lines, _ = trained(tmp_path, plain_model(), stage)
    # A triangle over 8 steps with its top at the fifth; the lines tell the rate of an epoch's second step.
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.05, 0.15, 0.15, 0.05])
    assert [line["step"] for line in lines] == [2, 4, 6, 8]


def test_swa_is_the_mean_of_the_weights_after_the_epochs_that_count(tmp_path):
    stage = tiny_stage(average={"name": "swa", "start": 2, "batch_norm": "average"})
    _, _, after = trained(tmp_path, plain_model(), stage)
    kept = read_state(tmp_path / "last.safetensors")
    for name, value in after[3].items():
        if value.is_floating_point():
            torch.testing.assert_close(kept[name], (after[2][name] + value) / 2)


def test_each_image_is_attacked_from_a_start_of_its_own_in_each_epoch(tmp_path, monkeypatch):
    seen, plain = [], PGD.start_point
    monkeypatch.setattr(
        PGD, "start_point", lambda self, x, t, s: (seen.append(s.keys.clone()), plain(self, x, t, s))[1]
    )
    stage = tiny_stage("sat")
    trained(tmp_path, plain_model(), stage)
    loader_order = torch.cat(seen).reshape(EPOCHS, IMAGES)
    for epoch, keys in enumerate(loader_order):
        expected = Streams.of(7, torch.arange(IMAGES)).fork(stage.name, "attack", epoch).keys
        assert torch.equal(keys.sort().values, expected.sort().values)
    assert len(loader_order.unique()) == EPOCHS * IMAGES


def says(head, label):
    """Make a head give every image one class."""
    linear = [module for module in head.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.copy_(20.0 * nn.functional.one_hot(torch.tensor(label), len(linear.bias)))


def test_training_accuracy_is_that_of_the_output_that_is_deployed(tmp_path):
    model = dual_model()
    says(model.head1, 9)
    says(model.head2, 1)  # a third of the images
    joint = {"name": "joint", "head1": "sat", "head2": "sat", "aggregate": None, "attack": "sum"}
    _, lines, _ = trained(tmp_path, model, tiny_stage(joint, ("trunk", "head1", "head2"), lr=1e-9))
    assert [line["train_accuracy"] for line in lines] == pytest.approx([1 / 3] * EPOCHS)
