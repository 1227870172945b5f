"""What networks of others do: buffers assigned anew, masks of -inf, a wrapper's names, heads beside the logits."""

from __future__ import annotations

import copy
import dataclasses
import sys
import types

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dualhead.heads import attach_second_head
from dualhead.models import Normalize, backbones, load_state, logits_of, read_state, write_state
from dualhead.saving.onnx import _compare
from dualhead.system.arithmetic import FLOAT32
from dualhead.threats.lp import ThreatModel
from dualhead.training.activation_checkpointing import still_buffers
from dualhead.training.averaging import EMA, WeightAverage
from dualhead.training.free import CarriedPerturbation, Free
from helpers.resume import train_until
from helpers.training import CLASSES, batch, stage_of, step_of, streams_of


class OwnNorm(nn.Module):
    """Normalises by running statistics that each training pass assigns as new tensors."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
        return x - self.mean[:, None, None] + self.mask.exp().sum() - 1.0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = OwnNorm()
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.fc(self.norm(self.stem(x)).relu().mean((2, 3)))


def network():
    torch.manual_seed(0)
    return Net()


def test_statistics_assigned_anew_reach_lanes_and_averages_and_masks_of_minus_infinity_stop_nothing():
    model = network()
    average = WeightAverage(model, EMA())
    step = step_of(model, stage_of("trades", ("model",)), arithmetic=dataclasses.replace(FLOAT32, lanes=2))
    before = dict(model.named_buffers())
    for number in range(3):
        data = batch(number, 32)
        outcome = step(data, streams_of(data))
        assert bool(outcome.taken)
        average.update(outcome.taken)
    assert all(before[name] is buffer for name, buffer in model.named_buffers())
    assert model.norm.mean.abs().max() > 0.01
    for program in step._in_lanes:
        assert torch.equal(program.model.norm.mean, model.norm.mean)
    live = model.norm.mean.clone()
    with average.in_place():
        assert not torch.equal(model.norm.mean, live)
        assert model.norm.mean.abs().max() > 0.005
        assert all(value.isfinite().all() for name, value in model.state_dict().items() if name != "norm.mask")
        assert model.norm.mask.tolist() == [0.0, -torch.inf]
    assert torch.equal(model.norm.mean, live)


def test_a_pass_that_is_to_move_nothing_moves_nothing_assigned_anew():
    model = network().train()
    held = model.norm.mean
    with still_buffers(model):
        model(torch.rand(4, 3, 12, 12))
        assert model.norm.mean is not held
    assert model.norm.mean is held
    assert model.norm.mean.tolist() == [0.0] * 4


def within(name, inside):
    outer = nn.Module()
    outer.add_module(name, inside)
    return outer


@pytest.mark.parametrize("names", [["module"], ["_orig_mod"], ["_orig_mod", "module"]])
def test_a_network_whose_own_names_look_like_a_wrappers_finds_its_weights_again(tmp_path, names):
    model = network()
    for name in reversed(names):
        model = within(name, model)
    write_state(model.state_dict(), tmp_path / "w.safetensors")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load_state(other, read_state(tmp_path / "w.safetensors"), "w")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


class Auxiliary(Net):
    """Gives the logits of a second classifier beside its own while it trains."""

    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits * 0.5) if self.training else logits


def test_a_factory_whose_model_has_auxiliary_heads_in_training_trains_on_the_logits(monkeypatch):
    made = types.ModuleType("made_by_others")
    made.aux = Auxiliary
    monkeypatch.setitem(sys.modules, "made_by_others", made)
    model = backbones.build("made_by_others:aux").create(CLASSES, (3, 12, 12), Normalize.identity(3))
    for mode in (True, False):
        assert isinstance(model.train(mode)(torch.rand(2, 3, 12, 12)), torch.Tensor)
    assert torch.equal(model.eval()(torch.ones(2, 3, 12, 12)), logits_of(model.model.eval()(torch.ones(2, 3, 12, 12))))


class Tabled(nn.Module):
    """A table of positions, computed once, crosses every cut behind the stem."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, table):
            return self.fc(x + table)

    def __init__(self):
        super().__init__()
        self.stem, self.table = nn.Linear(12, 4), nn.Parameter(torch.rand(3, 4))
        self.first, self.second = Tabled.Block(), Tabled.Block()
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x):
        table = self.table.cumsum(0)
        x = self.first(self.stem(x[:, :, 0]), table)
        return self.out(self.second(x, table).mean(1))


def test_only_what_belongs_to_images_crosses_the_cut():
    dual = attach_second_head(Tabled(), "first", example=torch.rand(2, 3, 12, 12))
    assert [len(crossing) for crossing in tree_leaves(dual.features(torch.rand(5, 3, 12, 12)))] == [5]
    assert dual.head_logits(torch.rand(5, 3, 12, 12)).shape == (5, 2, CLASSES)


def test_a_buffer_that_no_state_dict_holds_does_not_spoil_the_cheap_cut(recwarn):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, CLASSES)
            self.register_buffer("shift", torch.full((1, 3, 1, 1), 0.5), persistent=False)

        def forward(self, x):
            return self.fc(self.body(self.stem(x - self.shift).relu()).mean((2, 3)))

    dual = attach_second_head(Shifted(), "stem", example=torch.rand(2, 3, 12, 12))
    assert not [warning for warning in recwarn if "paid twice" in str(warning.message)]
    assert not [name for name in dual.state_dict() if "shift" in name]


def test_a_head_given_as_a_module_leaves_the_features_to_the_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(400, CLASSES))
    own = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(400, CLASSES))
    dual = attach_second_head(model, "1", example=torch.rand(2, 3, 12, 12), init=own, aggregator="mean").train()
    dual.head_logits(torch.rand(4, 3, 12, 12)).sum().backward()
    dual.eval()
    features = dual.features(torch.rand(4, 3, 12, 12))
    first = dual.head("head1", features)
    dual.head("head2", features)
    assert torch.equal(dual.head("head1", features), first)


def test_a_fixed_layer_of_the_tail_is_kept_when_a_head_is_reset():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 8), nn.Linear(8, CLASSES))
    model[4].requires_grad_(False)
    dual = attach_second_head(model, "1", example=torch.rand(2, 3, 12, 12))
    first, second = (dict(dual.get_submodule(head).named_parameters()) for head in ("head1", "head2"))
    assert torch.equal(first["4.weight"], second["4.weight"])
    assert not torch.equal(first["3.weight"], second["3.weight"])


def test_another_number_of_processes_begins_the_carried_perturbation_anew():
    carried = CarriedPerturbation(Free(), ThreatModel("Linf", 0.1))
    carried.delta = torch.full((4, 3, 2, 2), 0.05)
    assert torch.equal(carried.attacked(torch.full((8, 3, 2, 2), 0.5)), torch.full((8, 3, 2, 2), 0.5))
    carried.delta = torch.full((4, 3, 2, 2), 0.05)
    assert carried.attacked(torch.full((4, 3, 2, 2), 0.5)).detach().mean() == pytest.approx(0.55)


def test_an_engine_that_answers_nan_does_not_pass_the_check(monkeypatch):
    class Session:
        def __init__(self, *args, **kwargs):
            pass

        def run(self, names, inputs):
            return [torch.full((len(inputs["images"]), CLASSES), torch.nan).numpy()]

    monkeypatch.setitem(sys.modules, "onnxruntime", types.SimpleNamespace(InferenceSession=Session))
    difference, _ = _compare(network().eval(), b"", torch.rand(8, 3, 12, 12))
    assert not difference <= 1.0


def test_statistics_are_estimated_anew_for_every_head_that_trains(tmp_path):
    overrides = [
        "stages.*.epochs=0", "stages.main_head.epochs=2", "stages.main_head.train=[trunk, head1, head2]",
        "stages.main_head.objective={name: joint, head1: natural, head2: natural, aggregate: null}",
        "stages.main_head.average=swa", "stages.main_head.keep=last", "model.backbone=wideresnet-10-1",
        "model.attach_at=block1",
    ]  # fmt: skip
    asked = estimated_in(tmp_path / "run", overrides)
    assert asked
    assert all({layer.split(".")[0] for layer in layers} == {"trunk", "head1", "head2"} for layers in asked)


def estimated_in(folder, overrides):
    """The layers whose statistics each estimate of a run gave anew."""
    asked = []
    reestimate = WeightAverage.reestimate

    def watched(self, passes):
        before = {n: b.clone() for n, b in self._mean.items() if n.endswith("running_var")}
        reestimate(self, passes)
        moved = [n.removesuffix(".running_var") for n, b in before.items() if not torch.equal(b, self._mean[n])]
        asked.append(set(moved))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightAverage, "reestimate", watched)
        assert train_until(folder, lambda: False, *overrides)
    return asked


@pytest.mark.parametrize("deployed", ["aggregate", "mean", "head1"])
def test_statistics_of_the_aggregator_are_estimated_anew_whatever_is_deployed(tmp_path, deployed):
    overrides = [
        "stages.*.epochs=0", "stages.main_head.epochs=1", "stages.main_head.train=[trunk, head1, head2, aggregator]",
        "stages.main_head.objective={name: joint, head1: natural, head2: natural, aggregate: natural}",
        "stages.main_head.average=swa", "stages.main_head.keep=last", f"stages.main_head.deploy={deployed}",
        "model.backbone=wideresnet-10-1", "model.attach_at=block1",
    ]  # fmt: skip
    asked = estimated_in(tmp_path / "run", overrides)
    assert asked
    assert all(layers >= {"aggregator.class_bn", "aggregator.pair_bn"} for layers in asked)
