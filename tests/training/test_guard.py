"""Steps whose numbers are not finite do not happen; a stage that has only such goes back, and gives up in the end."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dualhead.errors import RunError
from dualhead.heads import attach_second_head
from dualhead.objectives import LossTerms
from dualhead.objectives.trades import TRADES
from dualhead.training.guard import StepGuard
from dualhead.training.loop import MAX_RETREATS, PATIENCE
from dualhead.training.optimisation import SGD, AdamW, TorchOptimiser
from helpers.resume import outcome, train_until
from helpers.training import PARTS, batch, dual_model, plain_model, stage_of, step_of, streams_of

# ---- one step


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(400, 10))


def everything(model, optimiser):
    moments = [
        value for state in optimiser.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    return [value.clone() for value in (*model.state_dict().values(), *moments)]


def descend(model, optimiser, guard, x):
    guard.remember()
    optimiser.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return guard.step(loss)


OPTIMISERS = {
    "sgd": lambda parameters: SGD(lr=0.1).create(parameters),
    "without a flag on the device": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, fused=True),
    "adamw": lambda parameters: AdamW(decay="matrices").create(parameters),
    "nadam": lambda parameters: TorchOptimiser("NAdam").create(parameters),
}


@pytest.mark.parametrize("optimiser", sorted(OPTIMISERS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_dropped_step_leaves_everything_as_it_was_and_the_next_is_as_if_it_had_not_been(optimiser, bad):
    good, poisoned = torch.rand(8, 3, 12, 12), torch.rand(8, 3, 12, 12)
    poisoned[0] = bad
    results = []
    for batches in ([good, good], [good, poisoned, poisoned, good]):
        model = network()
        optim = OPTIMISERS[optimiser](model.parameters())
        guard = StepGuard(model, optim)
        taken = []
        for x in batches:
            before = everything(model, optim)
            taken.append(bool(descend(model, optim, guard, x)))
            if not taken[-1]:
                assert all(torch.equal(a, b) for a, b in zip(before, everything(model, optim), strict=True))
        assert taken == [x is good for x in batches]
        assert int(guard.streak) == 0
        results.append(everything(model, optim))
    if optimiser not in ("adam", "adamw"):  # which count their steps
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "kind",
    [
        SGD(lr=0.1),
        TorchOptimiser("SGD", 0.1, {"momentum": 0.9}),
        TorchOptimiser("SGD", 0.1, {"momentum": 0.9, "dampening": 0.5}),
    ],
    ids=["sgd", "torch", "dampened"],
)
def test_the_very_first_step_may_be_dropped(kind):
    results = []
    for first in ([], [torch.full((8, 3, 12, 12), float("nan"))]):
        model = network()
        optimiser = kind.create(model.parameters())
        guard = StepGuard(model, optimiser)
        for x in (*first, torch.ones(8, 3, 12, 12), torch.zeros(8, 3, 12, 12)):
            descend(model, optimiser, guard, x)
        results.append(everything(model, optimiser))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_guard_counts_steps_dropped_in_a_row():
    model = network()
    optimiser = SGD().create(model.parameters())
    guard = StepGuard(model, optimiser)
    streaks = []
    for value in (0.1, float("nan"), float("nan"), 0.2, float("inf")):
        descend(model, optimiser, guard, torch.full((4, 3, 12, 12), value))
        streaks.append(int(guard.streak))
    assert streaks == [0, 1, 2, 0, 1]
    guard.set_streak(7)
    descend(model, optimiser, guard, torch.full((4, 3, 12, 12), float("nan")))
    assert int(guard.streak) == 8


def test_a_finite_step_is_the_optimisers_own():
    guarded, plain = network(), network()
    optimisers = [SGD(lr=0.1).create(model.parameters()) for model in (guarded, plain)]
    guard = StepGuard(guarded, optimisers[0])
    for _ in range(3):
        x = torch.rand(8, 3, 12, 12)
        descend(guarded, optimisers[0], guard, x)
        optimisers[1].zero_grad()
        plain(x).square().mean().backward()
        optimisers[1].step()
    for a, b in zip(everything(guarded, optimisers[0]), everything(plain, optimisers[1]), strict=True):
        assert torch.equal(a, b)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device: a tensor's value, or a shape that depends on values."""

    NAMES = ("aten::_local_scalar_dense", "aten::nonzero", "aten::unique", "aten::masked_select", "aten::is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.startswith(self.NAMES):
            self.seen.update([func._schema.name])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", ["trades", "sat", "mart", "natural"])
@pytest.mark.parametrize("stage", [None, 1, 2, 3])
def test_a_step_does_not_wait_for_the_device(objective, stage):
    model = plain_model() if stage is None else dual_model()
    parts = ("model",) if stage is None else PARTS[stage]
    step, data = step_of(model, stage_of(objective, parts)), batch(0, 4)
    step(data, streams_of(data))
    with Waits() as waits:
        step(data, streams_of(data))
    assert waits.seen == {}


def test_the_counter_sees_a_wait():
    with Waits() as waits:
        float(torch.ones(()) + 1)
        bool(torch.ones(()) > 0)
        torch.ones(3).nonzero()
    assert waits.seen == {"aten::_local_scalar_dense": 2, "aten::nonzero": 1}


# ---- a run


def poison(monkeypatch, is_bad):
    """Make the loss NaN where `is_bad` says so, given the number of calls before and the batch's labels."""
    loss, calls = TRADES.loss, []

    def poisoned(self, y, seen):
        terms = loss(self, y, seen)
        calls.append(None)
        if is_bad(len(calls) - 1, y):
            return LossTerms.sum_of(**{name: term * float("nan") for name, term in terms.terms.items()})
        return terms

    monkeypatch.setattr(TRADES, "loss", poisoned)
    return calls


LONGER = ("stages.*.batch_size=8", "stages.*.epochs=0", "stages.main_head.epochs=2")
"""12 steps an epoch."""


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_dropped_steps_are_counted_and_left_out_of_the_means(tmp_path, monkeypatch):
    poison(monkeypatch, lambda call, y: call in (1, 4))  # of 3 steps an epoch
    assert train_until(tmp_path / "run", lambda: False)
    lines = lines_of(tmp_path / "run")
    assert [line["dropped_steps"] for line in lines] == [1, 1, 0, 0, 0, 0]
    for line in lines:
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float)), line
        assert line["loss"] == pytest.approx(line["clean"] + line["divergence"], rel=1e-5)


def test_a_run_with_dropped_steps_resumes_exactly(tmp_path, monkeypatch):
    poison(monkeypatch, lambda call, y: int(y[0]) % 3 == 0)
    results = []
    for name, stop in (("at_once", lambda: False), ("in_pieces", lambda: True)):
        while not train_until(tmp_path / name, stop, *LONGER[1:]):
            pass
        results.append(outcome(tmp_path / name))
    assert results[0] == results[1]
    assert 0 < sum(line["dropped_steps"] for line in lines_of(tmp_path / "at_once")) < 6


def test_the_rate_is_halved_with_each_return(tmp_path, monkeypatch, caplog):
    usual = tmp_path / "usual"
    train_until(usual, lambda: False, *LONGER)
    poison(monkeypatch, lambda call, y: 12 <= call < 12 + 2 * PATIENCE)  # the second epoch begins with a streak
    with caplog.at_level(logging.WARNING):
        assert train_until(tmp_path / "run", lambda: False, *LONGER)
    returns = caplog.text.count("of the learning rate")
    assert returns == 2
    first, second = lines_of(usual)[:2], lines_of(tmp_path / "run")[:2]
    assert second[0]["learning_rate"] == first[0]["learning_rate"]
    assert second[1]["learning_rate"] == pytest.approx(first[1]["learning_rate"] * 0.5**returns)


def test_a_stage_that_stays_without_finite_numbers_gives_up_and_says_what_it_saw(tmp_path, monkeypatch):
    calls = poison(monkeypatch, lambda call, y: call >= 14)
    message = (
        r"stage main_head: loss or gradient was not finite in .* epoch 2.*, also at 0\.125 of "
        r"the learning rate; in another --run-dir lower optimiser\.lr \(now 0\.1\) or set runtime\.precision=float32"
    )
    with pytest.raises(RunError, match=message):
        train_until(tmp_path / "run", lambda: False, *LONGER)
    assert len(lines_of(tmp_path / "run")) == 1  # the first epoch is kept
    assert len(calls) < 14 + (MAX_RETREATS + 1) * 2 * PATIENCE
    assert (tmp_path / "run/checkpoints/main_head/best.safetensors").is_file()


def test_an_epoch_without_any_good_step_counts_as_a_streak(tmp_path, monkeypatch):
    poison(monkeypatch, lambda call, y: True)
    with pytest.raises(RunError, match=r"in all 3 steps of epoch 1, also at 0\.125"):
        train_until(tmp_path / "run", lambda: False)


def test_what_was_seen_is_told(tmp_path, monkeypatch):
    poison(monkeypatch, lambda call, y: True)
    message = r"in 10 steps in a row, up to epoch 1 \(loss nan, clean nan, divergence nan\), also at 0\.125"
    with pytest.raises(RunError, match=message):
        train_until(tmp_path / "run", lambda: False, *LONGER)


@pytest.mark.slow  # with `make bits`
def test_stopped_within_a_streak_or_after_a_return_a_run_still_resumes_exactly(tmp_path, monkeypatch):
    results = []
    for stop_at in (None, 15, 26):
        folder = tmp_path / str(stop_at)
        calls = poison(monkeypatch, lambda call, y: 12 <= call < 12 + PATIENCE)
        done = train_until(folder, lambda calls=calls, stop_at=stop_at: len(calls) == stop_at, *LONGER)
        assert done == (stop_at is None)
        train_until(folder, lambda: False, *LONGER)
        monkeypatch.undo()
        results.append(outcome(folder))
    assert results[0] == results[1] == results[2]


def test_weights_that_blow_up_are_not_saved_over_good_ones(tmp_path):
    # A rate at which training explodes by itself, without anything injected.
    with pytest.raises(RunError, match=r"not finite"):
        train_until(tmp_path / "run", lambda: False, *LONGER, "stages.*.optimiser.lr=1e20")
    for path in (tmp_path / "run").rglob("*.pt"):
        state = torch.load(path, weights_only=True)
        assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_statistics_that_tied_heads_share_are_told_to_other_processes_once():
    model = network()
    dual = attach_second_head(
        model, "input", example=torch.rand(2, 3, 12, 12), init="tied", own=["affine"], aggregator="mean"
    ).train()
    guard = StepGuard(dual, SGD().create(dual.parameters()))
    guard.remember()
    assert [id(tensor) for tensor in guard.moved] == [id(dual.head1[1].running_mean), id(dual.head1[1].running_var)]
