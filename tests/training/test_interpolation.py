"""Weights between two others: the ends to the bit, and the choice by what held-out images say."""

from __future__ import annotations

import pytest
import torch

from dualhead.errors import Interrupted, UserError
from dualhead.system.arithmetic import FLOAT32
from dualhead.training import Passes, Position, Stage, interpolate
from dualhead.training.interpolation import between
from helpers.training import plain_model

CPU = torch.device("cpu")


def state(seed):
    return {name: value.clone() for name, value in plain_model("cnn-4", seed=seed).state_dict().items()}


def test_ends_are_the_two_networks_to_the_bit_and_the_middle_lies_between():
    first, second = state(0), state(1)
    for share, end in ((0.0, first), (1.0, second)):
        assert all(torch.equal(value, end[name]) for name, value in between(first, second, share).items())
    for name, value in between(first, second, 0.25).items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * first[name] + 0.25 * second[name])
        else:
            assert torch.equal(value, second[name])


def test_the_most_robust_share_is_taken_and_of_equals_the_more_accurate():
    first, second, model = state(0), state(1), plain_model("cnn-4", seed=2)
    told = {0.0: (0.3, 0.9), 0.5: (0.4, 0.6), 0.75: (0.4, 0.7), 1.0: (0.2, 0.8)}
    asked = iter(told.values())

    def validator(passes, *_):
        robust, clean = next(asked)
        return {"validation_robust": robust, "validation_clean": clean}

    passes = Passes(model, ("model",))
    found = interpolate(passes, first, second, tuple(told), validator, FLOAT32, CPU, lambda: False, Position())
    assert (found.best["share"], found.best["tried"]) == (0.75, 4)
    expected = between(first, second, 0.75)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    with pytest.raises(Interrupted):
        interpolate(passes, first, second, (0.5,), validator, FLOAT32, CPU, lambda: True, Position())


def test_a_stage_that_interpolates_trains_nothing():
    made = Stage.model_validate({"name": "m", "train": ["model"], "interpolate": {"between": ["a", "b"]}})
    assert not made.trains
    assert made.epochs == 0
    for wrong in ({"epochs": 2}, {"objective": "sat"}, {"init": "reset"}):
        with pytest.raises((UserError, ValueError), match="trains nothing"):
            Stage.model_validate({"name": "m", "train": ["model"], "interpolate": {"between": ["a", "b"]}, **wrong})
