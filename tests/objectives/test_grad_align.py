"""GradAlign: the term by hand, its gradient by a loop written down, and the models whose gradients align."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import nn

from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.objectives import objectives
from dualhead.system.flops import CountFlops
from helpers.training import THREAT, batch, dual_model, plain_model, stage_of, step_of, streams_of

FGSM = {"name": "fgsm"}


def build(**settings):
    return objectives.build({"name": "grad_align", **settings})


def test_the_term_is_one_minus_the_cosine_and_an_image_without_a_gradient_adds_nothing():
    angles = torch.tensor([0.0, 90.0, 180.0, 60.0]).deg2rad()
    first = torch.tensor([[3.0, 0.0]]).repeat(5, 1)
    second = torch.cat((torch.stack((angles.cos(), angles.sin()), 1), torch.zeros(1, 2))).requires_grad_()
    seen = {"q": torch.zeros(5, 3), "slope": first, "beside": second}
    loss = build(weight=0.7).loss(torch.zeros(5, dtype=torch.int64), seen)
    assert float(loss.terms["alignment"]) == pytest.approx(0.7 * (0 + 1 + 2 + 0.5 + 0) / 5, rel=1e-6)
    assert float(loss.terms["adversarial"]) == pytest.approx(math.log(3))
    loss.total.backward()
    assert second.grad.isfinite().all()


def by_hand(model, data, weight):
    """Gradients of the weights by the published loop: FGSM in eval mode, then the loss and the cosine in train mode."""

    def slope(x, *, graph):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(x), data.y, reduction="sum"), x, create_graph=graph)[0]

    streams = streams_of(data)
    eta = streams.fork("beside").uniform(*data.x.shape[1:]) * 2 - 1
    beside = (data.x + THREAT.eps * eta).clamp(0, 1)
    model.eval()
    moved = data.x + THREAT.eps * slope(data.x, graph=False).sign()
    attacked = torch.min(torch.max(moved, data.x - THREAT.eps), data.x + THREAT.eps).clamp(0, 1)
    model.train()
    model.zero_grad()
    loss = F.cross_entropy(model(attacked), data.y)
    first, second = slope(data.x, graph=False), slope(beside, graph=True)
    cosine = F.cosine_similarity(first.flatten(1), second.flatten(1))
    (loss + weight * (1 - cosine).mean()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_step_descends_the_published_loop():
    ours, data = plain_model(), batch(0, 8)
    theirs = copy.deepcopy(ours)
    gradients = by_hand(theirs, data, 0.5)
    step = step_of(ours, stage_of({"name": "grad_align", "weight": 0.5}, ("model",), attack=FGSM, lr=1e-30))
    step(data, streams_of(data))
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_without_weight_it_is_its_base_method():
    ours, data = plain_model(), batch(0, 8)
    theirs = copy.deepcopy(ours)
    step_of(ours, stage_of({"name": "grad_align", "weight": 0}, ("model",), attack=FGSM))(data, streams_of(data))
    step_of(theirs, stage_of("sat", ("model",), attack=FGSM))(data, streams_of(data))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_of_a_linear_model_with_two_classes_gradients_align_everywhere():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 10))
    with torch.no_grad():
        model[1].weight[2:], model[1].bias[2:] = 0.0, -100.0  # all but two classes never answer
    data = batch(0, 8)
    data.y.remainder_(2)
    outcome = step_of(model, stage_of("grad_align", ("model",), attack=FGSM))(data, streams_of(data))
    assert abs(float(outcome.terms["alignment"])) < 1e-6


@pytest.mark.parametrize("parts", [("head2",), ("aggregator",), ("trunk", "head1")])
def test_it_trains_parts_of_a_dual_head_network(parts):
    model, data = dual_model(), batch(0, 8)
    before = {name: p.clone() for name, p in model.named_parameters()}
    outcome = step_of(model, stage_of("grad_align", parts, attack=FGSM, lr=0.1))(data, streams_of(data))
    assert float(outcome.terms["alignment"]) > 0
    moved = {name.partition(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(parts)


def test_what_it_costs_is_counted_with_the_second_derivative():
    def flops(objective):
        step, data = step_of(plain_model(), stage_of(objective, ("model",), attack=FGSM)), batch(0, 8)
        with CountFlops() as counter:
            step(data, streams_of(data))
        return counter.total

    assert flops("grad_align") / flops("sat") == pytest.approx(13 / 5, rel=0.05)  # 2 F, 2 F, and 4 F to learn from one


def test_micro_batches_add_up():
    data, found = batch(0, 8), []
    for size in (None, 4):
        model = plain_model().eval()
        stage = stage_of("grad_align", ("model",), attack=FGSM, lr=1e-30, micro_batch=size, batch_norm="frozen")
        step_of(model, stage)(data, Streams.of(7, data.index).fork("attack"))
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)


def test_activations_cannot_be_computed_twice():
    stage = stage_of("grad_align", ("model",), attack=FGSM, checkpoint_activations=True)
    with pytest.raises(UserError, match="checkpoint_activations: not with an objective whose loss sees gradients"):
        step_of(plain_model(), stage)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"weight": -1}, "at least 0"), ({"base": "natural"}, "adversarial"), ({"base": "grad_align"}, "own base method")],
)
def test_impossible_settings_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        build(**settings)
