"""ELLE: the term by hand, the points it is taken at, and the published rule by which its weight adapts."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it

from dualhead.data import StreamImages
from dualhead.errors import UserError
from dualhead.objectives import objectives
from helpers.training import THREAT, CallCounter, batch, plain_model, stage_of, step_of, streams_of

FGSM = {"name": "fgsm"}


def build(**settings):
    return objectives.build({"name": "elle", **settings})


def shares(data):
    generator = torch.Generator().manual_seed(3)
    return {"share": StreamImages(torch.rand(data.x.shape, generator=generator))}


def test_the_loss_by_hand():
    generator = torch.Generator().manual_seed(0)
    q, a, b, c = torch.randn(4, 6, 5, generator=generator, dtype=torch.float64).unbind()
    s = torch.rand(6, generator=generator, dtype=torch.float64)
    y = torch.arange(6) % 5
    l_a, l_b, l_c = (-z.log_softmax(1)[torch.arange(6), y] for z in (a, b, c))
    error = ((l_c - (1 - s) * l_a - s * l_b) ** 2).mean()
    seen = {"q": q, "a": a, "b": b, "c": c, "share": s[:, None, None, None].expand(6, 3, 2, 2)}
    found = build(weight=7, adaptive=False).loss(y, seen)
    assert torch.allclose(found.terms["linearity"], 7 * error)
    assert torch.allclose(found.total, F.cross_entropy(q, y) + 7 * error)
    assert torch.allclose(found.figures["linear_error"], error)
    assert float(found.figures["lambda"]) == 7
    assert float(build().loss(y, seen).terms["linearity"]) == 0.0, "lambda starts at 0"


def test_points_lie_in_the_ball_and_between_one_another():
    data = batch(0, 8)
    step = step_of(plain_model(), stage_of("elle", ("model",), attack=FGSM))
    images, _, _ = step._make(data, streams_of(data), shares(data))
    s = shares(data)["share"].x[:, 0, 0, 0].reshape(-1, 1, 1, 1)
    for name in "abc":
        assert (THREAT.distance(images[name], data.x) <= THREAT.eps + 1e-6).all()
    assert not torch.allclose(images["a"], images["b"], atol=0.01)
    assert torch.equal(images["c"], (1 - s) * images["a"] + s * images["b"])


def test_lambda_follows_the_published_rule():
    errors = np.random.default_rng(0).gamma(2.0, 1.0, 60).tolist()
    objective, seen, by_hand = build(weight=4000, decay=0.9), [], 0.0
    state = objective.begin()
    for error in errors:
        if len(seen) > 2 and error > np.mean(seen) + 2 * np.std(seen):
            by_hand = 4000.0
        else:
            by_hand *= 0.9
        seen.append(error)
        state = objective.advance(state, {"linear_error": error})
        assert state["lambda"] == pytest.approx(by_hand)
    assert max(errors) > np.mean(errors) + 2 * np.std(errors), "the rule was put to use"
    assert objective.at(3, state).loss(*one_image()).figures["lambda"] == state["lambda"]


def one_image():
    seen = {name: torch.zeros(1, 3) for name in ("q", "a", "b", "c")}
    return torch.zeros(1, dtype=torch.int64), {**seen, "share": torch.zeros(1, 3, 2, 2)}


def test_a_new_lambda_reaches_the_loss_and_needs_no_new_plan(monkeypatch):
    data, stage = batch(0, 8), stage_of("elle", ("model",), attack=FGSM, lr=1e-30)
    step = step_of(plain_model(), stage)
    monkeypatch.setattr(step, "_planned", lambda objective: pytest.fail("planned anew"))
    state = stage.objective.begin()
    for value in (0.0, 5.0, 0.5):
        assert not step.begin(0, {**state, "lambda": value})
        terms = step(data, streams_of(data), shares(data)).terms
        assert float(terms["lambda"]) == value
        assert float(terms["linearity"]) == pytest.approx(value * float(terms["linear_error"]), rel=1e-5)


def test_a_step_takes_three_passes_more_than_its_base_method():
    data = batch(0, 8)
    for objective, passes in (("sat", 2), ("elle", 5)):
        model = plain_model()
        step = step_of(model, stage_of(objective, ("model",), attack=FGSM))
        with CallCounter(model=model) as calls:
            step(data, streams_of(data), shares(data))
        assert calls["model"] == passes


def test_with_weight_0_it_descends_its_base_method():
    ours, data = plain_model(), batch(0, 8)
    theirs = copy.deepcopy(ours)
    elle = {"name": "elle", "weight": 0, "adaptive": False}
    step_of(ours, stage_of(elle, ("model",), attack=FGSM))(data, streams_of(data), shares(data))
    step_of(theirs, stage_of("sat", ("model",), attack=FGSM))(data, streams_of(data))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_a_straight_loss_has_no_error():
    y, seen = one_image()
    for name in ("a", "b", "c"):
        seen[name] = torch.tensor([[2.0, 0.0, 0.0]])
    assert float(build().loss(y, {**seen, "share": torch.full((1, 3, 2, 2), 0.3)}).figures["linear_error"]) < 1e-12


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weight": -1}, "at least 0"), ({"weight": math.inf}, "is not finite"), ({"decay": 0}, "decay must lie"),
        ({"base": "natural"}, "adversarial"), ({"base": {"name": "elle"}}, "own base method"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        build(**settings)


def test_what_adapts_is_no_setting():
    assert "_weight_now" not in objectives.describe(build())
    assert build() == dataclasses.replace(build())
