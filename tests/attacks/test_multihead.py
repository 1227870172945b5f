"""The adaptive attack on several heads: what it climbs, where it begins, and that masking does not stop it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from dualhead.attacks import Query, attacks, losses
from dualhead.attacks.multihead import MultiHead, _weights
from dualhead.attacks.pgd import PGD
from dualhead.errors import UserError
from dualhead.threats.lp import ThreatModel
from helpers.attacks import images, network, run, run_staggered, streams

LINF, L2 = ThreatModel("Linf", 8 / 255), ThreatModel("L2", 0.3)
BOTH = pytest.mark.parametrize("threat", [LINF, L2], ids=["Linf", "L2"])
PARTS = pytest.mark.parametrize("part", range(3), ids=["apgd-ce", "apgd-t", "pgd"])


class Heads(nn.Module):
    """Networks and a function of their logits [B, H, C]."""

    def __init__(self, aggregate=lambda z: z.mean(1), heads=2, classes=5):
        super().__init__()
        self.heads = nn.ModuleList(network(classes, seed=seed) for seed in range(heads))
        self.aggregate = aggregate

    def outputs(self, x):
        z = torch.stack([head(x) for head in self.heads], 1)
        return torch.cat((z, self.aggregate(z)[:, None]), 1)

    def forward(self, x):
        return self.outputs(x)[:, -1]


def chain(part, heads=2, **fields):
    return attacks.build({"name": "multihead", **fields}).parts(5, LINF, heads)[part]


def test_ascents_cover_the_aggregate_each_head_and_sums():
    table = _weights(3, torch.device("cpu"))
    assert torch.equal(table[0], torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert torch.equal(table[1:4], torch.eye(4)[:3])
    assert torch.equal(table[-1], table[0])
    assert ((table.sum(1) - 1).abs() < 1e-6).sum() == len(table) - 1  # one row stands for weights of the sample's own


def test_the_sums_are_of_all_heads_and_of_all_heads_and_the_aggregate():
    table = _weights(3, torch.device("cpu"))
    torch.testing.assert_close(table[4], torch.tensor([1.0, 1.0, 1.0, 0.0]) / 3)
    torch.testing.assert_close(table[5], torch.ones(4) / 4)
    assert torch.equal(table[6], torch.zeros(4))


@BOTH
def test_the_margin_is_climbed_in_steps_as_long_as_those_of_pgd(threat):
    assert chain(2, steps=6).first_step(threat) == pytest.approx(PGD(steps=6).step_length(threat))


@BOTH
def test_the_margin_is_climbed_by_plain_pgd(threat):
    model, x = Heads(), images(4)
    y, search, states = model(x).argmax(1), chain(2, steps=6), []
    run(
        search, model, x, y, threat, streams(4), outputs=model.outputs,
        watch=lambda state: states.append({k: v.clone() for k, v in state.items()}),
    )  # fmt: skip
    for before, after in pairwise(states[:7]):  # the first ascent, which is on the aggregate
        z = before["iterate"].requires_grad_()
        (gradient,) = torch.autograd.grad(losses.margin(model(z), y).sum(), z)
        step = threat.ascend(z.detach(), gradient, search.first_step(threat))
        torch.testing.assert_close(after["iterate"], threat.project(step, x), rtol=0, atol=1e-5)


def test_own_weights_are_uniform_over_those_that_sum_to_one():
    x = images(4000, 1, 1, 1)
    begun = chain(0).begin(x, torch.zeros(4000, dtype=torch.int64), torch.zeros(4000, 5), torch.zeros(4000).long(),
                           LINF, streams(4000))  # fmt: skip
    # Of three shares, uniform on the simplex: each has mean 1/3 and mean square 2 / (3 * 4).
    assert begun["own_weights"].mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=0.02)
    assert begun["own_weights"].square().mean().item() == pytest.approx(1 / 6, abs=0.005)


@PARTS
@BOTH
def test_each_ascent_climbs_its_weighted_loss_from_the_best_point_so_far(part, threat):
    model, x = Heads(), images(4)
    y, search, states = model(x).argmax(1), chain(part, steps=6, targets=2), []
    final, query = run(
        search, model, x, y, threat, streams(4), outputs=model.outputs,
        watch=lambda state: states.append({k: v.clone() for k, v in state.items()}),
    )  # fmt: skip
    states.append(final)
    table = _weights(2, x.device)
    assert query.forward_passes == query.backward_passes == 4 * 7 * len(table) == 4 * search.max_steps()
    for ascent, weights in enumerate(table):
        first, second = states[7 * ascent], states[7 * ascent + 1]
        if ascent > 0:
            assert torch.equal(first["iterate"], first["adversarial"])
            assert torch.equal(first["step_size"], torch.full((4,), search.first_step(threat)))
        rows = weights if weights.sum() > 0 else final["own_weights"]
        outputs = model.outputs(first["iterate"])
        each = torch.stack([search.loss(outputs[:, k], y, first["target"]) for k in range(3)], 1)
        torch.testing.assert_close(second["best_loss"], (rows * each).sum(1))
    looked_at = torch.stack([state["iterate"] for state in states[:-1]])
    margins = torch.stack([losses.margin(model(z), y) for z in looked_at])
    safe = ~final["found"]
    assert torch.equal(final["found"], (margins > 0).any(0))
    torch.testing.assert_close(final["margin"][safe], margins.amax(0)[safe])
    torch.testing.assert_close(losses.margin(model(final["adversarial"]), y), final["margin"])
    assert (final["own_weights"].sum(1) - 1).abs().amax() < 1e-5
    assert (threat.distance(final["adversarial"], x) <= threat.eps + 1e-6).all()


def rounded(z):
    """Differences of 0.5 in the mean are all that it sees, so its gradient is zero everywhere."""
    return torch.round(z.mean(1) * 2) / 2


def saturated(z):
    """Its logits are flat wherever the heads agree clearly."""
    return torch.tanh(50.0 * (z.mean(1) - z.mean(1).amax(1, keepdim=True) + 0.01))


@pytest.mark.parametrize("aggregate", [rounded, saturated])
def test_an_aggregate_that_masks_its_gradient_does_not_stop_it(aggregate):
    model, x, threat = Heads(aggregate), images(24, seed=5), ThreatModel("Linf", 12 / 255)
    plain = Heads()
    y = model(x).argmax(1)
    keep = plain(x).argmax(1) == y
    x, y = x[keep], y[keep]

    def robust(name, target):
        query = Query(target, target.outputs)
        x_adv = attacks.build(name).search(query, x, y, threat, streams(len(x)))
        return (target(x_adv).argmax(1) == y).float().mean().item()

    masked, adaptive, unmasked = robust("apgd-ce", model), robust("multihead-10", model), robust("apgd-ce", plain)
    assert masked > unmasked + 0.2
    assert adaptive < masked - 0.2
    assert adaptive < unmasked + 0.1


@PARTS
@BOTH
def test_a_samples_result_does_not_depend_on_when_it_starts_or_on_its_neighbours(part, threat):
    model, x, search = Heads(), images(5), chain(part, steps=2, restarts=2, targets=2)
    y, job = model(x).argmax(1), torch.arange(5) % search.jobs(5)
    together = run_staggered(search, model, x, y, threat, streams(5), job=job, slots=3, outputs=model.outputs)
    for row in range(5):
        one = slice(row, row + 1)
        alone = streams(5)[torch.tensor([row])]
        state, _ = run(search, model, x[one], y[one], threat, alone, job=job[one], outputs=model.outputs)
        torch.testing.assert_close(together["adversarial"][one], state["adversarial"], rtol=0, atol=1e-5)
        assert together["found"][row] == state["found"]


def test_any_number_of_heads_from_two():
    model, x = Heads(heads=3), images(3)
    y = model(x).argmax(1)
    x_adv = MultiHead(steps=2)(model, x, y, LINF, generator=streams(3), outputs_fn=model.outputs)
    assert (LINF.distance(x_adv, x) <= LINF.eps).all()


def test_one_head_is_refused():
    model, x = network(5), images(2)
    with pytest.raises(UserError, match="2 heads"):
        MultiHead()(model, x, model(x).argmax(1), LINF, generator=streams(2))
    with pytest.raises(UserError, match="heads"):
        run(chain(0), model, x, model(x).argmax(1), LINF, streams(2))


def test_impossible_values_are_refused():
    for field in ("steps", "targets", "restarts", "rho"):
        with pytest.raises(UserError, match=field):
            attacks.build({"name": "multihead", field: 0})
