"""Small networks, batches, and counts of kernels for tests of training."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dualhead.attacks import attacks
from dualhead.data import Batch
from dualhead.heads import DualHeadClassifier, attach_second_head
from dualhead.models import Normalize, backbones
from dualhead.noise import Streams
from dualhead.system.arithmetic import FLOAT32, Arithmetic
from dualhead.threats.lp import ThreatModel
from dualhead.training import Passes, Stage
from dualhead.training.step import TrainingStep

THREAT = ThreatModel("Linf", 8 / 255)
CLASSES = 10
PARTS = {1: ("trunk", "head1"), 2: ("head2",), 3: ("aggregator",)}
"""What each of the method's stages trains."""


def plain_model(backbone: str = "wideresnet-10-1", *, seed: int = 0) -> nn.Module:
    """A network with batch norm whose statistics are not at their defaults."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = backbones.build(backbone).create(CLASSES, (3, 12, 12), Normalize([0.5] * 3, [0.25] * 3))
        _settle(model)
    return model


def dual_model(backbone: str = "wideresnet-10-1", *, seed: int = 0, heads: int = 2) -> DualHeadClassifier:
    """The same with a second head, or more, and the paper's aggregator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = backbones.build(backbone)
        base = model.create(CLASSES, (3, 12, 12), Normalize([0.5] * 3, [0.25] * 3))
        dual = attach_second_head(
            base, model.attach_at, example=torch.rand(2, 3, 12, 12), heads=heads, aggregator="pairwise_cnn"
        )
        _settle(dual)
    return dual


def _settle(model: nn.Module) -> None:
    model.train()
    for _ in range(6):
        model(torch.rand(16, 3, 12, 12))


def batch(number: int, size: int = 16) -> Batch:
    """The number-th of a series of batches; pixels stay clear of the faces of the box by more than the start noise."""
    generator = torch.Generator().manual_seed(1000 + number)
    x = 0.01 + 0.98 * torch.rand(size, 3, 12, 12, generator=generator)
    y = torch.randint(0, CLASSES, (size,), generator=generator)
    return Batch(torch.arange(number * size, (number + 1) * size), x, y)


def streams_of(data: Batch) -> Streams:
    """The randomness of a batch's step."""
    return Streams.of(7, data.index).fork("attack")


def stage_of(
    objective: object, parts: tuple[str, ...], *, start: str = "uniform", lr: float = 0.05, **settings: object
) -> Stage:
    """A stage with the attack of the published settings: 10 steps of 2/255."""
    attack = attacks.build({"name": "pgd", "steps": 10, "step_size": 2 / 255, "start": start})
    optimiser = {"name": "sgd", "lr": lr, "nesterov": False, "weight_decay": 5e-4}
    values = {"name": "stage", "train": parts, "objective": objective, "attack": attack, "epochs": 1}
    return Stage.model_validate({"optimiser": optimiser, **values, **settings})


def step_of(model: nn.Module, stage: Stage, arithmetic: Arithmetic = FLOAT32) -> TrainingStep:
    """The training step of a stage."""
    passes = Passes.of(model, stage)
    return TrainingStep(passes, stage, THREAT, stage.optimiser.create(passes.parameters()), arithmetic)


def attacked(step: TrainingStep, data: Batch) -> Tensor:
    """What a step's attack makes of a batch."""
    return step._make(data, streams_of(data), {})[0]["attacked"]


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Two independent copies."""
    return copy.deepcopy(model), copy.deepcopy(model)


class CallCounter:
    """Counts forward calls of modules, by the names given to them."""

    def __init__(self, **modules: nn.Module) -> None:
        self.calls: Counter[str] = Counter()
        self._handles = [
            module.register_forward_pre_hook(lambda *_, name=name: self.calls.update([name]))
            for name, module in modules.items()
        ]

    def __enter__(self) -> Counter[str]:
        return self.calls

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


class KernelCounter(TorchDispatchMode):
    """Counts what convolutions, batch norms and linear layers compute, by the memory of their weights.

    `counts[kind, name]`: kind is `forward`, `input_gradient` or `weight_gradient`, name that of the layer.

    Args:
        model: whose layers are counted.
        images: in a batch: over them a linear layer's weight gradient is summed.
    """

    def __init__(self, model: nn.Module, images: int) -> None:
        super().__init__()
        self._images = images
        self.counts: Counter[tuple[str, str]] = Counter()
        self._names = {
            module.weight.data_ptr(): name
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear | nn.BatchNorm1d | nn.BatchNorm2d)
        }

    def of(self, kind: str, prefix: str = "") -> dict[str, int]:
        """Counts of a kind, by layer."""
        return {n: c for (k, n), c in sorted(self.counts.items()) if k == kind and n.startswith(prefix)}

    def _note(self, weight: Tensor, **done: bool) -> None:
        name = self._names.get(weight.data_ptr())
        if name is not None:
            self.counts.update([(kind, name) for kind, happened in done.items() if happened])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name == "aten::convolution":
            self._note(args[1], forward=True)
        elif name == "aten::convolution_backward":
            mask = args[10]
            self._note(args[2], input_gradient=mask[0], weight_gradient=mask[1] or mask[2])
        elif name == "aten::native_batch_norm":
            self._note(args[1], forward=True)
        elif name == "aten::native_batch_norm_backward":
            mask = args[9]
            self._note(args[2], input_gradient=mask[0], weight_gradient=mask[1] or mask[2])
        elif name == "aten::addmm":
            self._note(args[2], forward=True)
        elif name == "aten::mm":  # a linear layer's backward: gradient x weight, or gradient^T x input
            self._note(args[1], input_gradient=True)
            if args[1].data_ptr() not in self._names and len(args[1]) == self._images:
                self.counts.update([("weight_gradient", "linear")])
        return func(*args, **(kwargs or {}))


@contextmanager
def counting(model: nn.Module, images: int = 4):
    """Counts kernels of everything inside."""
    counter = KernelCounter(model, images)
    with counter:
        yield counter
