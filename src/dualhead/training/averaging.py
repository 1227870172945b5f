"""Averages of the weights over training: what validation sees and what is kept, in place of the live weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dualhead.components.fields import Real, at_least
from dualhead.components.registry import Registry
from dualhead.errors import UserError
from dualhead.system.modes import kept_modes
from dualhead.system.processes import group

BatchNormMode = Literal["average", "reestimate"]


class Averaging(ABC):
    """How weights are averaged.

    Statistics of batch norm belong to weights: those of the live weights do not fit the average. They are either
    averaged as the weights are (`average`), or estimated anew with the averaged weights (`reestimate`), on clean
    augmented training images, when the average is about to be used. Other buffers that are not floats are the live
    ones.
    """

    registered_name: ClassVar[str]
    batch_norm: BatchNormMode
    batches: int
    """Most batches of training images for an estimate of the statistics."""

    @abstractmethod
    def share(self, updates: Tensor) -> Tensor:
        """Return the share of the live weights in the next average, float scalar in (0, 1].

        Args:
            updates: averages taken so far, int64 scalar.
        """

    @abstractmethod
    def after_step(self) -> bool:
        """Whether every step is averaged; else the end of an epoch is."""

    def starts(self, epoch: int) -> bool:
        """Whether the average is taken in an epoch, counted from 0."""
        del epoch
        return True


averagings: Registry[Averaging] = Registry("average", "dualhead.training.averaging", Averaging)


def _check(batches: int) -> None:
    at_least(1, "batches", batches)


@averagings.register("ema")
@dataclass(frozen=True)
class EMA(Averaging):
    """Exponential moving average over steps, w <- t w + (1 - t) w_live with t = min(decay, (1 + s) / (10 + s)).

    s is the number of averages before (Gowal et al. 2020, arXiv 2010.03593, section 4.4; the warm-up is TensorFlow's).

    Args:
        decay: in [0, 1); 0.995 is usual for runs of 10^4 steps. It forgets in about 1 / (1 - decay) steps.
        batch_norm: `average` or `reestimate` the statistics.
        batches: for an estimate, at least 1.
    """

    decay: Real = 0.995
    batch_norm: BatchNormMode = "average"
    batches: int = 100

    def __post_init__(self) -> None:
        _check(self.batches)
        if not 0 <= self.decay < 1:
            raise UserError(f"decay must lie in [0, 1), got {self.decay:g}; 0.995 is usual")

    def share(self, updates: Tensor) -> Tensor:
        """1 - t."""
        return 1.0 - torch.clamp((1.0 + updates) / (10.0 + updates), max=self.decay)

    def after_step(self) -> bool:
        """Yes."""
        return True


@averagings.register("swa")
@dataclass(frozen=True)
class SWA(Averaging):
    """Stochastic weight averaging: the plain mean of the weights at the ends of epochs (Izmailov et al. 2018).

    Before it begins, validation sees the live weights.

    Args:
        start: finished epochs before the first that counts, at least 0; usually the first drop of the rate.
        batch_norm: `average` or `reestimate` the statistics.
        batches: for an estimate, at least 1.
    """

    start: int = 0
    batch_norm: BatchNormMode = "reestimate"
    batches: int = 100

    def __post_init__(self) -> None:
        _check(self.batches)
        at_least(0, "start", self.start)

    def share(self, updates: Tensor) -> Tensor:
        """1 / (n + 1)."""
        return 1.0 / (updates + 1.0)

    def after_step(self) -> bool:
        """No: after an epoch."""
        return False

    def starts(self, epoch: int) -> bool:
        """From `start` on."""
        return epoch >= self.start


class WeightAverage:
    """The running average of what a stage trains.

    Args:
        model: with the parts that train set to ask for gradients, and to run in training mode under `.train()`.
        averaging: how.
    """

    def __init__(self, model: nn.Module, averaging: Averaging) -> None:
        self.averaging = averaging
        self._model = model
        model.train()
        moving = {id(b) for m in model.modules() if m.training for b in m.buffers(recurse=False)}
        live: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # A mean with -inf in it, as in the mask of an attention, would be NaN.
        finite = {n: b for n, b in model.named_buffers() if b.is_floating_point() and bool(b.isfinite().all())}
        live |= {name: buffer for name, buffer in finite.items() if id(buffer) in moving}
        self._live = {name: tensor.detach() for name, tensor in live.items()}
        self._mean = {name: tensor.clone() for name, tensor in self._live.items()}
        device = next(iter(self._live.values())).device
        self._updates = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, taken: Tensor | None = None) -> None:
        """Take the live weights in.

        Args:
            taken: bool scalar; where it is False nothing changes, as after a step that was dropped. None: True.
        """
        share = self.averaging.share(self._updates)
        if taken is not None:
            share = torch.where(taken, share, 0.0)
        first = (self._updates == 0) & (share > 0)  # the first average is the live weights, to the bit
        means, live = list(self._mean.values()), list(self._live.values())
        steps = torch._foreach_sub(live, means)
        torch._foreach_mul_(steps, share)
        torch._foreach_add_(means, steps)
        for mean, value in zip(means, live, strict=True):
            torch.where(first, value, mean, out=mean)
        self._updates += 1 if taken is None else taken.to(torch.int64)

    @property
    def exists(self) -> bool:
        """Whether anything has been averaged."""
        return bool(self._updates > 0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the averaged weights; the live ones, to the bit, afterwards."""
        if not self.exists:
            yield
            return
        kept = {name: tensor.clone() for name, tensor in self._live.items()}
        self._put(self._mean)
        try:
            yield
        finally:
            self._put(kept)

    def reestimate(self, passes: Iterable[Callable[[], Any]]) -> None:
        """Estimate the statistics of batch norm for the averaged weights, as plain means over batches.

        Args:
            passes: forward passes of batches through the model, without a graph; the average decides how many are run.
        """
        layers = [m for m in self._model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        names = {id(buffer): name for name, buffer in self._model.named_buffers() if name in self._mean}
        layers = [layer for layer in layers if id(layer.running_mean) in names]
        if not self.exists or not layers:
            return
        # Layers of tied heads may share their statistics: those are the mean over the passes of all of them.
        shared = {id(layer.running_mean): self._updates.new_zeros(()) for layer in layers}
        with self.in_place(), kept_modes(self._model), torch.no_grad():
            momenta = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
            self._model.eval()
            for layer in layers:
                layer.num_batches_tracked = shared[id(layer.running_mean)]
                layer.momentum = None  # torch's word for the plain mean
                layer.train()
            for _, run in zip(range(self.averaging.batches), passes, strict=False):
                run()
            estimates: dict[int, Tensor] = {}
            for layer, (momentum, counter) in zip(layers, momenta, strict=True):
                for kind in ("running_mean", "running_var"):
                    statistic = layer.get_buffer(kind)
                    estimates[id(statistic)] = self._mean[names[id(statistic)]]
                    estimates[id(statistic)].copy_(statistic)
                layer.momentum, layer.num_batches_tracked = momentum, counter
            torch._foreach_div_(list(estimates.values()), group().world)
            group().sum_(list(estimates.values()))

    def state_dict(self) -> dict[str, Tensor]:
        """All that determines what comes next."""
        return {"updates": self._updates, **{f"mean.{name}": mean for name, mean in self._mean.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self._updates.copy_(state["updates"])
        for name, mean in self._mean.items():
            mean.copy_(state[f"mean.{name}"])

    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, tensor in self._live.items():
            tensor.copy_(values[name])
