"""Flow fields: what is not moved stays to the bit, what is moved is where the paper's sampling puts it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from dualhead.attacks import Query, attacks
from dualhead.attacks.losses import cross_entropy
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.threats import build_threat
from dualhead.threats.flow import Flow
from helpers.attacks import images, network, streams

SHAPES = [(3, 8, 8), (1, 5, 9), (3, 1, 6), (2, 1, 1)]


def rendered(threat, x, field):
    return threat.render(torch.cat((x.flatten(1), field.flatten(1)), 1))


def shifted(x, down, right):
    """The image that takes each pixel from so many whole pixels further down and right, the edge repeated."""
    rows = (torch.arange(x.shape[2]) + down).clamp(0, x.shape[2] - 1)
    columns = (torch.arange(x.shape[3]) + right).clamp(0, x.shape[3] - 1)
    return x[:, :, rows][:, :, :, columns]


@pytest.mark.parametrize("shape", SHAPES)
def test_no_flow_leaves_images_to_the_bit(shape):
    x, threat = images(4, *shape), Flow(0.3).for_images(shape)
    assert torch.equal(threat.render(threat.lift(x)), x)


@pytest.mark.parametrize(("down", "right"), [(1, 0), (0, -2), (-3, 1), (99, 99)])
def test_whole_pixels_are_taken_from_where_the_flow_points(down, right):
    x, threat = images(2, 3, 8, 10), Flow(50.0).for_images((3, 8, 10))
    field = torch.tensor([down * 2 / 8, right * 2 / 10]).reshape(1, 2, 1, 1).expand(2, 2, 8, 10)
    torch.testing.assert_close(rendered(threat, x, field), shifted(x, down, right), rtol=0, atol=1e-5)


@settings(max_examples=40)
@given(shape=st.sampled_from(SHAPES), reach=st.floats(0.05, 1.5), seed=st.integers(0, 1000))
def test_sampling_and_its_gradient_are_those_of_grid_sample(shape, reach, seed):
    generator = torch.Generator().manual_seed(seed)
    x, threat = images(3, *shape, seed=seed).double(), Flow(1.0).for_images(shape)
    field = reach * (2 * torch.rand(3, 2, *shape[1:], generator=generator, dtype=torch.float64) - 1)
    weight = torch.rand(x.shape, generator=generator, dtype=torch.float64)
    ours = field.clone().requires_grad_()
    (rendered(threat, x, ours) * weight).sum().backward()

    theirs = field.clone().requires_grad_()
    still = functional.affine_grid(
        torch.eye(2, 3, dtype=torch.float64).expand(3, 2, 3), list(x.shape), align_corners=False
    )
    grid = still + theirs.flip(1).permute(0, 2, 3, 1)
    expected = functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    (expected * weight).sum().backward()
    torch.testing.assert_close(rendered(threat, x, field), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-9)


def test_the_gradient_goes_to_the_field_and_not_to_the_image():
    x, threat = images(2), Flow(0.2).for_images((3, 8, 8))
    point = threat.start(threat.lift(x), streams(2), "ball").requires_grad_()
    (gradient,) = torch.autograd.grad(threat.render(point).square().sum(), point)
    assert not gradient[:, : x[0].numel()].any()
    assert gradient[:, x[0].numel() :].abs().amax(1).min() > 0


@pytest.mark.parametrize("eps", ["8/255", 0.031, 1 / 3, 0.1, 1e-6])
def test_points_keep_to_the_budget_to_the_last_bit(eps):
    x = images(3)
    threat = Flow(eps).for_images((3, 8, 8))
    origin = threat.lift(x)
    far = origin + 3 * threat.eps * torch.randn(origin.shape, generator=torch.Generator().manual_seed(0))
    confined = threat.confine(far, origin)
    assert (threat.distance(confined, origin) <= threat.eps).all()
    assert (threat.distance(confined, origin) > (1 - 1e-6) * threat.eps).all()
    assert torch.equal(confined[:, : x[0].numel()], x.flatten(1))  # an attack does not touch the image itself
    assert torch.equal(threat.confine(confined, origin), confined)
    assert torch.equal(threat.project(origin, origin), origin)


def test_starts_fill_the_cube_or_lie_on_its_surface():
    x = images(1, 1, 8, 8).expand(200, -1, -1, -1)
    threat = Flow(0.2).for_images((1, 8, 8))
    origin, draws = threat.lift(x), Streams.of(0, torch.arange(200))
    ball, sphere = (threat.start(origin, draws, where) for where in ("ball", "sphere"))
    field = ball[:, 64:]
    assert (threat.distance(ball, origin) <= 0.2 * (1 + 1e-6)).all()
    assert float(field.mean()) == pytest.approx(0, abs=0.005)
    assert float(field.std()) == pytest.approx(0.2 / math.sqrt(3), rel=0.02)
    assert threat.distance(sphere, origin).tolist() == pytest.approx([0.2] * 200, rel=1e-6)


def test_a_slope_that_is_no_number_moves_nothing():
    threat = Flow(0.2).for_images((3, 8, 8))
    origin = threat.lift(images(2))
    gradient = torch.full_like(origin, torch.nan)
    assert torch.equal(threat.ascend(origin, gradient, 0.1), origin)


def test_a_field_of_nan_breaks_nothing_and_is_at_no_distance():
    threat = Flow(0.2).for_images((3, 8, 8))
    origin = threat.lift(images(1))
    broken = origin.clone()
    broken[:, -1] = torch.nan
    assert threat.render(broken).isfinite().all()
    assert not (threat.distance(threat.confine(broken, origin), origin) <= threat.eps).any()


@pytest.mark.parametrize("name", ["pgd-20", "apgd-ce-20", "apgd-dlr-20", "apgd-t-10", "multihead-5"])
def test_attacks_raise_the_loss_and_fool(name):
    model, x = network(4), images(24)
    y, threat = model(x).argmax(1), Flow(0.5)
    found = attacks.build(name)(
        model, x, y, threat, generator=streams(24), outputs_fn=lambda z: torch.stack((model(z),) * 3, 1)
    )
    assert (cross_entropy(model(found), y) > cross_entropy(model(x), y)).float().mean() > 0.9
    assert (model(found).argmax(1) != y).sum() >= 3


def test_one_step_raises_the_loss_of_most():
    model, x = network(4), images(24)
    y = model(x).argmax(1)
    found = attacks.build("fgsm")(model, x, y, Flow(0.1), generator=streams(24))
    assert (cross_entropy(model(found), y) > cross_entropy(model(x), y)).float().mean() > 0.7


def test_longer_shifts_fool_at_least_as_many():
    model, x = network(4), images(24)
    y = model(x).argmax(1)
    fooled = [
        int((model(attacks.build("apgd-ce-20")(model, x, y, Flow(eps), generator=streams(24))).argmax(1) != y).sum())
        for eps in (0.01, 0.2, 0.8)
    ]
    assert fooled == sorted(fooled)
    assert fooled[0] < fooled[-1]


def test_passes_count_on_the_query_that_the_caller_keeps():
    model, x = network(4), images(4)
    query = Query(model)
    attacks.build("pgd-5").search(query, x, model(x).argmax(1), Flow(1e-4), streams(4))
    assert (query.forward_passes, query.backward_passes) == (4 + 6 * 4 + 4, 6 * 4)  # clean, steps and a look, verdict


def test_what_cannot_be_bent_is_refused():
    with pytest.raises(UserError, match=r"flow needs images of shape \[C, H, W\], got \[7\]"):
        Flow(0.1).for_images((7,))
    for eps in (0, -1):
        with pytest.raises(UserError, match="greater than 0"):
            Flow(eps)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("flow", r"must be \{norm: ..., eps: ...\}, \{name: ..., eps: ...\} or short, as L2:0.5; got 'flow'"),
        ({"name": "flow"}, "eps: missing"),
        ({"name": "flo", "eps": 1}, "unknown threat 'flo'; did you mean 'flow'"),
        ({"name": "flow", "eps": 1, "norm": "L2"}, "has both name"),
        ({"name": "flow", "eps": 1, "side": 2}, "no such key"),
        ({"norm": "flow", "eps": 1}, "no norm; write name: flow"),
        ({"norm": "l0", "eps": 1}, "no norm; write name: L0"),
        ({"name": "l2", "eps": 1}, "name: l2 is a norm; write norm: L2"),
        ({"norm": "L2", "eps": 1, "side": 2}, "side: unknown key"),
    ],
)
def test_threats_that_cannot_be_built_are_refused_in_one_line(spec, message):
    with pytest.raises(UserError, match=message) as refused:
        build_threat(spec, "threat")
    assert str(refused.value).startswith("threat")
    assert "\n" not in str(refused.value)


def test_what_describe_gives_is_built_again():
    for spec in ({"norm": "L2", "eps": 0.5}, {"name": "flow", "eps": 0.05}):
        assert build_threat(spec).describe() == spec
        assert build_threat(build_threat(spec).describe()) == build_threat(spec)
    assert build_threat({"eps": "8/255"}).describe() == {"norm": "Linf", "eps": 8 / 255}


def test_another_budget_keeps_the_images_that_it_is_for():
    threat = Flow(0.1).for_images((3, 8, 8)).within(0.2)
    assert threat == Flow(0.2)
    assert threat.image_shape == (3, 8, 8)
