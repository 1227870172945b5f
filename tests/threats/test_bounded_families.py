"""Rotations, recolouring and JPEG coefficients: closed forms, what leaves an image alone, and what they refuse."""

import io
import math

import numpy as np
import pytest
import torch

from dualhead.attacks import attacks
from dualhead.attacks.losses import cross_entropy
from dualhead.errors import UserError
from dualhead.evaluation import evaluate
from dualhead.threats import ThreatModel, build_threat
from dualhead.threats.jpeg import Jpeg
from dualhead.threats.recolour import Recolour, to_luv, to_rgb
from dualhead.threats.rotation import Rotation
from helpers.attacks import images, network, streams
from helpers.evaluation import patterns, trained


def rendered(threat, x, parameters):
    return threat.render(torch.cat((x.flatten(1), parameters.flatten(1)), 1))


# ---- rotations


def test_quarter_turns_are_those_of_rot90():
    x, threat = images(2, 3, 7, 7), Rotation(90.0, shift=0).for_images((3, 7, 7))
    for turns in (1, -1):
        angles = torch.tensor([[90.0 * turns, 0.0, 0.0]]).expand(2, 3)
        found = rendered(threat, x, angles)
        expected = torch.rot90(x, turns, (2, 3)), torch.rot90(x, -turns, (2, 3))
        assert min(float((found - one).abs().max()) for one in expected) < 1e-5


def test_whole_shifts_move_and_leave_black_behind():
    x, threat = images(1, 3, 6, 8), Rotation(30.0, shift=3.0).for_images((3, 6, 8))
    found = rendered(threat, x, torch.tensor([[0.0, 10.0, -20.0]]))  # 1 down of 3, and 2 to the left
    expected = torch.zeros_like(x)
    expected[:, :, :5, 2:] = x[:, :, 1:, :6]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_sampling_and_its_gradient_are_those_of_grid_sample():
    x, threat = images(3, 2, 8, 8).double(), Rotation(40.0, shift=2.0).for_images((2, 8, 8))
    parameters = torch.tensor([[25.0, 13.0, -31.0], [-39.0, 2.0, 5.0], [3.0, -7.0, 11.0]]).double()
    ours = parameters.clone().requires_grad_()
    rendered(threat, x, ours).square().sum().backward()
    theirs = parameters.clone().requires_grad_()
    angle, along = theirs[:, 0] * math.pi / 180, theirs[:, 1:] * 2 / 40
    matrix = torch.stack(
        (
            torch.stack((angle.cos(), angle.sin(), along[:, 1] / 4), 1),
            torch.stack((-angle.sin(), angle.cos(), along[:, 0] / 4), 1),
        ),
        1,
    )
    grid = torch.nn.functional.affine_grid(matrix, list(x.shape), align_corners=False)
    expected = torch.nn.functional.grid_sample(x, grid, align_corners=False)
    expected.square().sum().backward()
    torch.testing.assert_close(rendered(threat, x, parameters), expected.detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-7)


def test_the_grid_is_the_published_one_and_finds_all_that_lies_on_it():
    model, x = network(4, side=8), images(24)
    y, threat = model(x).argmax(1), Rotation(30.0, shift=1.0).for_images((3, 8, 8))
    points = threat.lattice(31, 5)
    assert points.shape == (775, 3)
    assert points.abs().amax(0).tolist() == pytest.approx([30.0] * 3)
    few = threat.lattice(5, 3)
    lost = torch.zeros(24, dtype=torch.bool)
    for point in few:
        lost |= model(rendered(threat, x, point.expand(24, 3))).argmax(1) != y
    attack = attacks.build("grid(angles=5,shifts=3)")
    found = attack(model, x, y, threat, generator=streams(24))
    assert torch.equal(model(found).argmax(1) != y, lost)
    assert lost.any()
    x, y = patterns(24)
    measured = evaluate(
        trained(), x, y, threat="rotation(shift=1):30", attacks=[attack], precision="float32", diagnostics=False
    )
    assert measured.results["threat"] == {"name": "rotation", "eps": 30.0, "shift": 1.0}
    assert measured.results["attacks"][attack.label]["forward_passes"] > 0
    assert not measured.verdicts[attack.label].robust.all()


def test_shifts_keep_their_size_at_other_angles():
    assert build_threat("rotation:30") == Rotation(30.0)
    assert build_threat({"name": "rotation:30", "eps": 15}) == Rotation(15.0)  # as an override leaves a short form
    assert build_threat({"name": "L2:0.5", "eps": 1}) == ThreatModel("L2", 1.0)
    assert Rotation(30.0).within(10.0).shift == 3.0
    assert Rotation(10.0, shift=0).kind == "rotation(shift=0.0)"
    with pytest.raises(UserError, match="shift must be at least 0"):
        Rotation(30.0, shift=-1)


def test_the_grid_refuses_other_threats_in_one_line():
    with pytest.raises(UserError, match="attack grid is defined for rotation, not for threat Linf; use") as refused:
        attacks.build("grid").check(build_threat("Linf:0.1"))
    assert "\n" not in str(refused.value)


# ---- colours


def test_conversions_are_those_of_the_standard_and_return():
    known = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    expected = [(100.0, 0.0, 0.0), (53.24, 175.01, 37.75), (87.74, -83.08, 107.40), (32.30, -9.40, -130.34), (0, 0, 0)]
    luv = to_luv(known[:, :, None, None])[:, :, 0, 0]
    scaled = torch.stack((luv[:, 0] * 100, (luv[:, 1] - 0.5) * 200, (luv[:, 2] - 0.5) * 200), 1)
    torch.testing.assert_close(scaled, torch.tensor(expected), rtol=0, atol=0.15)
    x = images(4)
    torch.testing.assert_close(to_rgb(to_luv(x)), x, rtol=0, atol=2e-4)


def test_a_constant_function_moves_every_colour_alike_and_one_colour_moves_as_one():
    threat = Recolour(0.1, lightness=4, chroma=5).for_images((3, 8, 8))
    x = 0.3 + 0.4 * images(2)
    parameters = torch.zeros(2, 3, 4, 5, 5)
    parameters[:, 0], parameters[:, 2] = 0.05, -0.04
    found = to_luv(rendered(threat, x, parameters)) - to_luv(x)
    torch.testing.assert_close(found[:, 0], torch.full_like(found[:, 0], 0.05), rtol=0, atol=1e-3)
    torch.testing.assert_close(found[:, 1], torch.zeros_like(found[:, 1]), rtol=0, atol=1e-3)
    torch.testing.assert_close(found[:, 2], torch.full_like(found[:, 2], -0.04), rtol=0, atol=1e-3)
    same = x[:, :, :1, :1].expand_as(x)
    wild = threat.start(threat.lift(same), streams(2), "ball")
    image = threat.render(wild)
    assert torch.equal(image, image[:, :, :1, :1].expand_as(image))


def test_wild_colours_stay_numbers_with_numbers_for_slopes():
    threat = Recolour(0.5, lightness=3, chroma=3).for_images((3, 8, 8))
    for x in (images(4), torch.zeros(4, 3, 8, 8), torch.ones(4, 3, 8, 8)):
        point = threat.start(threat.lift(x), streams(4), "sphere").requires_grad_()
        image = threat.render(point)
        (gradient,) = torch.autograd.grad(image.sum(), point)
        assert image.isfinite().all()
        assert gradient.isfinite().all()


# ---- JPEG


def test_steps_are_those_that_a_jpeg_file_holds():
    image = pytest.importorskip("PIL.Image")
    for quality in (30, 75, 95):
        stored = io.BytesIO()
        image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(stored, "JPEG", quality=quality)
        tables = image.open(stored).quantization
        steps = Jpeg(1.0, quality=quality).steps(3).flatten(1)
        assert steps[0].tolist() == list(tables[0])
        assert steps[1].tolist() == steps[2].tolist() == list(tables[1])


def test_a_coefficient_adds_its_wave_and_a_constant_one_adds_grey():
    threat = Jpeg(4.0, quality=50).for_images((3, 10, 12))
    x, parameters = torch.full((1, 3, 10, 12), 0.5), torch.zeros(1, 3, 2, 2, 8, 8)
    parameters[0, 0, 0, 0, 0, 0] = 2.0  # luma of the first block: 2 steps of 16, over 8 for the mean of 64 values
    found = rendered(threat, x, parameters)
    torch.testing.assert_close(found[..., :8, :8], torch.full((1, 3, 8, 8), 0.5 + 32 / 8 / 255), rtol=0, atol=1e-6)
    assert torch.equal(found[..., 8:, :], x[..., 8:, :])
    parameters.zero_()[0, 0, 1, 1, 3, 2] = 1.0
    wave = rendered(threat, x, parameters)[0, 0, 8:, 8:] - 0.5
    rows, columns = torch.arange(2), torch.arange(4)
    expected = (
        22 / 4 / 255  # the step at frequencies 3 and 2, and the orthonormal waves' heights
        * torch.cos((2 * rows + 1) * 3 * math.pi / 16)[:, None]
        * torch.cos((2 * columns + 1) * 2 * math.pi / 16)
    )  # fmt: skip
    torch.testing.assert_close(wave, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("attack", ["pgd-5", "apgd-ce-10"])
def test_on_a_linear_model_the_reach_is_eps_times_the_slopes(attack):
    threat = Jpeg(0.2).for_images((3, 8, 8))
    weight = torch.randn(3 * 64, generator=torch.Generator().manual_seed(0))
    x, y = torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, dtype=torch.int64)
    point = threat.lift(x).requires_grad_()
    (slopes,) = torch.autograd.grad(threat.render(point).flatten() @ weight, point)
    most = 0.2 * float(slopes.abs().sum())
    for share, expected in ((0.99, 1), (1.01, 0)):

        def model(z, gap=share * most):
            moved = (z - 0.5).flatten(1) @ weight - gap
            return torch.stack((torch.zeros_like(moved), moved), 1)

        found = attacks.build(attack)(model, x, y, threat, generator=streams(1))
        assert int(model(found).argmax(1)) == expected


# ---- all of them


@pytest.mark.parametrize(
    "threat", [Rotation(30.0), Recolour(0.2, lightness=3, chroma=3), Jpeg(1.0)], ids=["rotation", "recolour", "jpeg"]
)
@pytest.mark.parametrize("attack", ["pgd-10(restarts=2)", "apgd-ce-20", "random-search-60"])
def test_attacks_raise_the_loss_and_fool(threat, attack):
    model, x = network(4), images(24)
    y = model(x).argmax(1)
    found = attacks.build(attack)(model, x, y, threat, generator=streams(24))
    assert (cross_entropy(model(found), y) > cross_entropy(model(x), y)).float().mean() > 0.7
    assert (model(found).argmax(1) != y).sum() >= 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("recolour:0.1", r"recolour needs images of shape \[3, H, W\], got \[2, 8, 8\]"),
        ("jpeg:0.1", r"jpeg needs images of shape \[1, H, W\] or \[3, H, W\], got \[2, 8, 8\]"),
    ],
)
def test_images_that_do_not_fit_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        build_threat(spec).for_images((2, 8, 8))
    with pytest.raises(UserError, match="quality must lie in 1 to 100"):
        Jpeg(0.1, quality=0)
    with pytest.raises(UserError, match="lightness must be at least 2"):
        Recolour(0.1, lightness=1)
