"""Schedules by their values, optimisers by the steps they take."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dualhead.errors import UserError
from dualhead.training.optimisation import optimisers, schedules


@pytest.mark.parametrize(
    ("spec", "epochs", "values"),
    [
        ("step", 10, {0: 1, 9.99: 1}),
        ({"name": "step", "milestones": [75, 90]}, 100, {0: 1, 74.99: 1, 75: 0.1, 89.9: 0.1, 90: 0.01, 99.9: 0.01}),
        ({"name": "step", "milestones": [2], "gamma": 0.5}, 4, {1.99: 1, 2: 0.5}),
        ({"name": "step", "milestones": [5], "warmup": 2}, 9, {0: 0, 0.5: 0.25, 2: 1, 5: 0.1}),
        ({"name": "cyclic", "peak": 0.4}, 10, {0: 0, 2: 0.5, 4: 1, 7: 0.5, 10: 0}),
        ({"name": "cyclic", "peak": "1/4"}, 8, {1: 0.5, 2: 1, 5: 0.5}),
        ("cosine", 10, {0: 1, 2.5: 0.5 + math.sqrt(2) / 4, 5: 0.5, 10: 0}),
        ({"name": "cosine", "warmup": 2}, 10, {0: 0, 1: 0.5, 2: 1, 6: 0.5, 10: 0}),
    ],
    ids=str,
)
def test_values_at_points(spec, epochs, values):
    schedule = schedules.build(spec)
    for epoch, factor in values.items():
        assert schedule.factor(epoch, epochs) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize("name", schedules.names())
@settings(max_examples=60)
@given(epochs=st.integers(1, 300), share=st.floats(0, 1, exclude_max=True))
def test_every_schedule_stays_between_zero_and_one(name, epochs, share):
    factor = schedules.build(name).factor(share * epochs, epochs)
    assert 0 <= factor <= 1 + 1e-12


def test_stepping_agrees_with_torch():
    schedule = schedules.build({"name": "step", "milestones": [3, 5], "gamma": 0.2})
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimiser, [3, 5], gamma=0.2)
    for epoch in range(8):
        assert schedule.factor(epoch, 8) == pytest.approx(optimiser.param_groups[0]["lr"])
        optimiser.step()
        reference.step()


@pytest.mark.parametrize(
    "settings_",
    [
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
        {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 2e-4},
        {"lr": 0.5, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0},
    ],
)
def test_sgd_steps_as_the_formula_says(settings_):
    """v <- m v + (g + wd w); w <- w - lr (g + wd w + m v) with Nesterov, w - lr v without."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimiser = optimisers.build({"name": "sgd", **settings_}).create([parameter])
    w, v = [1.0, -2.0], [0.0, 0.0]
    for step in range(5):
        gradient = [0.3 * w[0] + 0.1 * step, w[1] ** 2]
        optimiser.zero_grad()
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimiser.step()
        for i in range(2):
            d = gradient[i] + settings_["weight_decay"] * w[i]
            v[i] = settings_["momentum"] * v[i] + d
            w[i] -= settings_["lr"] * (d + settings_["momentum"] * v[i] if settings_["nesterov"] else v[i])
        assert parameter.tolist() == pytest.approx(w, rel=1e-12)


@pytest.mark.parametrize(
    ("registry", "spec", "words"),
    [
        (optimisers, {"name": "sgd", "lr": 0}, "lr must be greater than 0"),
        (optimisers, {"name": "sgd", "lr": "x"}, "'x' is not a number"),
        (optimisers, {"name": "sgd", "momentum": 1}, r"momentum must lie in \[0, 1\)"),
        (optimisers, {"name": "sgd", "momentum": 0}, "nesterov needs momentum"),
        (optimisers, {"name": "sgd", "weight_decay": -1}, "weight_decay must be at least 0"),
        (schedules, {"name": "step", "milestones": [5, 5]}, "ascending epochs"),
        (schedules, {"name": "step", "milestones": [0]}, "ascending epochs"),
        (schedules, {"name": "step", "gamma": 0}, "gamma must lie"),
        (schedules, {"name": "step", "warmup": -1}, "warmup must be at least 0"),
        (schedules, {"name": "cyclic", "peak": 1}, "peak must lie"),
        (schedules, {"name": "cosine", "warmup": -1}, "warmup must be at least 0"),
    ],
)
def test_impossible_settings_are_refused(registry, spec, words):
    with pytest.raises(UserError, match=words):
        registry.build(spec)
