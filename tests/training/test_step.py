"""The training step against the published loops written plainly, and against the least number of passes."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from dualhead.attacks.pgd import PGD
from dualhead.system.arithmetic import Arithmetic
from helpers.training import (
    PARTS,
    THREAT,
    CallCounter,
    attacked,
    batch,
    counting,
    dual_model,
    plain_model,
    stage_of,
    step_of,
    streams_of,
    twins,
)

STEPS, LENGTH, EPS = 10, 2 / 255, THREAT.eps
BASES = {
    "trades": ({"name": "trades", "beta": 6}, "gaussian"),
    "sat": ("sat", "uniform"),
    "mart": ({"name": "mart", "beta": 5}, "uniform"),
}


# ---- the published loops, from their formulas


def start_point(x, start, noise):
    return x + 0.001 * noise if start == "gaussian" else (x + EPS * (2 * noise - 1)).clamp(0, 1)


def ascend(x, x_adv, loss_of):
    for _ in range(STEPS):
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(x_adv), x_adv)
        x_adv = x_adv.detach() + LENGTH * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    return x_adv


def kl_sum(p_logits, q_logits):
    # Both in logarithms: near the clean image the attack takes signs of differences of nearly equal numbers, which
    # another order of the same operations turns around.
    return F.kl_div(F.log_softmax(q_logits, 1), F.log_softmax(p_logits, 1), log_target=True, reduction="sum")


def trades_loss(logits, set_mode, x, y, noise, beta):
    set_mode(False)
    # As published, the clean logits are computed anew in each inner step.
    x_adv = ascend(x, start_point(x, "gaussian", noise), lambda z: kl_sum(logits(x), logits(z)))
    set_mode(True)
    clean, attacked = logits(x), logits(x_adv)
    return F.cross_entropy(clean, y) + beta * kl_sum(clean, attacked) / len(x)


def sat_loss(logits, set_mode, x, y, noise, beta):
    set_mode(False)
    x_adv = ascend(x, start_point(x, "uniform", noise), lambda z: F.cross_entropy(logits(z), y))
    set_mode(True)
    return F.cross_entropy(logits(x_adv), y)


def mart_loss(logits, set_mode, x, y, noise, beta):
    set_mode(False)
    x_adv = ascend(x, start_point(x, "uniform", noise), lambda z: F.cross_entropy(logits(z), y))
    set_mode(True)
    clean, attacked = logits(x), logits(x_adv)
    p, p_adv = F.softmax(clean, 1), F.softmax(attacked, 1)
    rows = torch.arange(len(y))
    wrong = p_adv.clone()
    wrong[rows, y] = 0
    boosted = F.cross_entropy(attacked, y) - torch.log(1.0001 - wrong.max(1).values).mean()
    divergence = F.kl_div(F.log_softmax(attacked, 1), F.log_softmax(clean, 1), log_target=True, reduction="none").sum(1)
    return boosted + beta * (divergence * (1 - p[rows, y])).mean()


LOSSES = {"trades": (trades_loss, 6), "sat": (sat_loss, 0), "mart": (mart_loss, 5)}


def plain_program(model, stage):
    """Logits, mode setter and trained parameters of a stage, spelt out; None: a plain model."""
    if stage is None:
        return model, model.train, list(model.parameters())
    trained = {1: [model.trunk, model.head1], 2: [model.head2], 3: [model.aggregator]}[stage]

    def both_heads(x):
        features = model.trunk(x)
        return torch.stack((model.head1(features), model.head2(features)), 1)

    logits = {
        1: lambda x: model.head1(model.trunk(x)),
        2: lambda x: model.head2(model.trunk(x)),
        3: lambda x: model.aggregator(both_heads(x)),
    }[stage]

    def set_mode(training):
        for part in (model.trunk, model.head1, model.head2, model.aggregator):
            part.train(training and any(part is t for t in trained))

    model.requires_grad_(False)
    for part in trained:
        part.requires_grad_(True)
    return logits, set_mode, [p for part in trained for p in part.parameters()]


def plain_training(model, stage, base, batches, lr):
    logits, set_mode, parameters = plain_program(model, stage)
    optimiser = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)
    loss_of, beta = LOSSES[base]
    for data in batches:
        streams, shape = streams_of(data), data.x.shape[1:]
        noise = streams.normal(*shape) if base == "trades" else streams.uniform(*shape)
        loss = loss_of(logits, set_mode, data.x, data.y, noise, beta)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@pytest.mark.parametrize("stage", [None, 1, 2, 3])
@pytest.mark.parametrize("base", sorted(BASES))
def test_same_weights_as_the_published_loop_after_several_steps(base, stage):
    ours, theirs = twins(plain_model() if stage is None else dual_model())
    batches, lr = [batch(number, 8) for number in range(3)], 0.002 if stage == 3 else 0.01
    objective, start = BASES[base]
    step = step_of(ours, stage_of(objective, ("model",) if stage is None else PARTS[stage], start=start, lr=lr))
    before = flat(ours)
    for data in batches:
        step(data, streams_of(data))
    plain_training(theirs, stage, base, batches, lr)
    moved, apart = flat(ours) - before, flat(ours) - flat(theirs)
    assert (moved != 0).sum() > 100
    # Rounding may turn the sign of a gradient of nearly zero, and with it a pixel of an attacked image.
    assert apart.norm() < 1e-3 * moved.norm()


def flat(model):
    return torch.cat([value.double().flatten() for value in model.state_dict().values() if value.is_floating_point()])


# ---- passes

PASSES = {"trades": (13, 12, 2), "sat": (11, 11, 1), "mart": (12, 12, 2)}
"""Forward passes, backward passes to activations, and backward passes to weights, at 10 inner steps."""
LAYERS = 17
"""Of WRN-10-1: 9 convolutions, 7 batch norms, a linear layer."""
LEAST = {"trades": 27, "sat": 23, "mart": 26}


def counted_step(model, base, parts, **settings):
    objective, start = BASES[base]
    step, data = step_of(model, stage_of(objective, parts, start=start, **settings)), batch(0, 4)
    with counting(model) as kernels:
        step(data, streams_of(data))
    return kernels


@pytest.mark.parametrize("base", sorted(BASES))
def test_a_step_of_a_base_method_takes_the_least_number_of_passes(base):
    kernels = counted_step(plain_model(), base, ("model",))
    first, counted = "conv1", 0
    for layer, forwards in kernels.of("forward").items():
        passes = (forwards, kernels.counts["input_gradient", layer], kernels.counts["weight_gradient", layer])
        if layer == first:  # the loss's backward pass has no need of the gradient of the images
            passes = (passes[0], passes[1] + PASSES[base][2], passes[2])
        if layer == "fc":  # its two products look alike to the dispatcher but for what they multiply
            passes = (passes[0], passes[1], kernels.counts["weight_gradient", "linear"])
        assert passes == PASSES[base], layer
        assert sum(passes) == LEAST[base]
        counted += 1
    assert counted == LAYERS


@pytest.mark.parametrize("base", sorted(BASES))
def test_each_stage_runs_frozen_parts_least_and_never_differentiates_their_weights(base):
    forwards, backwards, losses = PASSES[base]
    frozen_forwards = 10 + losses
    for stage, parts in PARTS.items():
        model = dual_model()
        kernels = counted_step(model, base, parts)
        for layer, count in kernels.of("forward").items():
            part = layer.partition(".")[0]
            inputs, weights = kernels.counts["input_gradient", layer], kernels.counts["weight_gradient", layer]
            if layer in ("aggregator.pair_conv", "aggregator.pair_bn", "aggregator.fc"):  # one map but in training
                assert count == losses, (stage, layer)
                assert layer.endswith("fc") or (inputs, weights) == (losses, losses), (stage, layer)
            elif part in parts:
                linear = layer.endswith("fc")
                assert count == forwards, (stage, layer)
                assert inputs in (backwards, 10), (stage, layer)  # 10 where learning begins
                assert linear or weights == losses, (stage, layer)
            else:
                assert (count, inputs, weights) == (frozen_forwards, 10, 0), (stage, layer)
        assert kernels.counts["weight_gradient", "linear"] == losses
        if stage == 1:
            assert not kernels.of("forward", "head2")
            assert not kernels.of("forward", "aggregator")
        if stage == 2:
            assert not kernels.of("forward", "head1")


def test_stage_3_takes_22_passes_through_the_shared_trunk_network():
    kernels = counted_step(dual_model(), "trades", PARTS[3])
    for layer in kernels.of("forward"):
        if not layer.startswith("aggregator"):
            assert kernels.counts["forward", layer] + kernels.counts["input_gradient", layer] == 22, layer


def test_a_joint_forward_saves_none_of_the_arithmetic_but_runs_each_layer_once_for_the_loss():
    kernels = counted_step(plain_model(), "trades", ("model",), forward="joint")
    layer = "block2.layer.0.conv1"
    assert kernels.counts["forward", layer] == 12
    assert kernels.counts["weight_gradient", layer] == 1


def test_the_trunk_runs_once_per_forward():
    model = dual_model()
    x = batch(0).x
    with CallCounter(trunk=model.trunk, head1=model.head1, head2=model.head2) as calls:
        model(x)
        assert calls == {"trunk": 1, "head1": 1, "head2": 1}
        model.view("mean")(x)
        assert calls == {"trunk": 2, "head1": 2, "head2": 2}
        model.view("head2")(x)
        assert calls == {"trunk": 3, "head1": 2, "head2": 3}


def test_the_attack_computes_no_weight_gradient_although_weights_ask_for_one():
    model = plain_model()
    stage = stage_of("sat", ("model",))
    step, data = step_of(model, stage), batch(0, 4)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with counting(model) as kernels:
        attacked(step, data)
    assert sum(kernels.of("input_gradient").values()) == LAYERS * 10
    assert kernels.of("weight_gradient") == {}


def test_the_counter_sees_weight_gradients_where_an_attack_calls_backward():
    model = plain_model()
    x = batch(0, 4).x.requires_grad_()
    with counting(model) as kernels:
        model(x).sum().backward()
    layers = kernels.of("forward")
    assert len(layers) == LAYERS
    assert all(kernels.counts["weight_gradient", name] == 1 for name in layers if name != "fc")
    assert kernels.counts["weight_gradient", "linear"] == 1


@pytest.mark.parametrize("stage", [None, 1, 2, 3])
@pytest.mark.parametrize("base", ["trades", "sat"])
def test_attacks_in_lanes_train_the_same(base, stage, monkeypatch):
    alone, together = twins(plain_model() if stage is None else dual_model())
    objective, start = BASES[base]
    parts, lr = ("model",) if stage is None else PARTS[stage], 0.002 if stage == 3 else 0.01
    before, names = flat(alone), []
    climb = PGD.maximise
    monkeypatch.setattr(PGD, "maximise", lambda *args: names.append(threading.current_thread().name) or climb(*args))
    for model, lanes in ((alone, 1), (together, 2)):
        short = stage_of(objective, parts, lr=lr).model_copy(update={"attack": PGD(3, 2 / 255, start)})
        step = step_of(model, short, Arithmetic(bf16=False, lanes=lanes))
        for number in range(3):
            step(batch(number, 36), streams_of(batch(number, 36)))
        step(batch(3, 36), streams_of(batch(3, 36)), one_thread=True)
        step(batch(4, 31), streams_of(batch(4, 31)))  # too few for two lanes
    here = threading.current_thread().name
    assert [name == here for name in names] == [True] * 5 + [False] * 6 + [True] * 2
    moved, apart = flat(alone) - before, flat(together) - flat(alone)
    assert (moved != 0).sum() > 100
    assert apart.norm() < 1e-3 * moved.norm()
    for name, parameter in together.named_parameters():
        assert stage is None or parameter.grad is None or name.split(".")[0] in parts, name
