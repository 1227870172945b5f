"""Attacks of the quick suite: the probability margin, targets by MALT."""

from __future__ import annotations

import pytest
import torch

from dualhead.attacks import Query, attacks, losses
from dualhead.attacks.apgd import APGDT
from dualhead.attacks.apgd_malt import APGDMALT
from dualhead.threats.lp import ThreatModel
from helpers.attacks import images, linear_problem, network, run, streams

LINF, L2 = ThreatModel("Linf", 8 / 255), ThreatModel("L2", 0.3)
BOTH = pytest.mark.parametrize("threat", [LINF, L2], ids=["Linf", "L2"])


def test_the_probability_margin_is_the_papers():
    z = torch.tensor([[2.0, 1.0, -1.0], [0.0, 3.0, 1.0]], requires_grad=True)
    y = torch.tensor([0, 2])
    exponentials = z.detach().exp()
    expected = torch.stack(
        [
            (exponentials[0, 1] - exponentials[0, 0]) / exponentials[0].sum(),
            (exponentials[1, 1] - exponentials[1, 2]) / exponentials[1].sum(),
        ]
    )
    found = losses.probability_margin(z, y)
    torch.testing.assert_close(found.detach(), expected)
    # Its slope weighs the logit margin's by probabilities: that of p_1 - p_0 in z_k is p_1 (1{k=1} - p_1) and so on.
    p = z.detach().softmax(1)[0]
    slope = torch.stack([p[1] * (float(k == 1) - p[k]) - p[0] * (float(k == 0) - p[k]) for k in range(3)])
    torch.testing.assert_close(torch.autograd.grad(found[0], z)[0][0], slope)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("name", ["apgd-pm-20", {"name": "apgd-malt", "steps": 20, "targets": 1}])
def test_on_linear_models_fools_just_outside_the_margin_and_not_inside(name, norm, classes):
    """One target is enough for MALT: on a linear model the nearest boundary comes first."""
    model, x, y, margin = linear_problem(norm, classes, near=min(classes, 3))
    for factor, fooled in ((0.98, False), (1.02, True)):
        for row in range(len(x)):
            one, threat = slice(row, row + 1), ThreatModel(norm, factor * margin[row].item())
            x_adv = attacks.build(name)(model, x[one], y[one], threat, generator=streams(1))
            assert (model(x_adv).argmax(1) != y[one]).item() == fooled


@BOTH
def test_malt_ranks_by_the_gap_over_the_dual_norm_of_the_gradients_difference(threat):
    model, x = network(), images(4)
    clean = model(x)
    y = clean.argmax(1)
    (part,) = APGDMALT(steps=2, targets=4, candidates=6).parts(10, threat)
    state = part.begin(x, y, clean, torch.zeros_like(y), threat, streams(4))
    for _ in range(6):
        state = part.step(state, Query(model), threat)
    for row in range(4):
        point = x[row : row + 1].requires_grad_()
        logits = model(point)[0]
        others = [k for k in logits.argsort(descending=True).tolist() if k != y[row]][:6]
        distances = []
        for k in others:
            gap = logits[y[row]] - logits[k]
            (slope,) = torch.autograd.grad(gap, point, retain_graph=True)
            distances.append((gap / slope.norm(p=1 if threat.norm == "Linf" else 2)).item())
        expected = [others[place] for place in torch.tensor(distances).argsort().tolist()]
        assert state["order"][row].tolist() == expected
        assert state["target"][row] == expected[0]


@BOTH
def test_each_ascent_of_malt_is_apgd_towards_its_target(threat):
    """After the ranking, iterates are those of `apgd-t` with the same start and target."""
    model, x = network(), images(3)
    clean = model(x)
    y = clean.argmax(1)
    (part,) = APGDMALT(steps=8, targets=3, candidates=5).parts(10, threat)
    draws, query = streams(3), Query(model)
    state = part.begin(x, y, clean, torch.zeros_like(y), threat, draws)
    for _ in range(5):
        state = part.step(state, query, threat)
    for number in range(3):
        alone = APGDT(steps=8).begin(x, y, clean, torch.full_like(y, number), threat, draws)
        alone["target"] = state["order"][:, number].clone()
        for _ in range(9):
            torch.testing.assert_close(state["iterate"], alone["iterate"], rtol=0, atol=0)
            assert torch.equal(state["target"], alone["target"])
            state, alone = part.step(state, query, threat), APGDT(steps=8).step(alone, query, threat)
    assert query.forward_passes == query.backward_passes + 0 == 3 * (5 + 2 * 3 * 9)


def test_malt_pays_for_its_candidates_and_its_targets():
    model, x = network(classes=5), images(3)
    (part,) = APGDMALT(steps=4, targets=9).parts(5, LINF)
    assert (part.targets, part.candidates, part.jobs(5)) == (4, 4, 1)
    _, query = run(part, model, x, model(x).argmax(1), LINF, streams(3))
    assert query.forward_passes == query.backward_passes == 3 * (4 + 4 * 5)


def test_the_quick_suite_says_that_it_is_not_autoattack():
    suite = attacks.build("autoattack-quick")
    ce, malt, pm = suite.parts(200, LINF)
    assert [ce.label, malt.label, pm.label] == ["apgd-ce", "apgd-malt", "apgd-pm"]
    assert (malt.targets, malt.candidates) == (3, 50)
    assert "upper bound" in suite.notes(200)[0]
    assert "autoattack" in suite.notes(200)[0]
