"""FAB against the published code, its projection against exact ones, and linear models whose answer is known."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.fab_pt import FABAttack_PT

from dualhead.attacks import Query, attacks
from dualhead.attacks.fab import FAB, FABT, to_hyperplane
from dualhead.errors import UserError
from dualhead.threats.lp import ThreatModel
from helpers.attacks import Recorder, drawn, images, linear_problem, network, run, run_staggered, streams

BATCH = 6
LINF, L2, L1 = ThreatModel("Linf", 8 / 255), ThreatModel("L2", 0.25), ThreatModel("L1", 2.0)
ALL = pytest.mark.parametrize("threat", [LINF, L2, L1], ids=["Linf", "L2", "L1"])


@pytest.fixture
def double(monkeypatch):
    """The reference casts to float32; here it is made to compute in float64, so that rounding decides nothing."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.to(torch.float64))
    yield
    torch.set_default_dtype(before)


def reference(model, threat, *, targeted, steps=100):
    return FABAttack_PT(model, norm=threat.norm, eps=threat.eps, n_iter=steps, targeted=targeted, device="cpu")


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1, 2, 7, 192]),
    share=st.floats(0.0, 0.95),
    power=st.sampled_from([1, 3, 5]),
    norm=st.sampled_from(["Linf", "L2", "L1"]),
)
def test_projection_is_the_shortest_way_to_the_hyperplane(seed, size, share, power, norm):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(16, size, generator=generator) ** power
    point = (torch.rand(16, size, generator=generator) * 1.4 - 0.2).clamp(0, 1)
    sign = torch.randn(16, generator=generator).sign()
    room = torch.where(normal * sign[:, None] > 0, point, 1 - point)
    excess = sign * share * (normal.abs() * room).sum(1)
    way = to_hyperplane(point, normal, excess, norm)
    order = {"Linf": torch.inf, "L2": 2, "L1": 1}[norm]
    length = lambda d: d.norm(p=order, dim=1)  # noqa: E731
    # Rounding what is to be gained in its sixth digit moves the end far where only small weights are left to move.
    least, most = (
        length(by_bisection(point.double(), normal.double(), excess.double() * (1 + rounding), norm))
        for rounding in (-1e-6, 1e-6)
    )
    assert ((point + way) >= -1e-6).all()
    assert ((point + way) <= 1 + 1e-6).all()
    gained = (normal.double() * way.double()).sum(1)
    torch.testing.assert_close(gained, -excess.double(), rtol=1e-4, atol=1e-6 * normal.abs().sum(1).max().item())
    assert (length(way.double()) >= least * (1 - 1e-4) - 1e-6).all()
    assert (length(way.double()) <= most * (1 + 1e-4) + 1e-6).all()


def by_bisection(point, normal, excess, norm):
    """The same in float64, by halving an interval that holds the multiplier, on a scale of logarithms.

    Under L1 the multiplier is the least weight that moves; the last value moves in part.
    """
    slope = normal.abs()
    direction = -(normal * torch.where(excess < 0, -1.0, 1.0)[:, None]).sign()
    room = torch.where(direction > 0, 1 - point, point)
    if norm == "L1":
        moved = torch.zeros_like(point)
        for row in range(len(point)):
            left = excess[row].abs()
            for place in slope[row].argsort(descending=True):
                moved[row, place] = torch.minimum(room[row, place], left / slope[row, place].clamp_min(1e-300))
                left = (left - moved[row, place] * slope[row, place]).clamp_min(0.0)
        return direction * moved
    speed = slope if norm == "L2" else torch.ones_like(slope)
    low, high = torch.full((len(point), 1), -80.0).double(), torch.full((len(point), 1), 80.0).double()
    for _ in range(200):
        middle = (low + high) / 2
        short = (slope * torch.minimum(middle.exp() * speed, room)).sum(1, keepdim=True) < excess.abs()[:, None]
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return direction * torch.minimum(low.exp() * speed, room)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_projection_goes_to_the_corner_where_the_box_ends_before_the_hyperplane(norm):
    point, normal = torch.tensor([[0.25, 0.5, 1.0]]), torch.tensor([[1.0, -2.0, 0.0]])
    way = to_hyperplane(point, normal, torch.tensor([100.0]), norm)
    assert torch.equal(point + way, torch.tensor([[0.0, 1.0, 1.0]]))
    assert torch.equal(to_hyperplane(point, normal * 0, torch.tensor([1.0]), norm), torch.zeros(1, 3))


@ALL
@pytest.mark.parametrize("job", [0, 1])
def test_fab_t_follows_the_reference(threat, job, double, monkeypatch):
    model, x = network().double(), images(BATCH).double()
    y = model(x).argmax(1)
    theirs, ours = Recorder(model), Recorder(model)
    attack = reference(theirs, threat, targeted=True)
    attack.target_class = 2 + job
    with torch.no_grad():
        adversarial = attack.attack_single_run(x, y, is_targeted=True)
    state, query = run(FABT(), ours, x, y, threat, streams(BATCH), job=job)
    compare(theirs, ours, state, adversarial, x, threat)
    assert (query.forward_passes, query.backward_passes) == (200 * BATCH, 100 * BATCH)


@pytest.mark.parametrize("threat", [LINF, L2, ThreatModel("L1", 1.2)], ids=["Linf", "L2", "L1"])
def test_fab_follows_the_reference(threat, double, monkeypatch):
    model, x = network(classes=4).double(), images(BATCH).double()
    y = model(x).argmax(1)
    theirs, ours = Recorder(model), Recorder(model)
    adversarial = reference(theirs, threat, targeted=False, steps=40).attack_single_run(x, y)
    state, query = run(FAB(steps=40), ours, x, y, threat, streams(BATCH))
    compare(theirs, ours, state, adversarial, x, threat)
    assert (query.forward_passes, query.backward_passes) == (2 * 40 * BATCH, 3 * 40 * BATCH)


@pytest.mark.parametrize("threat", [LINF, L2, ThreatModel("L1", 1.2)], ids=["Linf", "L2", "L1"])
def test_random_restarts_follow_the_reference(threat, double, monkeypatch):
    model, x = network(classes=4).double(), images(BATCH).double()
    y = model(x).argmax(1)
    theirs, ours = Recorder(model), Recorder(model)
    draws = streams(BATCH)
    noise = draws.fork(torch.ones_like(y))
    with drawn(
        monkeypatch,
        rand=lambda shape, **_: noise.uniform(*shape[1:]).double(),
        randn=lambda shape, **_: noise.normal(*shape[1:]).double(),
    ):
        adversarial = reference(theirs, threat, targeted=False, steps=20).attack_single_run(x, y, use_rand_start=True)
    state, _ = run(FAB(steps=20, restarts=2), ours, x, y, threat, draws, job=1)
    compare(theirs, ours, state, adversarial, x, threat)


def compare(theirs, ours, state, adversarial, x, threat):
    assert len(theirs.with_gradient) == len(ours.with_gradient)
    for k, (a, b) in enumerate(zip(theirs.with_gradient, ours.with_gradient, strict=True)):
        torch.testing.assert_close(b, a, rtol=0, atol=2e-6, msg=f"iterate {k}")
    torch.testing.assert_close(state["adversarial"], adversarial, rtol=0, atol=2e-6)
    distance = threat.distance(adversarial, x)
    torch.testing.assert_close(state["distance"], distance, rtol=1e-5, atol=1e-7)
    assert torch.equal(state["found"], distance <= threat.eps)
    assert 0 < state["found"].sum() < len(x), "all samples alike: too weak a test"


@ALL
def test_distances_in_float32_are_the_references(threat):
    model, x = network(), images(BATCH)
    y = model(x).argmax(1)
    attack = reference(model, threat, targeted=True)
    attack.target_class = 2
    expected = threat.distance(attack.attack_single_run(x, y, is_targeted=True), x)
    state, _ = run(FABT(), model, x, y, threat, streams(BATCH))
    torch.testing.assert_close(state["distance"].double(), expected, rtol=1e-3, atol=1e-5)


@ALL
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("name", ["fab", "fab-t"])
def test_on_linear_models_finds_the_exact_distance(name, classes, threat):
    model, x, y, margin = linear_problem(threat.norm, classes, near=classes)
    (search,) = attacks.build({"name": name, "steps": 12, "minimise": True}).parts(classes, threat)
    state, _ = run(search, model, x, y, threat, streams(len(x)))
    # It overshoots by 5 % of a way that the last example's step back has left at 10 % of the distance.
    assert (state["distance"] <= margin * (1 + 0.05 * 0.1 / 0.95 + 1e-4)).all()
    assert (state["distance"] >= margin * (1 - 1e-4)).all()


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("name", ["fab", "fab-t"])
def test_on_linear_models_fools_just_outside_the_margin_and_not_inside(name, norm):
    model, x, y, margin = linear_problem(norm, 4, near=4)
    for factor, fooled in ((0.98, False), (1.02, True)):
        for row in range(2):
            one, threat = slice(row, row + 1), ThreatModel(norm, factor * margin[row].item())
            x_adv = attacks.build(f"{name}-10")(model, x[one], y[one], threat, generator=streams(1))
            assert (threat.distance(x_adv, x[one]) <= threat.eps).all()
            assert (model(x_adv).argmax(1) != y[one]).item() == fooled


@ALL
def test_minimise_keeps_the_smallest_distance_over_targets_and_restarts(threat):
    model, x = network(classes=5), images(4)
    y, draws = model(x).argmax(1), streams(4)
    single = FABT(steps=15, restarts=2, targets=3)
    distances = [run(single, model, x, y, threat, draws, job=job)[0]["distance"] for job in range(6)]
    (search,) = FABT(steps=15, restarts=2, targets=3, minimise=True).parts(5, threat)
    assert search.jobs(5) == 1
    founds = []
    state, _ = run(search, model, x, y, threat, draws, watch=lambda state: founds.append(state["found"].any()))
    assert torch.equal(state["distance"], torch.stack(distances).amin(0))
    assert not any(founds), "a slot that is found leaves before its distance is known"
    assert torch.equal(state["found"], state["distance"] <= threat.eps)
    torch.testing.assert_close(threat.distance(state["adversarial"], x).float(), state["distance"])


@ALL
@pytest.mark.parametrize("search", [FABT(steps=12), FAB(steps=6, restarts=2), FABT(steps=3, targets=3, minimise=True)])
def test_a_samples_result_does_not_depend_on_when_it_starts_or_on_its_neighbours(search, threat):
    model, x = network(classes=5), images(7)
    y = model(x).argmax(1)
    job = torch.arange(7) % search.jobs(5)
    together = run_staggered(search, model, x, y, threat, streams(7), job=job, slots=3)
    for row in range(7):
        one = slice(row, row + 1)
        state, _ = run(search, model, x[one], y[one], threat, streams(7)[torch.tensor([row])], job=job[one])
        torch.testing.assert_close(together["adversarial"][one], state["adversarial"], rtol=0, atol=1e-4)
        torch.testing.assert_close(together["distance"][one], state["distance"], rtol=1e-3, atol=1e-5)
        assert together["found"][row] == state["found"]


def test_an_example_that_does_not_stand_is_followed_by_another():
    model, x = network(), images(BATCH)
    y, threat = model(x).argmax(1), ThreatModel("Linf", 0.5)
    state = FABT().begin(x, y, model(x), torch.zeros_like(y), threat, streams(BATCH))
    offered = [[] for _ in range(BATCH)]
    for _ in range(30):
        state = FABT().step(state, Query(model), threat)
        for row in state["found"].nonzero()[:, 0].tolist():
            offered[row].append(state["adversarial"][row].clone())
        state["found"][:] = False
    for examples in offered:
        assert len(examples) > 5
        assert not any(torch.equal(a, b) for a, b in pairwise(examples)), "the same one again"


def test_fab_t_costs_less_than_the_published_code():
    def firm(x):  # far from every boundary that the box holds
        return (
            x.flatten(1)[:, :10] * 1e-3 + torch.nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), 10) * 9.0
        )

    x, query = images(4), Query(firm)
    attacks.build("fab-t").search(query, x, torch.zeros(4, dtype=torch.long), LINF, streams(4))
    assert query.backward_passes == 4 * 900
    assert query.forward_passes == 4 * (1 + 1800 + 9)


@pytest.mark.parametrize(
    ("field", "value"), [("alpha_max", 0.0), ("eta", 0.5), ("beta", 1.0), ("steps", 0), ("targets", 0)]
)
def test_impossible_values_are_refused(field, value):
    with pytest.raises(UserError, match=field):
        attacks.build({"name": "fab-t", field: value})
