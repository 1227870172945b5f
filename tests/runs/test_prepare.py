"""The network that a recipe means for its data."""

from __future__ import annotations

import pytest

from dualhead.data import load_split
from dualhead.recipe import load_recipe
from dualhead.runs.prepare import architecture_of
from helpers.plugins import nothing_from_outside

BACKBONE = """
from dataclasses import dataclass
from typing import ClassVar
from dualhead.models.cnn import CNNBackbone

@dataclass(frozen=True)
class Mine(CNNBackbone):
    '''A network of one's own.'''

    normalises: ClassVar[bool] = {normalises}
"""


@pytest.mark.parametrize("normalises", [True, False])
def test_before_a_backbone_that_normalises_itself_nothing_is_put(tmp_path, normalises):
    (tmp_path / "mine.py").write_text(BACKBONE.format(normalises=normalises))
    training = load_split("digits", "train")
    backbone = f"model.backbone={tmp_path / 'mine.py'}:Mine"
    with nothing_from_outside():
        made = architecture_of(load_recipe("digits_natural", [backbone]), training)
        told = architecture_of(load_recipe("digits_natural", [backbone, "model.normalize=data"]), training)
    assert ((made.mean, made.std) == ((0.0,), (1.0,))) == normalises
    assert (told.mean, told.std) != ((0.0,), (1.0,))
