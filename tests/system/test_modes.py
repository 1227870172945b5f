"""Each module's own mode comes back, whatever sets it meanwhile and however that ends."""

from __future__ import annotations

import pytest
from torch import nn

from dualhead.system.modes import in_eval_mode, kept_modes


def mixed():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model.train()
    model[1][0].eval()  # frozen by its owner
    return model


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("training", [True, False])
def test_modes_come_back(training):
    model, other = mixed(), mixed()
    before = modes(model)
    with kept_modes(model, other):
        model.train(training)
        other.train(not training)
        assert modes(model) == [training] * 5
    assert modes(model) == modes(other) == before


def test_modes_come_back_after_an_error():
    model = mixed()
    before = modes(model)
    with pytest.raises(ValueError, match="anything"), in_eval_mode(model):
        assert not any(modes(model))
        raise ValueError("anything")
    assert modes(model) == before
