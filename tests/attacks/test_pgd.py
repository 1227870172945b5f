"""Projected gradient descent, and FGSM as one step of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it

from dualhead.attacks import Query, attacks, losses
from dualhead.attacks.fgsm import FGSM
from dualhead.attacks.pgd import PGD
from dualhead.errors import UserError
from dualhead.threats.lp import ThreatModel
from helpers.attacks import Recorder, images, linear_problem, network, run, run_staggered, streams

LINF, L2 = ThreatModel("Linf", 8 / 255), ThreatModel("L2", 0.25)
BOTH = pytest.mark.parametrize("threat", [LINF, L2], ids=["Linf", "L2"])


def plain_loop(model, x, y, start, steps, length, threat):
    x_adv, looked_at = start, [start]
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
        if threat.norm == "Linf":
            delta = (x_adv + length * gradient.sign() - x).clamp(-threat.eps, threat.eps)
        else:
            delta = x_adv + length * F.normalize(gradient.flatten(1)).reshape(x.shape) - x
            delta = delta * (threat.eps / delta.flatten(1).norm(dim=1).clamp_min(threat.eps)).reshape(-1, 1, 1, 1)
        x_adv = (x + delta).clamp(0, 1).detach()
        looked_at.append(x_adv)
    return looked_at


@BOTH
def test_equals_a_plain_loop(threat):
    model, x = network(), images(5)
    y, draws, ours = model(x).argmax(1), streams(5), Recorder(model)
    search = PGD(steps=7, step_size=threat.eps / 3)
    expected = plain_loop(model, x, y, threat.ball_point(x, draws.fork(torch.zeros_like(y))), 7, threat.eps / 3, threat)
    state, query = run(search, ours, x, y, threat, draws)
    for a, b in zip(expected, ours.with_gradient, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-6)
    assert query.forward_passes == query.backward_passes == 5 * 8
    assert torch.equal(state["found"], torch.stack([model(a).argmax(1) != y for a in expected]).any(0))


@BOTH
def test_keeps_the_most_harmful_iterate(threat):
    model, x = network(gain=3.0), images(5)
    y, ours = model(x).argmax(1), Recorder(model)
    state, _ = run(PGD(steps=10), ours, x, y, threat, streams(5))
    looked_at = torch.stack(ours.with_gradient)
    logits = torch.stack([model(a) for a in looked_at])
    harm = torch.stack([losses.cross_entropy(z, y) + 100.0 * (z.argmax(1) != y) for z in logits])
    best = looked_at[harm.argmax(0), torch.arange(5)]
    assert torch.equal(state["adversarial"], best)


@BOTH
def test_an_example_that_fools_is_not_given_up_for_one_that_does_not_however_high_its_loss(threat):
    model, x = network(), images(5)
    y, search = model(x).argmax(1), PGD(steps=10)
    state = search.begin(x, y, model(x), torch.zeros_like(y), threat, streams(5))
    found = {**state, "adversarial": 1 - x, "found": torch.ones_like(y, dtype=torch.bool),
             "best_loss": torch.full_like(state["best_loss"], -1.0), "iterate": x}  # fmt: skip
    after = search.step(found, Query(model), threat)  # x itself is right, and its loss is above -1
    assert torch.equal(after["adversarial"], 1 - x)
    assert after["found"].all()


def test_training_gets_the_last_iterate_and_pays_for_its_steps_only():
    model, x = network(), images(5)
    y, draws, ours = model(x).argmax(1), streams(5), Recorder(model)
    attack = PGD(steps=4, step_size=2 / 255)
    x_adv = attack.maximise(lambda z: losses.cross_entropy(ours(z), y), x, LINF, draws)
    expected = plain_loop(model, x, y, LINF.ball_point(x, draws), 4, 2 / 255, LINF)
    torch.testing.assert_close(x_adv, expected[-1], rtol=0, atol=1e-6)
    assert len(ours.with_gradient) == 4
    assert not ours.without


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("name", ["pgd-20", "fgsm"])
def test_on_linear_models_fools_just_outside_the_margin_and_not_inside(name, norm, classes):
    model, x, y, margin = linear_problem(norm, classes, near=2)
    for factor, fooled in ((0.98, False), (1.02, True)):
        for row in range(len(x)):
            one, threat = slice(row, row + 1), ThreatModel(norm, factor * margin[row].item())
            x_adv = attacks.build(name)(model, x[one], y[one], threat, generator=streams(1))
            assert (threat.distance(x_adv, x[one]) <= threat.eps).all()
            assert (model(x_adv).argmax(1) != y[one]).item() == fooled


def test_starts():
    x, draws = images(50), streams(50)
    assert torch.equal(PGD(start="clean").start_point(x, LINF, draws), x)
    uniform = (PGD(start="uniform").start_point(x, LINF, draws) - x).abs().flatten(1)
    assert uniform.amax() > 0.99 * LINF.eps
    assert uniform.mean() == pytest.approx(LINF.eps / 2, rel=0.2)  # less at the faces of the box
    gaussian = (PGD(start="gaussian").start_point(x, LINF, draws) - x)[(x > 0.1) & (x < 0.9)]
    assert gaussian.std().item() == pytest.approx(0.001, rel=0.05)


@BOTH
def test_a_samples_result_does_not_depend_on_when_it_starts_or_on_its_neighbours(threat):
    model, x, search = network(), images(7), PGD(steps=9, restarts=2)
    y, job = model(x).argmax(1), torch.arange(7) % 2
    together = run_staggered(search, model, x, y, threat, streams(7), job=job, slots=3)
    for row in range(7):
        one = slice(row, row + 1)
        state, _ = run(search, model, x[one], y[one], threat, streams(7)[torch.tensor([row])], job=job[one])
        torch.testing.assert_close(together["adversarial"][one], state["adversarial"], rtol=0, atol=2e-6)
        assert together["found"][row] == state["found"]


def test_restarts_are_tried_in_turn_until_one_succeeds():
    model, x = network(), images(6)
    y, query = model(x).argmax(1), Query(model)
    alone = PGD(steps=2)(model, x, y, LINF, generator=streams(6))
    attacks.build({"name": "pgd", "steps": 2, "restarts": 4}).search(query, x, y, LINF, streams(6))
    left = int((model(alone).argmax(1) == y).sum())
    assert 0 < left < 6
    assert 6 * 3 < query.backward_passes <= 6 * 3 + left * 9


def test_losses():
    model, x = network(), images(5)
    y, clean = model(x).argmax(1), model(x)
    other = model(images(5, seed=9))
    torch.testing.assert_close(
        losses.kl_from_clean(other, clean),
        (clean.softmax(1) * (clean.log_softmax(1) - other.log_softmax(1))).sum(1),
    )
    assert torch.equal(losses.margin(other, y) > 0, other.argmax(1) != y)
    for k in range(10):
        torch.testing.assert_close(losses.targeted_margin(other, y, y * 0 + k), other[:, k] - other[torch.arange(5), y])
    top = other.sort(1).values
    torch.testing.assert_close(losses.dlr(other, y), losses.margin(other, y) / (top[:, -1] - top[:, -3]))
    torch.testing.assert_close(losses.dlr(3.0 * other + 7.0, y), losses.dlr(other, y))
    for kind in ("kl", "margin"):
        state, _ = run(PGD(steps=5, loss=kind), model, x, y, LINF, streams(5))
        assert state["best_loss"].isfinite().all()


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        ("pgd", "pgd-40"), ("pgd-20", "pgd-20"), ("fgsm", "fgsm"), ("square", "square"), ("square-1000", "square-1000"),
        ({"name": "square", "queries": 1000, "p_init": 0.5}, "square-1000(p_init=0.5)"),
        ({"name": "pgd", "steps": 10, "step_size": "2/255"}, "pgd-10(step_size=0.00784314)"),
        ({"name": "apgd-t", "targets": 3}, "apgd-t(targets=3)"), ("apgd-ce-50", "apgd-ce-50"), ("fab-t-20", "fab-t-20"),
        ({"name": "cw", "restarts": 2}, "cw(restarts=2)"),
    ],
)  # fmt: skip
def test_labels_say_what_differs_from_the_defaults(spec, label):
    attack = attacks.build(spec)
    assert attack.label == label
    assert [part.label for part in attack.parts(10, LINF)] == [label]


def test_a_label_can_be_given():
    named = PGD().labelled("mine")
    assert named.label == "mine"
    assert named == PGD()
    assert PGD().label == "pgd-40"


def test_fgsm_is_one_step_of_eps():
    (part,) = FGSM().parts(10, LINF)
    assert part == PGD(1, LINF.eps, "clean", "ce", 1)


@pytest.mark.parametrize("field", ["steps", "restarts", "step_size"])
def test_impossible_values_are_refused(field):
    with pytest.raises(UserError, match=field):
        attacks.build({"name": "pgd", field: 0})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PGD(start="random"), "start must be one of uniform, gaussian, clean, got 'random'"),
        (lambda: FGSM(start="random"), "start must be one of uniform, gaussian, clean, got 'random'"),
        (lambda: PGD(loss="dlr"), "loss must be one of ce, kl, margin, got 'dlr'"),
        (
            lambda: PGD(loss="kl", start="clean"),
            "loss: kl has no slope at the clean image; write start: uniform or gaussian",
        ),
        (lambda: PGD(2.5), "steps must be a whole number, got 2.5"),
        (lambda: PGD(restarts=1.0), "restarts must be a whole number, got 1.0"),
    ],
)
def test_what_python_code_writes_is_not_taken_for_something_else(make, message):
    with pytest.raises(UserError) as refused:
        make()
    assert str(refused.value) == message


def cycling(threat, *, repeatable, steps=60, model=None):
    """Run an ascent whose steps are long enough to go round in circles, and stop rows that say that they are over."""
    model, x = model or network(gain=1.0), images(6)
    y, search = model(x).argmax(1), PGD(steps=steps, step_size=threat.eps / 2)
    query = Query(model)
    query.repeatable = repeatable
    clean = model(x)
    state = search.begin(x, y, clean, torch.zeros_like(y), threat, streams(6))
    seen, over_at = [], torch.full_like(y, steps + 1)
    for step in range(search.max_steps()):
        seen.append(state["iterate"])
        state = search.step(state, query, threat)
        over_at = torch.where(state["over"] & (over_at > step), step + 1, over_at)
    return state, seen, over_at


def test_an_ascent_that_comes_back_is_over_and_has_found_all_that_it_ever_will():
    state, seen, over_at = cycling(LINF, repeatable=True)
    full, _, never = cycling(LINF, repeatable=False)
    assert (never == 61).all()
    stopped = (over_at <= 60) & ~full["found"]
    assert stopped.any()
    for row in stopped.nonzero()[:, 0].tolist():
        before = [point[row] for point in seen[: over_at[row]]]
        assert all(any(torch.equal(later[row], point) for point in before) for later in seen[over_at[row] :])
    for key in ("found", "adversarial", "best_loss"):
        assert torch.equal(state[key], full[key])


def test_points_that_fool_are_offered_again_however_often_the_ascent_comes_by():
    """Whoever runs the attack may reject an example: an ascent through one is never over."""
    state, _, over_at = cycling(ThreatModel("Linf", 0.5), repeatable=True, model=network(gain=3.0))
    assert state["found"].any()
    assert (over_at[state["found"]] == 61).all()
