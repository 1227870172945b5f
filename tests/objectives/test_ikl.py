"""The decoupled KL divergence: equal to KL in its gradients, and IKL by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dualhead.errors import UserError
from dualhead.objectives import objectives
from dualhead.objectives.base import kl_divergence
from dualhead.objectives.ikl import class_means, weighted_square_error
from helpers.objectives import see

LN = math.log
CLEAN = torch.tensor([[LN(0.5), LN(0.25), LN(0.25)], [LN(0.1), LN(0.6), LN(0.3)]], dtype=torch.float64)
ATTACKED = torch.tensor([[LN(0.25), LN(0.5), LN(0.25)], [LN(0.2), LN(0.2), LN(0.6)]], dtype=torch.float64)
Y = torch.tensor([0, 1])


def logits(seed=0, batch=6, classes=5):
    return 3 * torch.randn(2, batch, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_decoupled_form_has_the_gradients_of_kl():
    """Theorem 1: the square error weighted by p gives KL's gradient in z, the cross-entropy that in z'."""
    clean, adv = (part.clone().requires_grad_() for part in logits())
    expected = torch.autograd.grad(kl_divergence(clean, adv).sum(), (clean, adv))
    p = clean.detach().softmax(1)
    decoupled = weighted_square_error(clean - adv.detach(), p) - (p * adv.log_softmax(1)).sum(1)
    for ours, theirs in zip(torch.autograd.grad(decoupled.sum(), (clean, adv)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_square_error_is_the_sum_over_pairs():
    d, w = logits()[0], logits(1)[0].softmax(1)
    pairs = (d[:, :, None] - d[:, None, :]).square() * w[:, :, None] * w[:, None, :]
    torch.testing.assert_close(weighted_square_error(d, w), pairs.sum((1, 2)) / 4)


def test_the_values_by_hand():
    """Two images of two classes, so that each is its class's mean; temperature 1."""
    ikl = objectives.build({"name": "ikl", "mse": 2, "ce": 3, "temperature": 1})
    loss = ikl.loss(Y, see(ikl, clean=CLEAN, attacked=ATTACKED))
    errors = []
    for p, q in (([0.5, 0.25, 0.25], [0.25, 0.5, 0.25]), ([0.1, 0.6, 0.3], [0.2, 0.2, 0.6])):
        d = [LN(a / b) for a, b in zip(p, q, strict=True)]
        errors.append(sum(p[j] * p[k] * (d[j] - d[k]) ** 2 for j in range(3) for k in range(3)) / 4)
    crossed = [
        -(0.5 * LN(0.25) + 0.25 * LN(0.5) + 0.25 * LN(0.25)), -(0.1 * LN(0.2) + 0.6 * LN(0.2) + 0.3 * LN(0.6))
    ]  # fmt: skip
    expected = {
        "clean": (-LN(0.5) - LN(0.6)) / 2, "square_error": 2 * sum(errors) / 2, "soft_labels": 3 * sum(crossed) / 2,
    }  # fmt: skip
    assert {name: float(term) for name, term in loss.terms.items()} == pytest.approx(expected)


def test_class_means_are_those_of_the_class_also_for_shares():
    p = torch.tensor([[0.6, 0.4], [0.2, 0.8], [0.1, 0.9]], dtype=torch.float64)
    y = torch.tensor([0, 0, 1])
    expected = torch.tensor([[0.4, 0.6], [0.4, 0.6], [0.1, 0.9]], dtype=torch.float64)
    torch.testing.assert_close(class_means(p, y), expected)
    shares = torch.nn.functional.one_hot(y, 2).double()
    torch.testing.assert_close(class_means(p, shares), expected)


def test_both_predictions_are_moved_by_the_square_error_and_only_the_attacked_one_by_soft_labels():
    clean, adv = (part.clone().requires_grad_() for part in logits())
    ikl = objectives.build("ikl")
    terms = ikl.loss(torch.arange(6) % 5, see(ikl, clean=clean, attacked=adv)).terms
    moved = torch.autograd.grad(terms["square_error"], (clean, adv), retain_graph=True)
    torch.testing.assert_close(moved[0], -moved[1])
    assert moved[0].abs().max() > 0
    assert torch.autograd.grad(terms["soft_labels"], clean, allow_unused=True)[0] is None


@pytest.mark.parametrize("fields", [{"mse": -1}, {"ce": -1}, {"temperature": 0}, {"label_smoothing": 1}])
def test_impossible_weights_are_refused(fields):
    with pytest.raises(UserError, match=f"{next(iter(fields))} must"):
        objectives.build({"name": "ikl", **fields})
