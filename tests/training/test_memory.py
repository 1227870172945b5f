"""Ways to need less memory, which do not change results; and what is said when memory runs out."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from dualhead.errors import RunError
from dualhead.system.modes import in_eval_mode
from dualhead.training.activation_checkpointing import blocks, recomputed
from dualhead.training.loop import is_out_of_memory
from dualhead.training.step import TrainingStep
from helpers.resume import train_until
from helpers.training import (
    PARTS,
    CallCounter,
    batch,
    dual_model,
    plain_model,
    stage_of,
    step_of,
    streams_of,
    twins,
)

TRADES = {"name": "trades", "beta": 6}


def without_batch_norm(*, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        convolutions = [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(72, 10))


def trained(model, stage, steps=2, size=16):
    step = step_of(model, stage)
    outcomes = []
    for number in range(steps):
        data = batch(number, size)
        outcomes.append(step(data, streams_of(data)))
    return outcomes


@pytest.mark.parametrize("base", [TRADES, "sat", {"name": "mart", "beta": 5}, "natural"])
@pytest.mark.parametrize("micro_batch", [1, 5, 8])
def test_gradients_of_pieces_add_up_to_those_of_the_batch(base, micro_batch):
    whole, cut = twins(without_batch_norm())
    expected = trained(whole, stage_of(base, ("model",)))
    got = trained(cut, stage_of(base, ("model",), micro_batch=micro_batch))
    # A gradient of nearly zero may change its sign with the order of sums, and with it a pixel of an attacked image.
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(cut.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    for one, other in zip(expected, got, strict=True):
        assert one.terms.keys() == other.terms.keys()
        for name, term in one.terms.items():
            torch.testing.assert_close(other.terms[name], term, rtol=1e-4, atol=1e-6)
        assert int(one.correct) == int(other.correct)


@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_batch_norm_does_not_mind_pieces(stage):
    # The part that trains is replaced by one without batch norm.
    model = dual_model()
    if stage == 2:
        model.head2 = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    else:
        model.aggregator = nn.Sequential(nn.Flatten(), nn.Linear(20, 10))
    whole, cut = twins(model)
    for copied in (whole, cut):
        part = "head2" if stage == 2 else "aggregator"
        copied.get_submodule(part).register_forward_pre_hook(copied._freezers[part])
    trained(whole, stage_of(TRADES, PARTS[stage]))
    trained(cut, stage_of(TRADES, PARTS[stage], micro_batch=4))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(cut.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_pieces_are_attacked_before_any_of_them_moves_batch_norm(monkeypatch):
    whole, cut = twins(plain_model())
    seen = {}
    for name, model, micro_batch in (("whole", whole, None), ("cut", cut, 4)):
        step = step_of(model, stage_of("sat", ("model",), micro_batch=micro_batch))
        attacked, look = [], step._plan.fast_look
        seen[name] = attacked

        def watched(crossing, attacked=attacked, look=look):
            attacked.append(crossing["attacked"])
            return look(crossing)

        monkeypatch.setattr(step, "_plan", replace(step._plan, fast_look=watched))
        data = batch(0)
        step(data, streams_of(data))
    torch.testing.assert_close(torch.cat(seen["cut"]), torch.cat(seen["whole"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", [None, 1, 2, 3])
def test_forgetting_activations_changes_no_bit(stage):
    parts = ("model",) if stage is None else PARTS[stage]
    usual, forgetful = twins(plain_model() if stage is None else dual_model())
    expected = trained(usual, stage_of(TRADES, parts, start="gaussian"))
    got = trained(forgetful, stage_of(TRADES, parts, start="gaussian", checkpoint_activations=True))
    for name, value in usual.state_dict().items():
        assert torch.equal(forgetful.state_dict()[name], value), name
    for one, other in zip(expected, got, strict=True):
        assert all(torch.equal(one.terms[name], other.terms[name]) for name in one.terms)
    assert not any("forward" in module.__dict__ for module in forgetful.modules())


def test_activations_are_forgotten():
    model = plain_model("wideresnet-16-1")
    kept = {}
    x = batch(0).x
    for name, modules in (("usual", []), ("forgetful", blocks(model))):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with recomputed(modules), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x)
        kept[name] = total
    assert kept["forgetful"] < 0.5 * kept["usual"]


def test_blocks_are_the_residual_blocks():
    model = plain_model("wideresnet-16-1")
    assert {type(block).__name__ for block in blocks(model)} == {"WideBlock"}
    assert len(blocks(model)) == 6
    assert blocks(nn.Linear(2, 2)) == []


def test_a_block_runs_twice_and_batch_norm_moves_once():
    model = plain_model().train()
    reference = copy.deepcopy(model)
    x = batch(0).x
    reference(x).sum().backward()
    with CallCounter(norm=model.block2.layer[0].bn1) as calls:
        with recomputed(blocks(model)):
            loss = model(x).sum()
        loss.backward()
        assert calls["norm"] == 2
    for name, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


def test_a_failing_forward_leaves_the_modules_as_they_were():
    model = plain_model()
    with pytest.raises(ZeroDivisionError), recomputed(blocks(model)):
        raise ZeroDivisionError
    assert not any("forward" in module.__dict__ for module in model.modules())
    with in_eval_mode(model):
        model(batch(0).x)


# ---- out of memory


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert not is_out_of_memory(RunError("the loss was not finite"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), None])
def test_out_of_memory_ends_clearly_offers_a_smaller_piece_and_loses_nothing(tmp_path, monkeypatch, error):
    call, steps = TrainingStep.__call__, []

    def fails_in_the_second_epoch(self, *data, **how):
        steps.append(None)
        if len(steps) == 5:
            if error is not None:
                raise error
            torch.empty(10**15)
        return call(self, *data, **how)

    monkeypatch.setattr(TrainingStep, "__call__", fails_in_the_second_epoch)
    advice = r"stage main_head, epoch 2: out of memory with 32 images at once; set stages.main_head.micro_batch=16, or"
    with pytest.raises(RunError, match=advice):
        train_until(tmp_path / "run", lambda: False)
    monkeypatch.undo()
    assert train_until(tmp_path / "run", lambda: False)
    assert len(steps) == 5


def test_other_errors_pass_through(tmp_path, monkeypatch):
    def fails(self, *data, **how):
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(TrainingStep, "__call__", fails)
    with pytest.raises(RuntimeError, match="size mismatch"):
        train_until(tmp_path / "run", lambda: False)
