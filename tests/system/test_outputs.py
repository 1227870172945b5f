"""Logits are found where a model returns them, and nothing is guessed."""

from __future__ import annotations

import types
from collections import OrderedDict, namedtuple

import pytest
import torch

from dualhead.errors import UserError
from dualhead.system.outputs import logits_of

Output = namedtuple("Output", ["loss", "logits"])
Z = torch.rand(2, 3)


class Described(OrderedDict):
    """As transformers return: a mapping that is no tuple, with `logits` among its keys."""


@pytest.mark.parametrize(
    "output",
    [
        Z,
        (Z, "features"),
        [Z],
        ((Z, None), None),
        {"logits": Z, "loss": None},
        {"out": Z},
        Described(loss=0, logits=Z),
        Output(0, Z),
        types.SimpleNamespace(logits=Z),
        types.SimpleNamespace(logits=(Z, None)),
    ],
)
def test_logits_are_found(output):
    assert logits_of(output) is Z


@pytest.mark.parametrize(
    "output",
    [
        None,
        (),
        3.0,
        "text",
        ("features", Z),
        {"out": Z, "aux": Z},
        {"out": 3},
        {"logits": None},
        {"out": (Z, Z)},
        types.SimpleNamespace(logits=None),
    ],
)
def test_nothing_is_guessed(output):
    with pytest.raises(UserError, match=f"the model returned {type(output).__name__} without logits"):
        logits_of(output)
