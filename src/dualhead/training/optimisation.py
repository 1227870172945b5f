"""Optimisers and learning-rate schedules; a schedule is a function of the position, so it has no state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from dualhead.components.fields import Real
from dualhead.components.registry import Registry
from dualhead.errors import UserError


class Optimiser(ABC):
    """Makes a torch optimiser for the parameters that a stage trains."""

    registered_name: ClassVar[str]
    lr: float

    @abstractmethod
    def create(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """An optimiser with one group, whose rate the loop sets to `lr` times the schedule's factor."""


class Schedule(ABC):
    """A learning rate over a stage, as a factor of the optimiser's rate."""

    registered_name: ClassVar[str]

    @abstractmethod
    def factor(self, epoch: float, epochs: int) -> float:
        """The factor at a position.

        Args:
            epoch: epochs done, with fraction, in [0, epochs).
            epochs: length of the stage.
        """


optimisers: Registry[Optimiser] = Registry("optimiser", "dualhead.training.optimisation", Optimiser)
schedules: Registry[Schedule] = Registry("schedule", "dualhead.training.optimisation", Schedule)


@optimisers.register("sgd")
@dataclass(frozen=True)
class SGD(Optimiser):
    """Stochastic gradient descent with momentum.

    Args:
        lr: peak learning rate, greater than 0.
        momentum: in [0, 1).
        nesterov: Nesterov's form of the momentum; the published adversarial training codes use the plain one.
        weight_decay: L2 penalty on all trained parameters, as in the published codes; at least 0.
    """

    lr: Real = 0.1
    momentum: Real = 0.9
    nesterov: bool = True
    weight_decay: Real = 5e-4

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UserError(f"lr must be greater than 0, got {self.lr:g}")
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum must lie in [0, 1), got {self.momentum:g}")
        if self.nesterov and self.momentum == 0:
            raise UserError("nesterov needs momentum greater than 0; set nesterov: false")
        if self.weight_decay < 0:
            raise UserError(f"weight_decay must be at least 0, got {self.weight_decay:g}")

    def create(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """`torch.optim.SGD`, fused where the device has it."""
        optimiser = torch.optim.SGD(
            list(parameters),
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            fused=True,
        )
        if self.momentum > 0:  # else torch leaves it uninitialised where the very first step is skipped
            for parameter in optimiser.param_groups[0]["params"]:
                optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimiser


def _warmed(epoch: float, warmup: float) -> float:
    return min(1.0, epoch / warmup) if warmup > 0 else 1.0


def _check_warmup(warmup: float) -> None:
    if warmup < 0:
        raise UserError(f"warmup must be at least 0 epochs, got {warmup:g}")


@schedules.register("step")
@dataclass(frozen=True)
class Step(Schedule):
    """Constant, divided at milestones.

    Args:
        milestones: epochs after which the rate is multiplied by gamma, ascending.
        gamma: in (0, 1].
        warmup: epochs of linear rise from 0.
    """

    milestones: tuple[int, ...] = ()
    gamma: Real = 0.1
    warmup: Real = 0.0

    def __post_init__(self) -> None:
        _check_warmup(self.warmup)
        if list(self.milestones) != sorted(set(self.milestones)) or any(m < 1 for m in self.milestones):
            raise UserError(f"milestones must be ascending epochs from 1 on, got {list(self.milestones)}")
        if not 0 < self.gamma <= 1:
            raise UserError(f"gamma must lie in (0, 1], got {self.gamma:g}")

    def factor(self, epoch: float, epochs: int) -> float:
        """`gamma` to the power of the milestones passed."""
        del epochs
        return _warmed(epoch, self.warmup) * self.gamma ** sum(epoch >= m for m in self.milestones)


@schedules.register("cyclic")
@dataclass(frozen=True)
class Cyclic(Schedule):
    """One cycle: linear from 0 to the peak, then linear to 0 (Smith 2017; Wong et al. 2020 for adversarial training).

    Args:
        peak: where the peak lies, as a fraction of the stage, in (0, 1).
    """

    peak: Real = 0.4

    def __post_init__(self) -> None:
        if not 0 < self.peak < 1:
            raise UserError(f"peak must lie in (0, 1), got {self.peak:g}")

    def factor(self, epoch: float, epochs: int) -> float:
        """A triangle with its top at `peak`."""
        done = epoch / epochs
        return done / self.peak if done < self.peak else (1.0 - done) / (1.0 - self.peak)


@schedules.register("cosine")
@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from 1 to 0 (Loshchilov and Hutter 2017, without restarts).

    Args:
        warmup: epochs of linear rise from 0 before it, shorter than the stage.
    """

    warmup: Real = 0.0

    def __post_init__(self) -> None:
        _check_warmup(self.warmup)

    def factor(self, epoch: float, epochs: int) -> float:
        """(1 + cos(pi t)) / 2 over what the warm-up leaves."""
        if epoch < self.warmup:
            return epoch / self.warmup
        return 0.5 * (1.0 + math.cos(math.pi * (epoch - self.warmup) / max(epochs - self.warmup, 1e-9)))
