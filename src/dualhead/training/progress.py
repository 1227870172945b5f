"""A run's messages to those who watch it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


class TrainingProgress(Protocol):
    """Told of each stage, step and epoch; nothing it does changes the run."""

    def stage(self, name: str, number: int, stages: int, epochs: int, steps: int, done: int) -> None:
        """Take note that a stage begins or goes on.

        Args:
            name: name of the stage.
            number: number of the stage, from 1.
            stages: their number.
            epochs: its length.
            steps: steps an epoch.
            done: steps of the stage done already.
        """

    def step(self, epoch: int, loss: Tensor) -> None:
        """Take note of a step, in an epoch counted from 1. Reading the loss (scalar) waits for the device."""

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Take note of an epoch: the line that goes to `metrics.jsonl`."""


class Silent:
    """Tells nobody."""

    def stage(self, name: str, number: int, stages: int, epochs: int, steps: int, done: int) -> None:
        """See `TrainingProgress.stage`."""

    def step(self, epoch: int, loss: Tensor) -> None:
        """See `TrainingProgress.step`."""

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """See `TrainingProgress.epoch`."""
