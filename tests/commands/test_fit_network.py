"""The network that `fit` writes into a recipe."""

from __future__ import annotations

import pytest
from torch import nn

from dualhead.commands.fit import _settle_model
from dualhead.models import Normalize, at_hand, backbones


class InATensor(nn.Module):
    """A network that a run has as it is, unless a normalisation is put before it."""

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Conv2d(1, 4, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten())
        self.classify = nn.Linear(64, 10)

    def forward(self, x):
        return self.classify(self.high(self.low(x)))


class InADict(InATensor):
    """A network that a run has within another, which reads its logits."""

    def forward(self, x):
        return {"logits": super().forward(x)}


@pytest.mark.parametrize(
    ("kind", "normalize", "named", "asked", "expected"),
    [
        (InADict, None, "stage1", None, "model.low"),  # none of that name: the one recommended
        (InADict, None, "low", None, "model.low"),
        (InADict, None, "model.low", None, "model.low"),
        (InADict, None, "stage1", "high", "model.high"),
        (InATensor, "data", "stage1", "low", "model.low"),
        (InATensor, "none", "stage1", "low", "low"),
        (InATensor, None, "input", None, "input"),
        (InATensor, None, "stage1", "nowhere", "nowhere"),  # refused where it is cut
    ],
)
def test_a_layer_is_found_by_the_name_that_it_has_in_the_run(kind, normalize, named, asked, expected):
    content = {"data": {"source": "digits"}, "model": {"attach_at": named, "normalize": normalize}}
    _, maker = _settle_model(content, kind(), None, asked)
    assert content["model"]["attach_at"] == expected
    if expected not in ("input", "nowhere"):
        of_data = Normalize([0.3], [0.4]) if normalize == "data" else Normalize.identity(1)
        with at_hand(maker):
            made = backbones.build(content["model"]["backbone"]).create(10, (1, 8, 8), of_data)
        made.get_submodule(expected)
