"""The traps of public DH-AT code: ours must not fall into them, and each check must see its trap put back."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

import dualhead.training.step as step_module
from dualhead.errors import UserError
from dualhead.heads import DualHeadClassifier
from dualhead.models import load_state, read_state
from dualhead.recipe.yaml import load_recipe
from dualhead.runs.prepare import prepare
from dualhead.runs.stages import train_stages
from dualhead.training import Passes, Silent
from helpers.training import PARTS, attacked, batch, dual_model, stage_of, step_of, streams_of


def findings(model: DualHeadClassifier, stage: int) -> set[str]:
    """What goes wrong in two steps of a stage, with somebody calling `.train()` on everything now and then."""
    parts = set(PARTS[stage])
    frozen = [part for part in model.parts if part not in parts]
    before = {part: copy.deepcopy(model.get_submodule(part).state_dict()) for part in model.parts}
    step = step_of(model, stage_of({"name": "trades", "beta": 3}, PARTS[stage], start="gaussian"))
    seen: list[torch.Tensor] = []
    model.head2.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    for number in range(2):
        data = batch(number, 8)
        model.train()
        nn.Module.train(model.trunk)
        seen.clear()
        step(data, streams_of(data))
    found = set()
    for part in frozen:
        module = model.get_submodule(part)
        if any(not torch.equal(value, before[part][name]) for name, value in module.state_dict().items()):
            found.add("frozen state moved")
        if any(parameter.grad is not None for parameter in module.parameters()):
            found.add("gradient on a frozen parameter")
    for part in parts:
        # Attacks leave batch norm alone, and the loss sees each image once: two forwards in each of two steps.
        for name, value in model.get_submodule(part).state_dict().items():
            if name.endswith("num_batches_tracked") and int(value - before[part][name]) != 4:
                found.add("mode not restored after the attack")
    if stage == 2:
        model.eval()
        with torch.no_grad():
            deployed = model.trunk(data.x)
        if not any(torch.equal(features, deployed) for features in seen):
            found.add("head 2 learns on another trunk than the deployed one")
    return found


@pytest.mark.parametrize("stage", sorted(PARTS))
def test_no_trap(stage):
    assert findings(dual_model(), stage) == set()


def naive_freezing(monkeypatch):
    """`module.requires_grad = False`, which makes an attribute and freezes nothing."""

    def set_trainable(self, parts):
        for name in self.parts:
            self.get_submodule(name).requires_grad = name in parts

    monkeypatch.setattr(DualHeadClassifier, "set_trainable", set_trainable)


def graph_through_frozen_parts(monkeypatch):
    naive_freezing(monkeypatch)
    monkeypatch.setattr(Passes, "constant", lambda self, x: self.prefix(x))


def train_reaches_frozen_parts(monkeypatch):
    monkeypatch.setattr(DualHeadClassifier, "train", nn.Module.train)
    monkeypatch.setattr("dualhead.heads.classifier._KeepFrozen.__call__", lambda self, module, args: None)


def eval_mode_stays(monkeypatch):
    @contextmanager
    def forgetful(model):
        model.eval()
        yield

    monkeypatch.setattr(step_module, "in_eval_mode", forgetful)


def no_eval_mode(monkeypatch):
    @contextmanager
    def nothing(model):
        yield

    monkeypatch.setattr(step_module, "in_eval_mode", nothing)


def strange_trunk(monkeypatch):
    cut = Passes.__init__

    def cut_with_another_trunk(self, *args, **beside):
        cut(self, *args, **beside)
        self.prefix = dual_model(seed=1).trunk.eval()

    monkeypatch.setattr(Passes, "__init__", cut_with_another_trunk)


@pytest.mark.parametrize(
    ("trap", "stage", "expected"),
    [
        (graph_through_frozen_parts, 2, "gradient on a frozen parameter"),
        (naive_freezing, 2, "frozen state moved"),
        (train_reaches_frozen_parts, 2, "frozen state moved"),
        (train_reaches_frozen_parts, 3, "frozen state moved"),
        (eval_mode_stays, 1, "mode not restored after the attack"),
        (no_eval_mode, 1, "mode not restored after the attack"),
        (strange_trunk, 2, "head 2 learns on another trunk than the deployed one"),
    ],
)
def test_a_trap_put_back_is_seen(monkeypatch, trap, stage, expected):
    trap(monkeypatch)
    assert expected in findings(dual_model(), stage)


def test_each_module_keeps_its_own_mode_through_an_attack_even_one_that_fails():
    model = dual_model()
    step = step_of(model, stage_of("sat", PARTS[1]))
    model.train()
    model.head1.block2.eval()  # somebody's own choice
    modes = {name: module.training for name, module in model.named_modules()}
    data = batch(0, 4)
    attacked(step, data)
    assert {name: module.training for name, module in model.named_modules()} == modes
    with pytest.raises(IndexError):
        attacked(step, replace(data, y=data.y + 100))
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_an_attack_in_train_mode_is_a_choice():
    model = dual_model()
    step = step_of(model, stage_of("sat", PARTS[1], attack_mode="train"))
    data = batch(0, 4)
    before = model.trunk.state_dict()["block1.layer.0.bn1.num_batches_tracked"].clone()
    step(data, streams_of(data))
    assert model.trunk.state_dict()["block1.layer.0.bn1.num_batches_tracked"] - before == 11


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {key: value for key, value in state.items() if not key.startswith("fc.")},
        lambda state: {**state, "sub_block9.weight": torch.zeros(1)},
        lambda state: {**state, "fc.weight": torch.zeros(3, 3)},
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded(spoil):
    model, other = dual_model(), dual_model(seed=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="do not fit"):
        model.load_base_state_dict(spoil(other.base_state_dict()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def trained_until_stage_2(tmp_path, second_head):
    """The network of the digits recipe, cut short: one epoch of stage 1, none of stage 2."""
    overrides = [
        "data.train_limit=160", "data.validation=32", "model.backbone=cnn-2", f"model.second_head={second_head}",
        "stages.*.epochs=0", "stages.main_head.epochs=1", "stages.*.attack.steps=1", "validation.attack.steps=1",
    ]  # fmt: skip
    prepared = prepare(load_recipe("digits", overrides), tmp_path / second_head)
    initial = copy.deepcopy(prepared.model.head2.state_dict())
    model = train_stages(prepared, Silent(), lambda: False)
    kept = tmp_path / second_head / "checkpoints" / "main_head" / "best.safetensors"
    stage_1 = copy.deepcopy(model)
    load_state(stage_1, read_state(kept), str(kept))
    return model, stage_1, initial


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_the_second_head_starts_as_a_clone_of_the_first_as_stage_1_left_it(tmp_path):
    model, stage_1, initial = trained_until_stage_2(tmp_path, "clone")
    assert same(model.head2.state_dict(), stage_1.head1.state_dict())
    assert not same(model.head2.state_dict(), initial)


def test_the_second_head_starts_from_fresh_weights_of_its_own(tmp_path):
    model, stage_1, initial = trained_until_stage_2(tmp_path, "reset")
    assert same(model.head2.state_dict(), initial)
    assert not torch.equal(model.head2.fc.weight, stage_1.head1.fc.weight)
    assert same(model.trunk.state_dict(), stage_1.trunk.state_dict())
