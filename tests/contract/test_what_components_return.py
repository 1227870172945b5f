"""What components from outside give is checked where it enters: what breaks a contract is told, not trained with."""

from __future__ import annotations

import pytest
import torch

import dualhead
from dualhead.errors import UserError
from dualhead.threats import refuse_changed_origins, threats
from helpers.e2e import TINY
from helpers.e2e import dualhead as command
from helpers.plugins import nothing_from_outside

OWN = """
from dataclasses import dataclass

from torch.nn.functional import cross_entropy

from dualhead.data import Augmentation, Poison
from dualhead.evaluation import Measurement
from dualhead.objectives import Inner, Logits, LossTerms, Objective
from dualhead.threats import Bounded


@dataclass(frozen=True)
class Fractions(Augmentation):
    def __call__(self, images, streams):
        return images.float() / 255


@dataclass(frozen=True)
class Unrecorded(Poison):
    seed: int = 0

    def apply(self, clean, craft=None):
        return clean


@dataclass(frozen=True)
class Darker(Bounded):
    def shape(self, image_shape):
        return (1,)

    def apply(self, x, parameters):
        return 0.9 * x + parameters[:, :, None, None]


@dataclass(frozen=True)
class Dusk(Measurement):
    levels = 1

    def kinds(self):
        return ["dusk"]

    def check(self, image_shape):
        pass

    def render(self, image, kind, level, key):
        return image / 510

    def facts(self, image_shape):
        return {"name": "dusk"}


@dataclass(frozen=True)
class Plain(Objective):
    images: str = "attacked"
    reduction: str = "none"
    uses: str = "seen"

    def needs(self):
        return {"seen": Logits(on=self.images)}

    def inner(self):
        return {"attacked": Inner(lambda y, z: cross_entropy(z["seen"], y, reduction=self.reduction), [self.uses])}

    def loss(self, y, z):
        return LossTerms.sum_of(loss=cross_entropy(z["seen"], y))


@dataclass(frozen=True)
class Bare(Plain):
    def loss(self, y, z):
        return cross_entropy(z["seen"], y)
"""


@pytest.fixture(autouse=True)
def _own(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    with nothing_from_outside():
        yield


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("data.augment=[own.py:Fractions]", "must return uint8 images [64, 1, 'H', 'W']; got torch.float32"),
        ("data.poison=own.py:Unrecorded", "apply must return a Poisoned, as Poisoned.of makes it; got Split"),
        ("threat={name: own.py:Darker, eps: 0.1}", "changes images where it should change nothing"),
        (
            "stages.0.objective={name: own.py:Plain, images: atacked}",
            "'atacked', which nothing makes; there are clean, att",
        ),
        ("stages.0.objective={name: own.py:Plain, uses: sean}", "uses 'sean', which is none of the needs: seen"),
        ("stages.0.objective={name: own.py:Plain, reduction: mean}", "must give one value an image, [64]; got []"),
        ("stages.0.objective=own.py:Bare", "loss must return LossTerms, as LossTerms.sum_of gives; got Tensor"),
    ],
)
def test_what_breaks_a_contract_in_training_is_told_in_a_line(change, says):
    fixed = ("runtime.precision=float32", "runtime.layout=contiguous", "runtime.lanes=1")
    ended = command("train", "digits_sat", *TINY, *fixed, "stages.0.batch_size=64", change, "--quiet")
    assert ended.status == 2, ended.err
    assert says in ended.err.splitlines()[-1]


def test_what_breaks_a_contract_in_an_evaluation_is_told_in_a_line():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    images, labels = torch.rand(4, 1, 4, 4), torch.arange(4) % 3
    with pytest.raises(UserError, match=r"render must return uint8 \[1, 4, 4\]; got float64"):
        dualhead.evaluate(model, images, labels, eps=0.1, attacks=["own.py:Dusk"])
    with pytest.raises(UserError, match="changes images where it should change nothing"):
        dualhead.evaluate(model, images, labels, threat={"name": "own.py:Darker", "eps": 0.1}, attacks=["fgsm"])


@pytest.mark.parametrize("name", threats.names())
def test_no_threat_that_ships_is_refused(name):
    refuse_changed_origins(threats.build({"name": name, "eps": threats.get(name).typical_eps}), (3, 16, 16))
