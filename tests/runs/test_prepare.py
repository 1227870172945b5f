"""The network that a recipe means for its data, and the weights that it begins with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dualhead.data import load_split
from dualhead.errors import UserError
from dualhead.models import write_state
from dualhead.recipe import load_recipe
from dualhead.runs.network import architecture_of, refuse_other_order
from dualhead.runs.prepare import prepare
from dualhead.runs.stages import train_stages
from dualhead.saving import save_model
from dualhead.training import Silent
from helpers.plugins import nothing_from_outside
from helpers.resume import recipe

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


@pytest.mark.parametrize("kind", ["reset", "clone", "tied"])
def test_a_second_head_that_init_has_weights_for_begins_with_these(tmp_path, kind):
    heads = "{name: joint, head1: natural, head2: natural, aggregate: null}"
    common = ["model.backbone=cnn-4", "model.attach_at=stage1", f"model.second_head={kind}", "model.normalize=none",
              "stages.*.epochs=0", "stages.main_head.train=[trunk, head1, head2]",
              f"stages.main_head.objective={heads}"]  # fmt: skip
    given = prepare(recipe(*common), tmp_path / "other").model
    with torch.no_grad():
        for parameter in given.parameters():
            parameter.add_(torch.rand_like(parameter))
    write_state(given.state_dict(), tmp_path / "given.safetensors")
    prepared = prepare(recipe(*common, f"stages.main_head.init={tmp_path / 'given.safetensors'}"), tmp_path / "run")
    trained = train_stages(prepared, Silent(), lambda: False)
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in given.state_dict().items())


def test_weights_whose_classes_have_another_order_are_refused(tmp_path):
    natural = load_recipe("digits_natural")
    save_model(tmp_path / "m", nn.Linear(1, 1), architecture_of(natural, load_split("digits", "train")),
               {"class_names": ["dog", "cat"]})  # fmt: skip
    begun = load_recipe("digits_natural", [f"stages.*.init={tmp_path / 'm'}"])
    with pytest.raises(UserError, match=r"stages.0.init: 'cat' is class 0 of the images and class 1 of these weights"):
        refuse_other_order(begun, None, ("cat", "dog"))
    refuse_other_order(begun, None, ("dog", "cat"))
    refuse_other_order(begun, None, ("horse", "cat"))  # other classes are learnt anew
    afresh = load_recipe("digits_natural", [f"stages.*.init={tmp_path / 'm'}", "stages.*.replace_classifier=true"])
    refuse_other_order(afresh, None, ("cat", "dog"))
    given = nn.Identity()
    given.class_names = ["dog", "cat"]
    with pytest.raises(UserError, match=r"^model: 'cat' is class 0 of the images and class 1"):
        refuse_other_order(natural, given, ("cat", "dog"))
    refuse_other_order(natural, nn.Identity(), ("cat", "dog"))
    (tmp_path / "naming.py").write_text(
        "import torch\n"
        "class_names = ['dog', 'cat']\n"
        "def make():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))\n"
    )
    naming = load_recipe("digits_natural", [f"model.backbone={tmp_path / 'naming.py'}:make"])
    with pytest.raises(UserError, match=r"^model: 'cat' is class 0 of the images and class 1"):
        refuse_other_order(naming, None, ("cat", "dog"))
    refuse_other_order(naming, None, ("dog", "cat"))
