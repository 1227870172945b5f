"""N-FGSM against a loop written down by hand; FGSM-RS and PGD-2 beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it

from dualhead.attacks import attacks, maximise_within
from dualhead.errors import UserError
from dualhead.threats.lp import ThreatModel
from helpers.attacks import images, network, streams

LINF = ThreatModel("Linf", 8 / 255)


def climbed(spec, threat=LINF):
    """Return what training sees, the start noise as uniform numbers in [-1, 1], and what a loop by hand needs."""
    model, x = network(), images(4)
    y = model(x).argmax(1)

    def climb(image):
        return F.cross_entropy(model(image), y, reduction="none")

    def sign_at(image):
        image = image.detach().requires_grad_()
        return torch.autograd.grad(climb(image).sum(), image)[0].sign()

    made = maximise_within(attacks.build(spec), climb, x, threat, streams(4))
    return made, x, streams(4).uniform(*x.shape[1:]) * 2 - 1, sign_at


@pytest.mark.parametrize(("noise", "step"), [(2.0, None), (0.5, 4 / 255)])
def test_n_fgsm_is_its_algorithm_to_the_bit(noise, step):
    made, x, u, sign_at = climbed({"name": "n_fgsm", "noise": noise, "step_size": step})
    noisy = (x + noise * LINF.eps * u).clamp(0, 1)
    by_hand = (noisy + (LINF.eps if step is None else step) * sign_at(noisy)).clamp(0, 1)
    assert torch.equal(made, by_hand)


def test_n_fgsm_leaves_the_ball_in_training_and_no_further_than_noise_and_step():
    made, x, _, _ = climbed("n_fgsm")
    far = LINF.distance(made, x)
    assert (far > 1.5 * LINF.eps).all()
    assert (far <= 3 * LINF.eps + 1e-6).all()


def test_in_an_evaluation_n_fgsm_is_one_step_within_the_ball():
    model, x = network(), images(4)
    y = model(x).argmax(1)
    attack = attacks.build("n_fgsm")
    made = attack(model, x, y, LINF, generator=streams(4))
    same = attacks.build({"name": "pgd", "steps": 1, "step_size": LINF.eps})(model, x, y, LINF, generator=streams(4))
    assert torch.equal(made, same)
    assert attack.notes(10)[0].startswith("n_fgsm: it leaves the ball in training alone")


def test_fgsm_from_a_uniform_start_is_fgsm_rs_to_the_bit():
    made, x, u, sign_at = climbed({"name": "fgsm", "step_size": 10 / 255, "start": "uniform"})
    start = (x + LINF.eps * u).clamp(0, 1)
    moved = start + 10 / 255 * sign_at(start)
    assert torch.equal(made, torch.min(torch.max(moved, x - LINF.eps), x + LINF.eps).clamp(0, 1))


def test_pgd_2_is_two_steps_of_half_eps_to_the_bit():
    made, x, _, sign_at = climbed({"name": "pgd", "steps": 2, "step_size": 4 / 255, "start": "clean"})
    for_hand = x
    for _ in range(2):
        moved = for_hand + 4 / 255 * sign_at(for_hand)
        for_hand = torch.min(torch.max(moved, x - LINF.eps), x + LINF.eps).clamp(0, 1)
    assert torch.equal(made, for_hand)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"noise": 0}, "noise must be greater than 0, got 0; 2 is as published"),
        ({"step_size": -1}, "step_size must be greater than 0"),
    ],
)
def test_impossible_settings_are_refused(spec, said):
    with pytest.raises(UserError, match=said):
        attacks.build({"name": "n_fgsm", **spec})


def test_an_eps_without_room_for_the_noise_is_refused():
    with pytest.raises(UserError, match="more than Linf allows"):
        attacks.build("n_fgsm").check(ThreatModel("Linf", 0.5))
