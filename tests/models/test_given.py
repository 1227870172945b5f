"""Networks that a program holds: which of them any other program can make by an address."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dualhead.errors import UserError
from dualhead.models import address_of
from dualhead.system.generators import all_generator_states

SHAPE = (1, 8, 8)


class Dropping(nn.Module):
    """Its rate of dropout and its momentum are in no tensor."""

    def __init__(self, rate=0.0, momentum=0.1):
        super().__init__()
        self.low = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2, momentum=momentum)
        self.drop = nn.Dropout(rate)
        self.classify = nn.Linear(72, 10)

    def forward(self, x):
        return self.classify(self.drop(self.norm(self.low(x)).flatten(1)))


def with_fixed_convolution():
    model = Dropping()
    model.low.requires_grad_(False)
    return model


def addressed(model, factory=None, *, to_train=True):
    return address_of(model, factory, 10, SHAPE, to_train=to_train)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Dropping(rate=0.5), "another pass in training mode"),
        (Dropping(momentum=0.5), "another pass in training mode"),
        (with_fixed_convolution(), "low.weight learns there"),
    ],
)
def test_what_learns_otherwise_is_not_what_its_class_makes(model, said):
    before, states = {n: b.clone() for n, b in model.named_buffers()}, all_generator_states(torch.device("cpu"))
    assert addressed(model) is None
    assert addressed(model, to_train=False) == f"{__name__}:Dropping"  # it answers alike
    with pytest.raises(UserError, match=f"factory: Dropping makes another network .*: {said}"):
        addressed(model, Dropping)
    assert all(torch.equal(before[n], b) for n, b in model.named_buffers())
    assert model.training
    assert all_generator_states(torch.device("cpu")) == states


def test_what_learns_alike_has_the_address_of_its_class():
    for model in (Dropping(), Dropping().eval(), Dropping().requires_grad_(False)):  # the last: for evaluation alone
        assert addressed(model) == f"{__name__}:Dropping"
    assert addressed(with_fixed_convolution(), with_fixed_convolution) == f"{__name__}:with_fixed_convolution"
