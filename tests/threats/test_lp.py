"""Threat models: what is projected lies in ball and box, as near as can be, and steps climb as steeply as can be."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from dualhead.components.fields import parse_real
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats.build import build_threat
from dualhead.threats.lp import ThreatModel, _descending, finite, project_l1

NORMS = ["Linf", "L2", "L1"]
SHAPES = [(1, 8, 8), (3, 4, 5), (2,), (1, 1, 1), (3, 16, 16)]
RADII = ["8/255", 0.031, 1e-6, 0.15, 1.0, 1 / 3]


@st.composite
def cases(draw):
    """Threat model, centres in the box (often on its edges), and points anywhere about them."""
    threat = ThreatModel(draw(st.sampled_from(NORMS)), draw(st.sampled_from(RADII)))
    shape = draw(st.sampled_from(SHAPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.rand(4, *shape, generator=generator)
    if draw(st.booleans()):
        x = (x * 255).round() / 255
    if draw(st.booleans()):
        x = (x * 3 - 1).clamp(0, 1)
    reach = draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, 1e3])) * threat.eps
    return threat, x, x + reach * torch.randn(x.shape, generator=generator)


def within_rounding(threat, point, x, far=1.0):
    """In the ball up to what storing the sum x + delta in float32 moves each value by, if values are up to `far`."""
    values = {"Linf": 1, "L2": math.sqrt(x[0].numel()), "L1": x[0].numel()}[threat.norm]
    slack = 2.0**-24 * values * far + 1e-6 * threat.eps
    return bool((threat.distance(point, x) <= threat.eps + slack).all())


def in_box(point):
    return bool(((point >= 0) & (point <= 1)).all())


@settings(max_examples=150)
@given(cases())
def test_project_and_confine_keep_to_ball_and_box(case):
    threat, x, point = case
    projected, confined = threat.project(point, x), threat.confine(point, x)
    assert in_box(projected)
    assert in_box(confined)
    # Under L1 what a value loses is as large as it is far away, and the difference keeps that rounding.
    far = max(1.0, float((point - x).abs().max())) if threat.norm == "L1" else 1.0
    assert within_rounding(threat, projected, x, far)
    assert (threat.distance(confined, x) <= threat.eps).all()
    assert confined.dtype == torch.float32
    assert (confined - projected).abs().max() <= 2e-6 * far


@settings(max_examples=60)
@given(cases())
def test_what_is_inside_already_stays(case):
    threat, x, point = case
    inside = threat.confine(point, x)
    assert torch.allclose(threat.confine(inside, x), inside, rtol=0, atol=0 if threat.norm == "Linf" else 2e-7)
    assert torch.equal(threat.confine(x, x), x)
    assert torch.equal(threat.project(x, x), x)
    assert torch.allclose(threat.project(inside, x), inside, rtol=0, atol=2e-7)


@settings(max_examples=60)
@given(cases(), st.integers(0, 2**31))
def test_projection_onto_linf_is_the_nearest_point(case, seed):
    """No point of ball and box is nearer, in any norm that grows with each coordinate: each is clamped by itself."""
    threat, x, point = case
    threat = ThreatModel("Linf", min(threat.eps, 1.0))
    projected = threat.project(point.double(), x.double())
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    other = (x.double() + threat.eps * noise).clamp(0, 1)
    assert ((projected - point).abs() <= (other - point).abs() + 1e-15).all()


@settings(max_examples=60)
@given(cases(), st.integers(0, 2**31))
def test_projection_onto_l2_is_the_nearest_point_of_the_ball(case, seed):
    """Away from the box's edges, where the ball alone binds."""
    _, x, point = case
    threat = ThreatModel("L2", 0.05)
    centre = 0.25 + 0.5 * x.double()
    target = centre + (point.double() - x.double())
    projected = threat.project(target, centre)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).double()
    other = centre + threat.eps * noise / noise.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.dim() - 1))
    nearest = (projected - target).flatten(1).norm(dim=1)
    assert (nearest <= (other - target).flatten(1).norm(dim=1) + 1e-12).all()


@settings(max_examples=25)
@given(size=st.integers(1, 6), radius=st.sampled_from([0.01, 0.3, 1.0, 2.5]), seed=st.integers(0, 10**6))
def test_projection_onto_l1_and_box_solves_the_quadratic_program(size, radius, seed):
    """The nearest point, as a solver finds it that knows nothing of sorting: z = rise - fall, both 0 or more."""
    generator = np.random.default_rng(seed)
    x = (generator.random(size) * 1.4 - 0.2).clip(0, 1)
    delta = generator.normal(size=size) * generator.choice([0.1, 1.0, 3.0])
    start = np.zeros(2 * size)
    solved = minimize(
        lambda z: ((z[:size] - z[size:] - delta) ** 2).sum(),
        start,
        jac=lambda z: np.concatenate([2 * (z[:size] - z[size:] - delta), -2 * (z[:size] - z[size:] - delta)]),
        bounds=[(0, 1 - v) for v in x] + [(0, v) for v in x],
        constraints={"type": "ineq", "fun": lambda z: radius - z.sum(), "jac": lambda z: -np.ones(2 * size)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    found = project_l1(torch.tensor(delta)[None], torch.tensor(x)[None], radius)[0].numpy()
    assert np.abs(found).sum() <= radius + 1e-12
    assert ((x + found >= -1e-15) & (x + found <= 1 + 1e-15)).all()
    np.testing.assert_allclose(found, solved.x[:size] - solved.x[size:], atol=2e-5)
    assert ((found - delta) ** 2).sum() <= solved.fun + 1e-9


@pytest.mark.parametrize("grid", [0, 4])
def test_single_precision_is_put_in_order_as_double_is(grid):
    """Both sort; float32 does it on keys of its own. Among equal places only the sum of turns is settled."""
    start, stop = torch.rand(5, 40), torch.rand(5, 40).sub(0.5).clamp_min(0.0)
    if grid:
        start, stop = (start * grid).round() / grid, (stop * grid).round() / grid
    (places, turns), (expected, counted) = _descending(start, stop), _descending(start.double(), stop.double())
    assert torch.equal(places, expected.float())
    settled = torch.cat((places[:, :-1] > places[:, 1:], torch.ones(5, 1, dtype=torch.bool)), 1)
    assert torch.equal(turns.cumsum(1)[settled], counted.float().cumsum(1)[settled])


def test_projection_onto_l1_takes_a_radius_for_each_image():
    x, delta = torch.rand(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    together = project_l1(delta, x, torch.tensor([0.1, 1.0, 50.0]))
    for row, radius in enumerate([0.1, 1.0, 50.0]):
        assert torch.allclose(together[row], project_l1(delta[row : row + 1], x[row : row + 1], radius)[0], atol=1e-6)


@settings(max_examples=60)
@given(cases(), st.integers(0, 1000))
def test_starting_points_keep_to_ball_and_box(case, seed):
    threat, x, _ = case
    streams = Streams.of(seed, torch.arange(len(x)))
    for start in (threat.ball_point(x, streams), threat.sphere_point(x, streams)):
        assert start.shape == x.shape
        assert in_box(start)
        assert within_rounding(threat, start, x)


@pytest.mark.parametrize("norm", NORMS)
def test_starting_points_belong_to_the_sample(norm):
    threat, x = ThreatModel(norm, 0.2), torch.full((6, 3, 4, 4), 0.5)
    streams = Streams.of(1, torch.arange(6))
    for make in (threat.ball_point, threat.sphere_point):
        whole = make(x, streams)
        assert torch.equal(make(x[2:4], streams[torch.tensor([2, 3])]), whole[2:4])
        assert len({tuple(row.flatten().tolist()) for row in whole}) == 6


@pytest.mark.parametrize("norm", NORMS)
def test_a_point_of_the_sphere_lies_at_the_whole_radius(norm):
    threat, x = ThreatModel(norm, 0.1), torch.full((50, 3, 4, 4), 0.5)
    distance = threat.distance(threat.sphere_point(x, Streams.of(0, torch.arange(50))), x)
    assert torch.allclose(distance, torch.full_like(distance, 0.1), atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_ball_points_fill_the_ball_evenly(norm):
    """A uniform point of a ball in n dimensions lies within r of the centre with probability (r / eps) ** n."""
    threat, x = ThreatModel(norm, 0.1), torch.full((20_000, 2), 0.5)
    distance = threat.distance(threat.ball_point(x, Streams.of(0, torch.arange(len(x)))), x)
    for share in (0.25, 0.5, 0.75):
        expected = share**2
        assert abs((distance <= 0.1 * share).double().mean() - expected) < 5 * math.sqrt(expected / len(x))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), step=st.sampled_from([0.003, 0.1, 1.0]))
def test_ascend_is_the_steepest_step_of_its_length(norm, seed, step):
    """It gains step times the dual norm of the gradient, which no other step of that length exceeds."""
    generator = torch.Generator().manual_seed(seed)
    x, gradient, other = torch.randn(3, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    threat = ThreatModel(norm, 0.5)
    moved = threat.ascend(x, gradient, step) - x
    gain = (moved * gradient).flatten(1).sum(1)
    flat = gradient.flatten(1)
    dual = flat.abs().sum(1) if norm == "Linf" else flat.norm(dim=1)
    assert torch.allclose(gain, step * dual)
    length = threat.distance(x + moved, x)
    assert torch.allclose(length, torch.full_like(length, step))
    scale = step / threat.distance(x + other, x)
    rival = (other * scale.reshape(-1, 1, 1, 1) * gradient).flatten(1).sum(1)
    assert (rival <= gain + 1e-12).all()


def test_under_l1_a_step_is_shared_by_the_steepest_hundredth_that_can_still_move():
    x, gradient = torch.full((2, 1, 20, 20), 0.5), torch.zeros(2, 1, 20, 20)
    x[0, 0, 0, 0] = 1.0
    gradient[0, 0, 0] = torch.arange(20.0, 0.0, -1.0)
    gradient[1, 0, 3] = -torch.arange(20.0)
    moved = ThreatModel("L1", 1.0).ascend(x, gradient, 0.2) - x
    expected = torch.zeros_like(x)
    expected[0, 0, 0, 1:5], expected[1, 0, 3, 16:] = 0.05, -0.05  # the steepest of the first has reached the box
    torch.testing.assert_close(moved, expected)
    assert torch.allclose(ThreatModel("L1", 1.0).distance(x + moved, x), torch.tensor(0.2).double(), atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_ascend_takes_a_step_per_sample_and_a_gradient_of_zero(norm):
    threat, x = ThreatModel(norm, 0.5), torch.rand(3, 2, 2)
    gradient = torch.randn(3, 2, 2)
    steps = torch.tensor([0.1, 0.0, 0.3])
    together = threat.ascend(x, gradient, steps)
    for row in range(3):
        alone = threat.ascend(x[row : row + 1], gradient[row : row + 1], float(steps[row]))
        assert torch.allclose(together[row], alone[0])
    assert torch.equal(threat.ascend(x, torch.zeros_like(x), 0.1), x)


def test_slopes_that_are_not_finite_leave_the_others_as_they_are():
    usual = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(finite(usual), usual)
    gradient = torch.tensor([[1.0, -3.0, torch.inf, torch.nan], [-torch.inf, 0.5, 0.0, 0.25], [torch.nan] * 4])
    assert finite(gradient).tolist() == [[1.0, -3.0, 3.0, 0.0], [-0.5, 0.5, 0.0, 0.25], [0.0] * 4]


def test_distance_by_hand():
    x = torch.zeros(2, 1, 2, 2)
    moved = torch.tensor([[0.3, 0.0, -0.4, 0.0], [0.1, 0.1, 0.1, -0.1]]).reshape(2, 1, 2, 2)
    assert ThreatModel("Linf", 1).distance(moved, x).tolist() == pytest.approx([0.4, 0.1])
    assert ThreatModel("L2", 1).distance(moved, x).tolist() == pytest.approx([0.5, 0.2])
    assert ThreatModel("L1", 1).distance(moved, x).tolist() == pytest.approx([0.7, 0.4])
    assert ThreatModel("L2", 1).distance(moved, x).dtype == torch.float64


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("8/255", 8 / 255), (" 8 / 255 ", 8 / 255), ("0.031", 0.031), ("1", 1.0), (1, 1.0), (0.5, 0.5),
        ("2e-3", 0.002), ("-1/4", -0.25), ("0", 0.0), ("0.5/255", 0.5 / 255),
        (np.int64(3), 3.0), (np.float32(0.25), 0.25), (np.uint8(255), 255.0), (Fraction(8, 255), 8 / 255),
    ],
)  # fmt: skip
def test_parse_real_reads_numbers_and_fractions(value, expected):
    assert parse_real(value) == expected


@given(st.integers(-(2**40), 2**40), st.integers(1, 2**40))
def test_parse_real_rounds_a_fraction_once(numerator, denominator):
    assert parse_real(f"{numerator}/{denominator}") == numerator / denominator


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_parse_real_reads_what_python_prints(number):
    assert parse_real(number) == parse_real(repr(number)) == number


@pytest.mark.parametrize(
    "value",
    ["", "eight", "8/0", "8//255", "1/2/3", "8 255", True, np.True_, None, [1], {"a": 1}, b"1", 1j, "/255", "8/"],
)
def test_parse_real_refuses_what_is_no_number(value):
    with pytest.raises(UserError, match="not a number; write it like"):
        parse_real(value)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, "inf", "nan", "1e400", "1e999999999", 10**400])
def test_parse_real_refuses_what_is_not_finite_without_long_thought(value):
    with pytest.raises(UserError, match=r"is not (finite|a number); write"):
        parse_real(value)


@pytest.mark.parametrize(
    ("said", "norm"),
    [("linf", "Linf"), ("L_inf", "Linf"), ("inf", "Linf"), (math.inf, "Linf"), ("l2", "L2"), (2, "L2"), (1.0, "L1")],
)
def test_norms_are_understood_as_other_libraries_write_them(said, norm):
    assert ThreatModel(said, 0.1) == ThreatModel(norm, 0.1) == build_threat({"norm": said, "eps": 0.1})
    assert build_threat(f"{said}:0.1").norm == norm


@pytest.mark.parametrize(
    ("norm", "eps", "words"),
    [
        ("L3", 1, "norm 'L3' is not known; use one of Linf, L2, L1"),
        ("L0", 1, "use one of Linf, L2"),
        ("Linf", 0, "greater than 0"),
        ("L2", "-1/255", "greater than 0"),
        ("Linf", 8, "did you mean 8/255"),
        ("L2", "a lot", "not a number"),
    ],
)
def test_impossible_threat_models_are_refused(norm, eps, words):
    with pytest.raises(UserError, match=words):
        ThreatModel(norm, eps)


def test_l2_and_l1_may_exceed_one_and_text_equals_numbers():
    assert ThreatModel("L2", 3).eps == 3
    assert ThreatModel("L1", 12).eps == 12
    assert ThreatModel("Linf", "8/255") == ThreatModel("Linf", 8 / 255)
