"""Cost of a run, from a few steps of each stage in a folder that is thrown away."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from dualhead.models import write_state
from dualhead.recipe import Recipe
from dualhead.runs.crafted import without_poison
from dualhead.runs.measure import forward_flops
from dualhead.runs.prepare import Prepared, prepare
from dualhead.runs.stages import train_one
from dualhead.system.modes import in_eval_mode
from dualhead.training import Silent

STEPS: Final = 4
"""Steps of a stage that are tried; the first, which is also counted, is not timed."""


@dataclass(frozen=True)
class StageCost:
    """Expected cost of a stage.

    Args:
        name: of the stage.
        epochs: its length.
        steps: steps an epoch.
        forward_equivalents: of all its steps, in forward passes of one image through the base model.
        seconds: of all its steps on this machine as busy as it is; None where an epoch has one step alone.
    """

    name: str
    epochs: int
    steps: int
    forward_equivalents: float
    seconds: float | None


@dataclass(frozen=True)
class Trial:
    """Expected cost of the steps of all stages; validation and the evaluation come on top.

    Args:
        stages: one by one; a stage that chooses parameters without training is none of them.
        device: where the steps were tried.
    """

    stages: tuple[StageCost, ...]
    device: str

    @property
    def forward_equivalents(self) -> float:
        """Return the cost of all stages."""
        return sum(stage.forward_equivalents for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """Return the time of all stages; None if that of one is not known."""
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if len(known) == len(self.stages) else None

    def describe(self) -> dict[str, Any]:
        """Return the costs as JSON values."""
        return {
            "device": self.device,
            "forward_equivalents": round(self.forward_equivalents, 1),
            "seconds": None if self.seconds is None else round(self.seconds, 1),
            "stages": [
                {
                    "stage": stage.name, "epochs": stage.epochs, "steps_an_epoch": stage.steps,
                    "forward_equivalents": round(stage.forward_equivalents, 1),
                    "seconds": None if stage.seconds is None else round(stage.seconds, 1),
                }
                for stage in self.stages
            ],
        }  # fmt: skip


class _Watch(Silent):
    """Counts steps and takes their times."""

    def __init__(self) -> None:
        self.steps = 0
        self.times: list[float] = []

    def stage(self, name: str, number: int, stages: int, epochs: int, steps: int, done: int) -> None:
        """See `TrainingProgress.stage`."""
        self.steps = steps

    def step(self, epoch: int, loss: Tensor) -> None:
        """See `TrainingProgress.step`."""
        float(loss)  # waits for the device
        self.times.append(time.monotonic())

    def enough(self) -> bool:
        """Tell whether enough steps, or all of an epoch, are done."""
        return len(self.times) >= min(STEPS, self.steps)


def trial(recipe: Recipe) -> Trial:
    """Try a few steps of each stage, and tell what all of them would cost. Nothing is kept.

    Raises:
        UserError: for bad data, or a network that does not fit them, as `train` would.
        RunError: if the steps fail.
    """
    with tempfile.TemporaryDirectory() as place:
        poison = recipe.data.poison
        if poison is not None and poison.needs_surrogate:  # it costs the victim nothing
            recipe = without_poison(recipe)
        prepared = prepare(recipe, Path(place) / "run")
        with in_eval_mode(prepared.model):
            unit = forward_flops(prepared, prepared.model)
        stages = []
        for number, stage in enumerate(recipe.stages):
            if stage.trains and stage.epochs:
                stages.append(_tried(prepared, number, unit))
            for which in ("best", "last"):  # later stages learn from what this one would have kept
                write_state(prepared.model.state_dict(), prepared.folder.weights(stage.name, which))
        return Trial(tuple(stages), str(prepared.device))


def _tried(prepared: Prepared, number: int, unit: int) -> StageCost:
    stage, watch = prepared.recipe.stages[number], _Watch()
    flops = train_one(prepared, number, watch, watch.enough)
    times = watch.times
    pace = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
    count = stage.epochs * watch.steps
    return StageCost(
        stage.name, stage.epochs, watch.steps, count * flops / unit, None if pace is None else count * pace
    )
