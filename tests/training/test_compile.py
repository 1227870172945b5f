"""Compiled steps train what eager ones train; what cannot be compiled is told."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from dualhead.errors import RunError, UserError
from dualhead.objectives import ATTACKED, Features, Inner, Logits, LossTerms, Objective
from dualhead.objectives.base import cross_entropies
from dualhead.recipe.yaml import load_recipe
from dualhead.runs.prepare import prepare
from dualhead.system.arithmetic import Arithmetic, compiled
from helpers.e2e import TINY
from helpers.training import PARTS, batch, dual_model, plain_model, stage_of, step_of, streams_of, twins

COMPILED = Arithmetic(bf16=False, compiled=True)


@pytest.mark.slow  # a C++ compiler runs
def test_compiled_steps_train_the_same():
    stage = stage_of({"name": "trades", "beta": 6}, ("model",))
    eager, fast = twins(plain_model())
    step, fast_step = step_of(eager, stage), step_of(fast, stage, COMPILED)
    for number in range(2):
        data = batch(number, 16)
        expected, got = step(data, streams_of(data)), fast_step(data, streams_of(data))
        torch.testing.assert_close(got.terms["loss"], expected.terms["loss"], rtol=1e-3, atol=1e-4)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], value, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "parts",
    [("model",), PARTS[2], *(pytest.param(PARTS[stage], marks=pytest.mark.slow) for stage in (1, 3))],  # seconds each
)
def test_steps_of_every_stage_are_whole_graphs_of_the_same_results(monkeypatch, parts):
    # Without the code generator, whose sums have an order of their own.
    compile_whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile_whole(function, backend="aot_eager", **how))
    eager, fast = twins(plain_model() if parts == ("model",) else dual_model())
    stage, data = stage_of({"name": "trades", "beta": 6}, parts), batch(0, 8)
    step_of(eager, stage)(data, streams_of(data))
    step_of(fast, stage, COMPILED)(data, streams_of(data))
    assert all(torch.equal(value, fast.state_dict()[name]) for name, value in eager.state_dict().items())


def test_a_counted_step_is_not_compiled(monkeypatch):
    made = []
    monkeypatch.setattr("dualhead.training.step.compiled", lambda function, what: made.append(what) or refuse)
    step, data = step_of(plain_model(), stage_of("sat", ("model",)), COMPILED), batch(0, 4)
    assert made == ["the passes of the loss", "the passes of the attack"]
    step(data, streams_of(data), one_thread=True)
    with pytest.raises(AssertionError, match="compiled"):
        step(data, streams_of(data))


def refuse(*args):
    raise AssertionError("compiled")


class Prints(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x * 2


def test_what_cannot_be_compiled_whole_is_told():
    with pytest.raises(RunError, match=r"runtime\.compile: torch cannot compile the model: .*; write false"):
        compiled(Prints(), "the model")(torch.ones(2))


def test_settings_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"runtime\.lanes: compiled attacks run in one lane"):
        load_recipe("digits", ["runtime.compile=true", "runtime.lanes=2"])
    both = ["runtime.compile=true", "stages.*.checkpoint_activations=true"]
    with pytest.raises(UserError, match=r"stages\.0\.checkpoint_activations: not with runtime\.compile"):
        prepare(load_recipe("digits", [*TINY, *both]), tmp_path / "run")


@dataclass(frozen=True)
class Inside(Objective):
    """Climbs what a layer inside the model gives."""

    registered_name = "inside"

    def needs(self):
        return {"logits": Logits(on=ATTACKED), "layer": Features("model", ATTACKED, layer="block1")}

    def inner(self):
        return {ATTACKED: Inner(lambda y, seen: seen["layer"].flatten(1).norm(dim=1), uses=("layer",))}

    def loss(self, y, seen):
        return LossTerms.sum_of(adversarial=cross_entropies(seen["logits"], y).mean())


def test_an_attack_that_looks_at_layers_is_not_compiled():
    stage = stage_of("sat", ("model",)).model_copy(update={"objective": Inside()})
    assert step_of(plain_model(), stage)(batch(0, 4), streams_of(batch(0, 4))).terms["loss"].isfinite()
    with pytest.raises(UserError, match=r"looks inside parts of the model, .* runtime\.compile=false"):
        step_of(plain_model(), stage, COMPILED)
