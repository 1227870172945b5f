"""Training as a program of its own, one of several processes, to be started by torchrun or by a test, and killed."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import helpers.new_methods  # noqa: F401  # registers them
from dualhead.recipe.yaml import load_recipe
from dualhead.runs.run import train
from dualhead.system.processes import joined

STAGES = (
    "data.train_limit=122", "data.validation=26", "data.augment=[flip]", "validation.attack.steps=2",
    "model.attach_at=relu1", "model.aggregator=linear", "model.normalize=none",
    "stages.*.batch_size=32", "stages.*.epochs=2", "stages.*.attack.steps=2", "stages.*.keep=last",
    "evaluate={attacks: [pgd-2], limit: 24}", "runtime.device=cpu", "runtime.save_minutes=1e-9",
)  # fmt: skip
"""Three stages of two epochs of three steps, with a state after every step. 26 held-out images, so shares differ."""


def network(norm: Callable[[], nn.Module], num_classes: int) -> nn.Sequential:
    """Two convolutions, each followed by a norm, and a linear layer."""
    layers = {
        "conv1": nn.Conv2d(1, 8, 3), "norm1": norm(), "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(8, 8, 3, stride=2), "norm2": norm(), "relu2": nn.ReLU(),
        "flat": nn.Flatten(), "fc": nn.Linear(32, num_classes),
    }  # fmt: skip
    return nn.Sequential(OrderedDict(layers))


class Frozen(nn.BatchNorm2d):
    """Batch norm that goes by the statistics it has, which are not its defaults."""

    def __init__(self) -> None:
        super().__init__(8)
        self.running_mean.fill_(0.1)
        self.running_var.fill_(2.0)
        self.training = False

    def train(self, mode: bool = True) -> Frozen:
        """Stays in eval mode."""
        return super().train(False)


def plain(num_classes: int) -> nn.Module:
    """Without batch norm."""
    return network(nn.Identity, num_classes)


def frozen(num_classes: int) -> nn.Module:
    """With batch norm that is frozen."""
    return network(Frozen, num_classes)


def normed(num_classes: int) -> nn.Module:
    """With batch norm that trains."""
    return network(lambda: nn.BatchNorm2d(8), num_classes)


def start(folder: str, words: list[str]) -> None:
    """Train in a folder, in the group of processes that the environment names."""
    torch.set_num_threads(1)
    with joined():
        train(load_recipe("digits", [*STAGES, *words]), run_dir=folder)


def start_as(rank: int, world: int, port: int, folder: str, words: list[str], fault: dict[str, str]) -> None:
    """One process of a group, as torchrun would start it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **fault)
    start(folder, words)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_group(world: int, folder: Path, *words: str) -> list[int | None]:
    """Train in so many processes; their exit statuses."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_job"])
    port = free_port()
    group = [context.Process(target=start_as, args=(r, world, port, str(folder), words, {})) for r in range(world)]
    for process in group:
        process.start()
    for process in group:
        process.join(240)
    return [process.exitcode for process in group]


if __name__ == "__main__":
    start(sys.argv[1], sys.argv[2:])
