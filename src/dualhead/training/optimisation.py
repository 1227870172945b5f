"""Optimisers and learning-rate schedules; a schedule is a function of the position, so it has no state."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn

from dualhead.components.fields import Real, above, at_least, parse_real
from dualhead.components.registry import Registry
from dualhead.errors import UserError

Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]
"""Parameters, or groups of them, as `torch.optim` takes them."""
LR_SCALE = "lr_scale"
"""Entry of a group: what its learning rate is multiplied by; none: 1."""


class Optimiser(ABC):
    """Makes a torch optimiser for the parameters that a stage trains."""

    registered_name: ClassVar[str]
    lr: float

    @abstractmethod
    def create(self, parameters: Parameters) -> torch.optim.Optimizer:
        """Make an optimiser, whose rate the loop sets to `lr` times the schedule's factor and each group's `lr_scale`.

        Args:
            parameters: of the parts that learn; with the stage's `layer_decay` groups of them, each with an `lr_scale`.
        """


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

    def in_epochs(self, steps: int) -> Self:
        """Return the schedule with all lengths in epochs, given the steps of an epoch; itself if it has no others."""
        del steps
        return self


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
        above(0, "lr", self.lr)
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum must lie in [0, 1), got {self.momentum:g}")
        if self.nesterov and self.momentum == 0:
            raise UserError("nesterov needs momentum greater than 0; set nesterov: false")
        at_least(0, "weight_decay", self.weight_decay)

    def create(self, parameters: Parameters) -> torch.optim.Optimizer:
        """`torch.optim.SGD`, fused where the device has it."""
        optimiser = torch.optim.SGD(
            _groups(parameters),
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            fused=True,
        )
        return _at_rest(optimiser) if self.momentum > 0 else optimiser


@optimisers.register("adamw")
@dataclass(frozen=True)
class AdamW(Optimiser):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), what transformers are trained with.

    Args:
        lr: peak learning rate, greater than 0.
        betas: decay rates of the means of gradients and of their squares, each in [0, 1).
        eps: added to the denominator, greater than 0.
        weight_decay: at least 0; each step takes it times the learning rate off the weights.
        decay: what it is taken off: `all`, or `matrices`, as is usual for transformers: not biases, scales of
            normalisation layers, and other vectors such as a class token.
        amsgrad: keep the maximum of the second moments (Reddi et al. 2018).
    """

    lr: Real = 1e-3
    betas: tuple[Real, Real] = (0.9, 0.999)
    eps: Real = 1e-8
    weight_decay: Real = 0.01
    decay: Literal["all", "matrices"] = "all"
    amsgrad: bool = False

    def __post_init__(self) -> None:
        above(0, "lr", self.lr)
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise UserError(f"betas must lie in [0, 1), got {beta:g}")
        above(0, "eps", self.eps)
        at_least(0, "weight_decay", self.weight_decay)

    def create(self, parameters: Parameters) -> torch.optim.Optimizer:
        """`torch.optim.AdamW`, fused where the device has it."""
        groups = _groups(parameters)
        return torch.optim.AdamW(
            _vectors_apart(groups) if self.decay == "matrices" else groups,
            lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, amsgrad=self.amsgrad,
            fused=True,
        )  # fmt: skip


def _at_rest(optimiser: torch.optim.SGD) -> torch.optim.SGD:
    """Give SGD a momentum of 0, which torch would leave uninitialised where the very first step is skipped."""
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimiser


def _groups(parameters: Parameters) -> list[dict[str, Any]]:
    given: list[Any] = list(parameters)
    if given and isinstance(given[0], dict):
        return [dict(group) for group in given]
    return [{"params": given}]


def _vectors_apart(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Split groups into tensors of several dimensions, and others, which have no weight decay."""
    split: list[dict[str, Any]] = []
    for group in groups:
        vectors = [p for p in group["params"] if sum(size > 1 for size in p.shape) < 2]
        known = set(map(id, vectors))
        matrices = [p for p in group["params"] if id(p) not in known]
        split += [{**group, "params": matrices}] if matrices else []
        split += [{**group, "params": vectors, "weight_decay": 0.0}] if vectors else []
    return split


_OWN_KEYS = ("params", "lr", "fused", "foreach", "capturable", "differentiable", "maximize")
"""Arguments of torch's optimisers that are not a recipe's: the recipe has `lr`, and the others are up to the loop."""


@optimisers.register("torch", text="optimiser")
@dataclass(frozen=True)
class TorchOptimiser(Optimiser):
    """Any optimiser of `torch.optim` by its name: `torch:NAdam`.

    It is fused where torch offers that. The others cost a wait for the device at each step, since only fused ones can
    skip a step whose gradients are not finite without being asked.

    Args:
        optimiser: name of a class of `torch.optim`, such as Adam, NAdam, RMSprop or Adagrad. Those that cannot train a
            network by one gradient a step are refused (LBFGS, SparseAdam, Muon alone).
        lr: peak learning rate, greater than 0.
        options: further arguments of that class, such as `{betas: [0.9, 0.99]}`; those left out are torch's own.
    """

    optimiser: str
    lr: Real = 1e-3
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        above(0, "lr", self.lr)
        known = [key for key in inspect.signature(self._class()).parameters if key not in _OWN_KEYS]
        for key in self.options:
            if key not in known:
                near = get_close_matches(key, known, n=1)
                hint = "it is set by the recipe" if key in _OWN_KEYS else f"known: {', '.join(known)}"
                hint = f"did you mean {near[0]!r}?" if near else hint
                raise UserError(f"options.{key}: {self.optimiser} has no such option; {hint}")
        tried = [nn.Parameter(torch.ones(shape)) for shape in ((2,), (2, 2), (2, 2, 1, 1))]
        for parameter in tried:
            parameter.grad = torch.ones_like(parameter)
        try:
            self.create(tried).step()
        except Exception as error:  # torch's word for values that are out of range, or tensors it does not take
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"{self.optimiser} cannot be used so: {reason}") from None

    def _class(self) -> type[torch.optim.Optimizer]:
        found = getattr(torch.optim, self.optimiser, None)
        classes = [
            name for name, value in vars(torch.optim).items()
            if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
            and value is not torch.optim.Optimizer and name not in ("LBFGS", "SparseAdam")
        ]  # fmt: skip
        if self.optimiser in ("LBFGS", "SparseAdam"):
            why = (
                "needs sparse gradients" if self.optimiser == "SparseAdam" else "evaluates the loss again in each step"
            )
            raise UserError(f"optimiser: {self.optimiser} {why}; use one of {', '.join(sorted(classes))}")
        if self.optimiser not in classes or found is None:
            near = get_close_matches(self.optimiser.lower(), [name.lower() for name in classes], n=1)
            hint = next((f"did you mean {name!r}? " for name in classes if near and name.lower() == near[0]), "")
            raise UserError(
                f"optimiser: torch.optim has no {self.optimiser!r} in torch {torch.__version__}; {hint}"
                f"known: {', '.join(sorted(classes))}"
            )
        kind: type[torch.optim.Optimizer] = found
        return kind

    def create(self, parameters: Parameters) -> torch.optim.Optimizer:
        """An optimiser of that class."""
        made: Any = self._class()
        options = {key: _number(value) for key, value in self.options.items()}
        # A dampened momentum cannot begin at 0, as torch does not dampen the first gradient: the host is asked then.
        if "fused" in inspect.signature(made).parameters and not options.get("dampening"):
            options["fused"] = True
        optimiser: torch.optim.Optimizer = made(_groups(parameters), lr=self.lr, **options)
        if isinstance(optimiser, torch.optim.SGD) and options.get("momentum") and "fused" in options:
            return _at_rest(optimiser)
        return optimiser


def _number(value: Any) -> Any:
    """Read numbers in the forms that recipes know (`1e-3`, `8/255`), lists of them as tuples; leave all else."""
    if isinstance(value, list | tuple):
        return tuple(map(_number, value))
    if isinstance(value, str):
        try:
            return parse_real(value)
        except UserError:
            return value
    return value


def _warmed(epoch: float, warmup: float) -> float:
    return min(1.0, epoch / warmup) if warmup > 0 else 1.0


def _check_warmup(warmup: float, warmup_steps: int) -> None:
    if not warmup >= 0:
        raise UserError(f"warmup must be at least 0 epochs, got {warmup:g}")
    at_least(0, "warmup_steps", warmup_steps)
    if warmup and warmup_steps:
        raise UserError("warmup (in epochs) and warmup_steps say the same thing; leave one out")


@schedules.register("step")
@dataclass(frozen=True)
class Step(Schedule):
    """Constant, divided at milestones.

    Args:
        milestones: epochs after which the rate is multiplied by gamma, ascending.
        gamma: in (0, 1].
        warmup: epochs of linear rise from 0.
        warmup_steps: the same in steps, in place of `warmup`.
    """

    milestones: tuple[int, ...] = ()
    gamma: Real = 0.1
    warmup: Real = 0.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check_warmup(self.warmup, self.warmup_steps)
        if list(self.milestones) != sorted(set(self.milestones)) or any(m < 1 for m in self.milestones):
            raise UserError(f"milestones must be ascending epochs from 1 on, got {list(self.milestones)}")
        if not 0 < self.gamma <= 1:
            raise UserError(f"gamma must lie in (0, 1], got {self.gamma:g}")

    def in_epochs(self, steps: int) -> Self:
        """Return the schedule with its warm-up in epochs."""
        return replace(self, warmup=self.warmup + self.warmup_steps / steps, warmup_steps=0)

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
        warmup_steps: the same in steps, in place of `warmup`.
    """

    warmup: Real = 0.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check_warmup(self.warmup, self.warmup_steps)

    def in_epochs(self, steps: int) -> Self:
        """Return the schedule with its warm-up in epochs."""
        return replace(self, warmup=self.warmup + self.warmup_steps / steps, warmup_steps=0)

    def factor(self, epoch: float, epochs: int) -> float:
        """(1 + cos(pi t)) / 2 over what the warm-up leaves."""
        if epoch < self.warmup:
            return epoch / self.warmup
        return 0.5 * (1.0 + math.cos(math.pi * (epoch - self.warmup) / max(epochs - self.warmup, 1e-9)))
