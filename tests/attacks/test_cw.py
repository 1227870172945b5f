"""Carlini and Wagner's L2 attack against a plain loop with torch's Adam, and against known distances."""

from __future__ import annotations

import pytest
import torch

from dualhead.attacks import attacks
from dualhead.attacks.pgd import PGD
from dualhead.errors import UserError
from dualhead.threats.lp import ThreatModel
from helpers.attacks import Recorder, images, linear_problem, network, run, run_staggered, streams

LINF, L2 = ThreatModel("Linf", 8 / 255), ThreatModel("L2", 0.25)


def minimisation(threat=L2, **fields):
    (search,) = attacks.build({"name": "cw", **fields}).parts(10, threat)
    return search


def plain_loop(model, x, y, steps, searches, rate, constant):
    """One image: every image asked about, and the nearest example's distance."""
    asked, nearest = [], float("inf")
    lower, upper = 0.0, None
    for _ in range(searches):
        variable = torch.atanh((2 * x - 1) * 0.999999).requires_grad_()
        optimiser, hit = torch.optim.Adam([variable], lr=rate), False
        for _ in range(steps):
            image = (torch.tanh(variable) + 1) / 2
            asked.append(image.detach().clone())
            logits = model(image)[0]
            other = max(logits[k] for k in range(len(logits)) if k != y)
            distance = ((image - x) ** 2).sum()
            if logits.argmax() != y:
                hit, nearest = True, min(nearest, distance.sqrt().item())
            optimiser.zero_grad()
            (distance + constant * (logits[y] - other).clamp_min(0)).backward()
            optimiser.step()
        if hit:
            upper = constant if upper is None else min(upper, constant)
        else:
            lower = max(lower, constant)
        constant = 10 * constant if upper is None else (lower + upper) / 2
    return asked, nearest


@pytest.mark.parametrize("row", range(2))
def test_l2_follows_a_plain_loop_with_torchs_adam(row):
    model, x = network(), images(3)[row : row + 1]
    y, ours = model(x).argmax(1), Recorder(model)
    search = minimisation(steps=15, searches=4, learning_rate=0.05, initial_constant=0.1)
    constants = []
    state, query = run(
        search, ours, x, y, L2, streams(1), watch=lambda state: constants.append(state["constant"].item())
    )
    asked, nearest = plain_loop(model, x, y.item(), 15, 4, 0.05, 0.1)
    assert query.forward_passes == query.backward_passes == 60
    for k, (a, b) in enumerate(zip(asked, ours.with_gradient, strict=True)):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-4, msg=f"query {k}")
    assert len(set(constants)) == 4
    assert state["distance"].item() == pytest.approx(nearest, rel=1e-3)
    assert state["found"].item() == (nearest <= L2.eps)


def test_the_next_constant_lies_between_the_last_miss_and_the_last_hit():
    model, x = network(), images(6)
    y, asked, constants = model(x).argmax(1), Recorder(model), []
    search = minimisation(steps=10, searches=7, initial_constant=1.0)
    run(search, asked, x, y, L2, streams(6), watch=lambda state: constants.append(state["constant"]))
    hits = torch.stack([model(image).argmax(1) != y for image in asked.with_gradient]).view(7, 10, 6).any(1)
    for row in range(6):
        lower, upper, constant = 0.0, None, 1.0
        for number, hit in enumerate(hits[:, row].tolist()):
            assert constants[10 * number][row].item() == pytest.approx(constant)
            lower, upper = (lower, constant) if hit else (constant, upper)
            constant = 10 * constant if upper is None else (lower + upper) / 2
    assert (hits[:-1] & ~hits[1:]).any(), "no miss follows a hit: too weak a test"


def test_the_first_try_starts_at_the_image_and_others_in_the_ball():
    x, search = images(4), minimisation(restarts=2)
    y, clean = torch.zeros(4, dtype=torch.int64), torch.zeros(4, 10)
    begun = [search.begin(x, y, clean, y + job, L2, streams(4))["variable"] for job in range(2)]
    first, second = ((torch.tanh(variable) + 1) / 2 for variable in begun)
    torch.testing.assert_close(first, x, rtol=0, atol=1e-5)
    assert (L2.distance(second, x) > 0.01).all()
    assert (L2.distance(second, x) <= L2.eps + 1e-3).all()


def test_under_linf_it_is_pgd_on_the_margin():
    assert minimisation(LINF, steps=30, restarts=2) == PGD(30, loss="margin", restarts=2)
    assert minimisation(LINF, steps=30).label == "cw-30"
    assert minimisation(LINF).max_steps() == 101


@pytest.mark.parametrize("classes", [2, 5])
def test_on_linear_models_finds_nearly_the_exact_distance(classes):
    model, x, y, margin = linear_problem("L2", classes, near=classes)
    state, _ = run(minimisation(), model, x, y, L2, streams(len(x)))
    assert (state["distance"] >= margin * (1 - 1e-4)).all()
    assert (state["distance"] <= margin * 1.04).all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_on_linear_models_fools_just_outside_the_margin_and_not_inside(norm):
    model, x, y, margin = linear_problem(norm, 4, near=2)
    for factor, fooled in ((0.98, False), (1.04, True)):
        for row in range(1):
            one, threat = slice(row, row + 1), ThreatModel(norm, factor * margin[row].item())
            x_adv = attacks.build({"name": "cw", "searches": 6})(model, x[one], y[one], threat, generator=streams(1))
            assert (threat.distance(x_adv, x[one]) <= threat.eps).all()
            assert (model(x_adv).argmax(1) != y[one]).item() == fooled


@pytest.mark.parametrize("threat", [LINF, L2], ids=["Linf", "L2"])
def test_a_samples_result_does_not_depend_on_when_it_starts_or_on_its_neighbours(threat):
    model, x, search = network(), images(7), minimisation(threat, steps=4, searches=3, restarts=2)
    y, job = model(x).argmax(1), torch.arange(7) % 2
    together = run_staggered(search, model, x, y, threat, streams(7), job=job, slots=3)
    for row in range(7):
        one = slice(row, row + 1)
        state, _ = run(search, model, x[one], y[one], threat, streams(7)[torch.tensor([row])], job=job[one])
        torch.testing.assert_close(together["adversarial"][one], state["adversarial"], rtol=0, atol=1e-4)
        assert together["found"][row] == state["found"]


@pytest.mark.parametrize("field", ["steps", "restarts", "searches", "learning_rate", "initial_constant", "step_size"])
def test_impossible_values_are_refused(field):
    with pytest.raises(UserError, match=field):
        attacks.build({"name": "cw", field: 0})
