"""What a list of attacks and measurements comes to for a model with and without heads to merge."""

from __future__ import annotations

import pytest
from torch import nn

from dualhead.evaluation import Asked


class Merging(nn.Identity):
    """A model that shows the logits of its heads."""

    def head_logits(self, x):
        return x[:, None]


@pytest.mark.parametrize(
    ("asked", "merging", "alone"),
    [
        (["pgd-3", "corruptions"], ["pgd-3", "corruptions", "multihead-20", "steered-20"], ["pgd-3", "corruptions"]),
        (["multihead-2", "pgd-3"], ["multihead-2", "pgd-3"], ["pgd-3"]),
        (["multihead-2"], ["multihead-2"], []),
        (["corruptions"], ["corruptions"], ["corruptions"]),
        ([], [], []),
    ],
)
def test_only_what_merges_heads_faces_attacks_that_need_them(asked, merging, alone):
    def labels(model, adaptive):
        found = Asked.of(asked).for_model(model, adaptive)
        return [*found.attacks, *found.measurements]

    adaptive = ("multihead-20", "steered-20")
    assert sorted(labels(Merging(), adaptive)) == sorted(merging)
    assert sorted(labels(Merging(), ())) == sorted(asked)
    assert sorted(labels(nn.Identity(), adaptive)) == sorted(alone)
