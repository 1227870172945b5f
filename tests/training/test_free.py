"""Free adversarial training: the published algorithm, its cost, and a perturbation that survives a stop."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from pydantic import ValidationError

from dualhead.system.arithmetic import FLOAT32
from dualhead.system.flops import CountFlops
from dualhead.threats.lp import ThreatModel
from dualhead.training import Passes
from dualhead.training.step import TrainingStep
from helpers.resume import outcome, train_until
from helpers.training import PARTS, THREAT, batch, dual_model, plain_model, stage_of, step_of, streams_of

FREE = {"replays": 3}


def test_it_is_the_published_algorithm():
    """Two batches of three replays each, against algorithm 1 in plain torch."""
    ours = plain_model()
    theirs = copy.deepcopy(ours).train()
    step = step_of(ours, stage_of("sat", ("model",), lr=0.01, free=FREE))
    optimiser = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    delta = torch.zeros_like(batch(0, 8).x)
    for number in range(2):
        data = batch(number, 8)
        for _ in range(3):
            step(data, streams_of(data))

            x = (data.x + delta).clamp(0, 1).requires_grad_()
            optimiser.zero_grad()
            F.cross_entropy(theirs(x), data.y).backward()
            optimiser.step()
            delta = (x.detach() + THREAT.eps * x.grad.sign() - data.x).clamp(-THREAT.eps, THREAT.eps)
            delta = (data.x + delta).clamp(0, 1) - data.x
            same = (step.carried.delta - delta).abs() < 1e-6
            assert same.float().mean() > 0.995  # a sign may turn where a gradient is rounding
            delta = step.carried.delta.clone()
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-5), name


@pytest.mark.parametrize(("objective", "passes"), [("sat", 3), ("trades", 6)])
def test_a_replay_costs_what_training_without_an_attack_does(objective, passes):
    model, data = plain_model(), batch(0, 4)
    step = step_of(model, stage_of(objective, ("model",), free=FREE))
    with CountFlops() as counted:
        step(data, streams_of(data))
    with CountFlops() as forward, torch.no_grad():
        model(data.x)
    assert passes - 1 < counted.total / forward.total <= passes


def test_pieces_of_a_batch_carry_what_the_whole_carries():
    """In a network without batch norm, whose gradients are those of the whole batch."""
    deltas = []
    for micro_batch in (None, 3):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(432, 10))
        step = step_of(model, stage_of("sat", ("model",), free=FREE, micro_batch=micro_batch))
        for number in (0, 0, 1):
            step(batch(number, 8), streams_of(batch(number, 8)))
        deltas.append(step.carried.delta)
    torch.testing.assert_close(*deltas, atol=1e-6, rtol=0)


def test_it_reaches_images_through_a_frozen_trunk_which_stays_as_it_is():
    model, data = dual_model(), batch(0, 8)
    step = step_of(model, stage_of("trades", PARTS[2], free=FREE))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(data, streams_of(data))
    step(data, streams_of(data))
    assert step.carried.delta.abs().amax() > 0.9 * THREAT.eps
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("head2.")), name


def test_l2_perturbations_keep_to_the_ball():
    model, data, threat = plain_model(), batch(0, 8), ThreatModel("L2", 0.5)
    stage = stage_of("sat", ("model",), free={"replays": 4, "step_size": 0.3})
    program = Passes.of(model, stage)
    step = TrainingStep(program, stage, threat, stage.optimiser.create(program.parameters()), FLOAT32)
    lengths = []
    for _ in range(4):
        step(data, streams_of(data))
        lengths.append(step.carried.delta.flatten(1).norm(dim=1))
    assert float(lengths[0].max()) <= 0.3 + 1e-5
    assert float(torch.stack(lengths).max()) <= 0.5 + 1e-5
    assert float(lengths[-1].min()) > 0.1


def test_a_step_that_is_dropped_leaves_the_perturbation():
    model, data = plain_model(), batch(0, 8)
    step = step_of(model, stage_of("sat", ("model",), free=FREE))
    step(data, streams_of(data))
    before = step.carried.delta.clone()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    assert not bool(step(data, streams_of(data)).taken)
    assert torch.equal(step.carried.delta, before)


RUN = ["stages.*.free={replays: 2}", "stages.*.average=ema"]


@pytest.mark.slow  # with `make bits`
def test_stopped_at_steps_it_goes_on_bit_for_bit(tmp_path):
    assert train_until(tmp_path / "whole", lambda: False, *RUN)
    asked = []

    def every_fourth():
        asked.append(None)
        return len(asked) % 4 == 0

    ends = []
    while not ends or not ends[-1]:
        ends.append(train_until(tmp_path / "stopped", every_fourth, *RUN))
    assert len(ends) > 3
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    summary = outcome(tmp_path / "whole")["summaries"]["main_head"]
    assert train_until(tmp_path / "once", lambda: False, "stages.*.free={replays: 1}", "stages.*.average=ema")
    assert summary["flops"] == 2 * outcome(tmp_path / "once")["summaries"]["main_head"]["flops"]


def test_what_does_not_go_together_is_refused():
    for settings, message in (
        ({"awp": {}}, "free takes one backward pass for all, and awp needs one of its own"),
        ({"objective": "natural"}, "free moves attacked images, and objective 'natural' has none"),
        ({"objective": {"name": "msd", "among": ["Linf:0.1", "L1:3"]}}, "objective 'msd' attacks in its own way"),
        ({"objective": {"name": "energy", "base": "sat"}}, "objective 'energy' may make others as it goes on"),
    ):
        values = {"objective": "sat", **settings}
        with pytest.raises(ValidationError, match=message):
            stage_of(values.pop("objective"), ("model",), free=FREE, **values)
