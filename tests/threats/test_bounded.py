"""The threat that the documentation writes down in a few lines is a whole one."""

import re
from pathlib import Path

import pytest
import torch

from dualhead.attacks import attacks
from dualhead.evaluation import evaluate
from dualhead.threats import build_threat, threats
from helpers.attacks import images, network, streams
from helpers.plugins import nothing_from_outside

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "extend.md"


@pytest.fixture
def light():
    """The page's `Light`, under a name; gone again for other tests."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    text, known = next(block for block in blocks if "Bounded" in block), {"__name__": "light"}
    with nothing_from_outside():
        exec(compile(text, str(PAGE), "exec"), known)
        threats.register("light")(known["Light"])
        yield build_threat({"name": "light", "eps": 0.2})


def test_a_threat_of_ones_own_changes_what_it_says(light):
    x = images(2)
    fitted = light.for_images(x.shape[1:])
    assert torch.equal(fitted.render(fitted.lift(x)), x)
    point = fitted.lift(x)
    point[:, x[0].numel() :] = torch.tensor([0.1, 0.0, -0.1, 0.02, 0.03, 0.04])
    expected = x * torch.tensor([1.1, 1.0, 0.9]).reshape(3, 1, 1) + torch.tensor([0.02, 0.03, 0.04]).reshape(3, 1, 1)
    torch.testing.assert_close(fitted.render(point), expected.clamp(0, 1))
    assert fitted.distance(point, fitted.lift(x)).tolist() == pytest.approx([0.1, 0.1])


def test_attacks_and_evaluation_take_it(light):
    model, x = network(4), images(16)
    y = model(x).argmax(1)
    found = attacks.build("pgd-10")(model, x, y, light, generator=streams(16))
    assert (model(found).argmax(1) != y).any()
    settings = {"attacks": ["pgd-10", "apgd-ce-5"], "precision": "float32", "diagnostics": False}
    measured = evaluate(model, x, y, threat={"name": "light", "eps": 0.2}, **settings)
    assert measured.results["threat"] == {"name": "light", "eps": 0.2}
    assert measured.robust_accuracy["worst"] < 1
