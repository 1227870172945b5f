"""What can be added to a stage: averages of weights, perturbation of weights, clipping, smoothing of labels."""

from __future__ import annotations

import copy
from statistics import pvariance

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from dualhead.errors import UserError
from dualhead.objectives import objectives
from dualhead.system.flops import CountFlops
from dualhead.training.averaging import EMA, SWA, WeightAverage
from dualhead.training.awp import AWP
from dualhead.training.guard import StepGuard
from helpers.objectives import see
from helpers.resume import outcome, train_until
from helpers.training import PARTS, attacked, batch, dual_model, plain_model, stage_of, step_of, streams_of


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(400, 10))


def copies(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# ---- averages


def test_ema_is_the_recursion_by_hand_on_weights_and_statistics():
    model = small()
    average = WeightAverage(model, EMA(decay=0.3))
    expected, generator = None, torch.Generator().manual_seed(1)
    for s in range(6):
        with torch.no_grad():
            for tensor in (*model.parameters(), model[1].running_mean):
                tensor.add_(torch.randn(tensor.shape, generator=generator))
        average.update()
        live, t = copies(model), min(0.3, (1 + s) / (10 + s))
        expected = live if s == 0 else {k: t * expected[k] + (1 - t) * live[k] for k in live}
    live = copies(model)
    with average.in_place():
        for name, value in model.state_dict().items():
            assert torch.allclose(value.double(), expected[name].double(), atol=1e-6), name
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())


def test_swa_is_the_plain_mean():
    model = small()
    average, seen = WeightAverage(model, SWA()), []
    for _ in range(5):
        with torch.no_grad():
            model[3].weight.add_(torch.rand(10, 400))
        average.update()
        seen.append(model[3].weight.clone())
    with average.in_place():
        assert torch.allclose(model[3].weight, torch.stack(seen).mean(0), atol=1e-6)


def test_a_dropped_step_is_not_averaged():
    model = small()
    average = WeightAverage(model, EMA(decay=0.9))
    average.update(torch.tensor(True))
    before = {name: value.clone() for name, value in average.state_dict().items()}
    with torch.no_grad():
        model[3].weight.add_(1.0)
    average.update(torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in average.state_dict().items())


def test_nothing_averaged_yet_means_the_live_weights():
    model = small()
    average, live = WeightAverage(model, SWA(start=3)), copies(model)
    with average.in_place():
        assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())


def test_reestimated_statistics_are_the_mean_over_batches_under_the_averaged_weights():
    model = small()
    average = WeightAverage(model, SWA(batches=3))
    for _ in range(2):
        with torch.no_grad():
            model[0].weight.add_(torch.rand_like(model[0].weight))
        average.update()
    live, images = copies(model), [torch.rand(8, 3, 12, 12) for _ in range(4)]
    average.reestimate([lambda x=x: model(x) for x in images])
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())
    with average.in_place(), torch.no_grad():
        outputs = [model[0](x) for x in images[:3]]
        assert torch.allclose(model[1].running_mean, torch.stack([z.mean((0, 2, 3)) for z in outputs]).mean(0))
        variances = torch.stack([z.var((0, 2, 3)) for z in outputs]).mean(0)
        assert torch.allclose(model[1].running_var, variances, atol=1e-6)
    assert model[1].momentum == 0.1


def test_reestimated_statistics_of_two_heads_and_the_papers_aggregator_are_those_of_torch():
    model = dual_model()
    average = WeightAverage(model, SWA(batches=3))
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.rand_like(parameter))
        average.update()
    images = [torch.rand(8, 3, 12, 12) for _ in range(3)]
    average.reestimate([lambda x=x: model(x) for x in images])
    with average.in_place():
        theirs = copy.deepcopy(model)
        torch.optim.swa_utils.update_bn(images, theirs)
        for name, value in theirs.state_dict().items():
            if name.endswith(("running_mean", "running_var")):
                torch.testing.assert_close(model.state_dict()[name], value, msg=name)


def test_frozen_parts_are_not_averaged():
    model = dual_model()
    model.set_trainable({"head2"})
    average = WeightAverage(model, EMA())
    assert {name.split(".")[1] for name in average.state_dict() if name.startswith("mean.")} == {"head2"}


def test_ema_lowers_the_variance_of_the_last_epochs():
    """Its known effect: SGD at a constant rate jumps about its goal, the average does not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 20, generator=generator)
    y = x @ torch.randn(20, generator=generator) + torch.randn(512, generator=generator)
    model = nn.Linear(20, 1)
    nn.init.zeros_(model.weight)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.03)
    average, live, averaged = WeightAverage(model, EMA(decay=0.99)), [], []
    for step in range(600):
        rows = torch.randint(512, (8,), generator=generator)
        optimiser.zero_grad()
        F.mse_loss(model(x[rows])[:, 0], y[rows]).backward()
        optimiser.step()
        average.update()
        if step >= 400 and step % 10 == 0:
            with torch.no_grad():
                live.append(float(F.mse_loss(model(x)[:, 0], y)))
            with average.in_place(), torch.no_grad():
                averaged.append(float(F.mse_loss(model(x)[:, 0], y)))
    assert pvariance(averaged) < 0.1 * pvariance(live)
    assert max(averaged) < min(live)


INGREDIENTS = {
    "ema, awp, clipping, micro-batches": [
        "stages.*.average=ema", "stages.*.micro_batch=16", "stages.*.awp={start: 1}", "stages.*.clip_norm=0.5",
    ],
    "swa": ["stages.*.average={name: swa, start: 1, batches: 2}"],
}  # fmt: skip


@pytest.mark.slow  # with `make bits`
@pytest.mark.parametrize("name", INGREDIENTS)
def test_stopped_at_steps_a_run_with_the_ingredient_goes_on_bit_for_bit(name, tmp_path):
    assert train_until(tmp_path / "whole", lambda: False, *INGREDIENTS[name])
    asked = []

    def every_fourth():
        asked.append(None)
        return len(asked) % 4 == 0

    while not train_until(tmp_path / "stopped", every_fourth, *INGREDIENTS[name]):
        pass
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_what_is_kept_is_the_average(tmp_path):
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    assert train_until(plain, lambda: False)
    assert train_until(averaged, lambda: False, "stages.*.average={name: ema, decay: 0.9}")
    first = "checkpoints/main_head/last.safetensors"
    assert outcome(plain)["weights"][first] != outcome(averaged)["weights"][first]
    losses = [
        [line["loss"] for line in outcome(f)["metrics"] if line["stage"] == "main_head"] for f in (plain, averaged)
    ]
    assert losses[0] == losses[1]  # the live weights went the same way


# ---- perturbation of weights


def test_awp_moves_a_linear_model_as_the_closed_form_says():
    model = nn.Linear(6, 4)
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
    F.cross_entropy(model(x), y).backward()
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    p = (x @ weight.T + bias).softmax(1)
    gradient = (p - F.one_hot(y, 4)).T @ x / 5
    with AWP(gamma=0.01).ascended(list(model.parameters())):
        expected = weight + 0.01 * weight.norm() * gradient / gradient.norm()
        assert torch.allclose(model.weight, expected, atol=1e-6)
        assert torch.equal(model.bias, bias)
        assert F.cross_entropy(model(x), y) > F.cross_entropy(x @ weight.T + bias, y)
    assert torch.equal(model.weight, weight)


def test_a_step_with_awp_descends_by_the_gradient_at_the_perturbed_weights_and_moves_statistics_once():
    ours, theirs = plain_model(), None
    theirs = copy.deepcopy(ours)
    data = batch(0, 8)
    stage = stage_of("sat", ("model",), lr=0.01, awp={"gamma": 0.05, "start": 0})
    step = step_of(ours, stage)
    step.begin(0)
    reference = step_of(theirs, stage_of("sat", ("model",), lr=0.01))
    x_adv = attacked(reference, data)
    step(data, streams_of(data))

    theirs.train()
    proxy = copy.deepcopy(theirs)
    F.cross_entropy(proxy(x_adv), data.y).backward()
    shifts = []
    for p, q in zip(theirs.parameters(), proxy.parameters(), strict=True):
        shift = 0.05 * q.norm() * q.grad / q.grad.norm() if q.dim() > 1 else torch.zeros_like(q)
        shifts.append(shift)
        p.data += shift
    optimiser = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    F.cross_entropy(theirs(x_adv), data.y).backward()
    for p, shift in zip(theirs.parameters(), shifts, strict=True):
        p.data -= shift
    optimiser.step()
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-5), name


def test_awp_leaves_frozen_parts_alone():
    model = dual_model()
    stage = stage_of({"name": "trades", "beta": 3}, PARTS[2], awp={"start": 0})
    step = step_of(model, stage)
    step.begin(0)
    before = copies(model)
    step(batch(0, 8), streams_of(batch(0, 8)))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("head2.")), name


@pytest.mark.parametrize(
    ("objective", "start", "least"), [("sat", "uniform", (23, 26)), ("trades", "gaussian", (27, 33))]
)
def test_the_cost_of_awp_is_counted_from_the_epoch_on_where_it_begins(objective, start, least):
    model, data = plain_model(), batch(0, 4)
    step = step_of(model, stage_of(objective, ("model",), start=start, awp={"start": 2}))
    costs = []
    for epoch, changes in ((0, False), (1, False), (2, True), (3, False)):
        assert step.begin(epoch) is changes
        with CountFlops() as counter:
            step(data, streams_of(data))
        costs.append(counter.total)
    assert costs[0] == costs[1] < costs[2] == costs[3]
    with CountFlops() as forward, torch.no_grad():
        model(data.x)
    for cost, passes in ((costs[0], least[0]), (costs[2], least[1])):
        # The loss's backward pass saves the gradient of the images, and no more.
        assert passes - 1 < cost / forward.total <= passes


# ---- clipping, smoothing


def test_a_longer_gradient_is_shortened_to_the_norm_and_a_shorter_one_is_left():
    for clip, long in ((0.5, True), (1e6, False)):
        model = small()
        optimiser = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
        guard = StepGuard(model, optimiser, clip)
        guard.remember()
        loss = model(torch.rand(8, 3, 12, 12)).square().mean()
        loss.backward()
        gradients = torch.cat([p.grad.flatten().clone() for p in model.parameters()])
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        guard.step(loss)
        moved = before - torch.cat([p.detach().flatten() for p in model.parameters()])
        assert (gradients.norm() > clip) == long
        assert torch.allclose(moved, gradients * min(1.0, clip / float(gradients.norm())), atol=1e-5)


@pytest.mark.parametrize("name", ["sat", "natural", "trades", "ikl", "hybrid"])
def test_label_smoothing_is_the_mixture_of_the_label_and_all_classes(name):
    torch.manual_seed(0)
    logits, y = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    objective = objectives.build({"name": name, "label_smoothing": 0.1})
    loss = objective.loss(y, see(objective, clean=logits, attacked=logits))
    # Hybrid training smooths the labels of clean and of attacked images, which are the same here.
    term = loss.total if name == "hybrid" else loss.terms["adversarial" if name == "sat" else "clean"]
    minus_log = -logits.log_softmax(1)
    by_hand = 0.9 * minus_log[torch.arange(6), y].mean() + 0.1 * minus_log.mean()
    assert float(term) == pytest.approx(float(by_hand))
    with pytest.raises(UserError, match=r"label_smoothing must lie in \[0, 1\), got 1"):
        objectives.build({"name": name, "label_smoothing": 1})
