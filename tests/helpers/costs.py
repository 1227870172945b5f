"""Cost of training by a recipe."""

from __future__ import annotations

from functools import cache

import torch

from dualhead.data import Batch
from dualhead.heads import attach_second_head
from dualhead.models import Normalize
from dualhead.noise import Streams
from dualhead.system.arithmetic import FLOAT32
from dualhead.system.flops import CountFlops
from dualhead.training import Passes
from dualhead.training.step import TrainingStep


def training_cost(recipe):
    """Floating-point operations for two images of 32x32, from one small step of each stage; 10 classes."""
    steps = [_of_a_step(recipe.model, recipe.threat, stage.model_copy(update={"epochs": 1})) for stage in recipe.stages]
    return sum(flops * stage.epochs for flops, stage in zip(steps, recipe.stages, strict=True))


@cache  # many recipes of a study differ in their lengths alone
def _of_a_step(network, threat, stage):
    model = network.backbone.create(10, (3, 32, 32), Normalize([0.5] * 3, [0.25] * 3))
    if network.attach_at:
        example, kind = torch.rand(2, 3, 32, 32), network.aggregator
        model = attach_second_head(model, network.attach_at, example=example, heads=network.heads, aggregator=kind)
    data = Batch(torch.arange(2), torch.rand(2, 3, 32, 32), torch.arange(2))
    program = Passes.of(model, stage)
    step = TrainingStep(program, stage, threat, stage.optimiser.create(program.parameters()), FLOAT32)
    with CountFlops() as counter:
        step(data, Streams.of(0, data.index))
    return counter.total
