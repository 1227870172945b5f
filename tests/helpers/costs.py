"""Cost of training by a recipe."""

from __future__ import annotations

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
    model = recipe.model.backbone.create(10, (3, 32, 32), Normalize([0.5] * 3, [0.25] * 3))
    if recipe.model.attach_at:
        kind = recipe.model.aggregator
        model = attach_second_head(
            model, recipe.model.attach_at, example=torch.rand(2, 3, 32, 32), heads=recipe.model.heads, aggregator=kind
        )
    data = Batch(torch.arange(2), torch.rand(2, 3, 32, 32), torch.arange(2))
    total = 0.0
    for stage in recipe.stages:
        program = Passes.of(model, stage)
        step = TrainingStep(program, stage, recipe.threat, stage.optimiser.create(program.parameters()), FLOAT32)
        with CountFlops() as counter:
            step(data, Streams.of(0, data.index))
        total += counter.total * stage.epochs
    return total
