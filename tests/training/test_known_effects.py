"""What an ingredient is published to do, seen in small adversarial training on digits, over seeds."""

from __future__ import annotations

from itertools import pairwise
from statistics import mean

import pytest
import torch

from dualhead.attacks import attacks
from dualhead.data import Loader, Split, load_split
from dualhead.models import Normalize, backbones
from dualhead.noise import Streams
from dualhead.system.arithmetic import FLOAT32
from dualhead.system.modes import in_eval_mode
from dualhead.threats.lp import ThreatModel
from dualhead.training import Passes
from dualhead.training.averaging import EMA, WeightAverage
from dualhead.training.step import TrainingStep
from helpers.training import stage_of

THREAT = ThreatModel("Linf", 0.15)
ATTACK = {"name": "pgd", "steps": 4, "step_size": 0.075, "start": "uniform"}
SEEDS = range(3)


def some(part, count):
    whole = load_split("digits", part)
    return Split(whole.images[:count], whole.labels[:count], whole.class_names)


def robust_accuracy(model, split):
    x, y = split.images.float() / 255, split.labels
    with in_eval_mode(model):
        streams = Streams.of(0, torch.arange(len(y))).fork("test")
        x_adv = attacks.build("pgd-10")(model, x, y, THREAT, generator=streams)
        with torch.no_grad():
            return float((model(x_adv).argmax(1) == y).float().mean())


def training(seed, training_set, epochs, lr, **settings):
    """Standard adversarial training at a constant rate: the model, and after each step the number of the epoch."""
    torch.manual_seed(seed)
    model = backbones.build("cnn-8").create(10, tuple(training_set.image_shape), Normalize([0.3], [0.4]))
    stage = stage_of("sat", ("model",), lr=lr, attack=attacks.build(ATTACK), **settings)
    program = Passes.of(model, stage)
    step = TrainingStep(program, stage, THREAT, stage.optimiser.create(program.parameters()), FLOAT32)
    loader = Loader(training_set, 64, seed=seed, device="cpu")

    def run():
        for epoch in range(epochs):
            step.begin(epoch)
            for batch in loader.epoch(epoch):
                step(batch, Streams.of(seed, batch.index).fork("attack", epoch))
                yield epoch

    return model, run()


@pytest.mark.slow  # about 30 s
def test_awp_lowers_the_robust_generalisation_gap():
    """Wu et al. 2020, figure 1: robust accuracy on training images falls towards that on test images, which rises."""
    few, test = some("train", 192), some("test", 200)
    gaps: dict[float, list[float]] = {0.0: [], 0.02: []}
    tests: dict[float, list[float]] = {0.0: [], 0.02: []}
    for seed in SEEDS:
        for gamma, own in gaps.items():
            awp = {"awp": {"gamma": gamma, "start": 5}} if gamma else {}
            model, steps = training(seed, few, 40, 0.05, **awp)
            for _ in steps:
                pass
            tests[gamma].append(robust_accuracy(model, test))
            own.append(robust_accuracy(model, few) - tests[gamma][-1])
        assert gaps[0.02][-1] < gaps[0.0][-1]
    assert mean(gaps[0.02]) < mean(gaps[0.0]) - 0.05
    assert mean(tests[0.02]) > mean(tests[0.0])


@pytest.mark.slow  # about 20 s
def test_ema_steadies_robust_accuracy_over_the_last_epochs():
    """At a constant rate the live weights jump about from epoch to epoch; their average does not, and is better."""
    train, test = some("train", 256), some("test", 200)
    jumps: dict[str, list[float]] = {"live": [], "averaged": []}
    for seed in SEEDS:
        model, steps = training(seed, train, 24, 0.1)
        average, last = WeightAverage(model, EMA(decay=0.95)), 0
        seen: dict[str, list[float]] = {"live": [], "averaged": []}
        for epoch in steps:
            average.update()
            if epoch > last and epoch >= 14:
                seen["live"].append(robust_accuracy(model, test))
                with average.in_place():
                    seen["averaged"].append(robust_accuracy(model, test))
            last = epoch
        for name, values in seen.items():
            jumps[name].append(mean(abs(after - before) for before, after in pairwise(values)))
        assert mean(seen["averaged"]) > mean(seen["live"])
    assert mean(jumps["averaged"]) < 0.6 * mean(jumps["live"])
