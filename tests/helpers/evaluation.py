"""A small trained classifier on patterns, and ways to watch and interrupt an evaluation of it."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor, nn

from dualhead.evaluation import Evaluation, Verdicts
from dualhead.threats.lp import ThreatModel

THREAT = ThreatModel("Linf", "16/255")
COLUMNS = ("robust", "distance", "part", "job", "steps", "margin", "prediction")


def patterns(count: int, classes: int = 4, side: int = 8, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images uint8 [count, 3, side, side] of noisy class patterns, and labels."""
    generator = torch.Generator().manual_seed(1)
    prototypes = torch.rand(classes, 3, side, side, generator=generator)
    generator.manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    noise = torch.rand(count, 3, side, side, generator=generator)
    return (0.35 * prototypes[labels] + 0.65 * noise).mul(255).round().to(torch.uint8), labels


@functools.cache
def trained(classes: int = 4) -> nn.Module:
    """A convolutional network with batch norm that has learnt the patterns; shared, so leave it as it is."""
    images, labels = patterns(512, classes, seed=7)
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, classes),
        )
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        for step in range(80):
            rows = torch.arange(step * 64, step * 64 + 64) % 512
            loss = nn.functional.cross_entropy(model(images[rows].float() / 255), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval()


def evaluation_of(clean: int, robust: int, n: int = 200, attack: str = "pgd-40") -> Evaluation:
    """An evaluation of which the first so many images are right, clean and attacked."""
    right = np.arange(n)
    none = np.full(n, -1)
    verdicts = Verdicts(right < robust, np.full(n, np.nan), none, none, none, np.full(n, np.nan), none)
    results = {"threat": {"norm": "Linf", "eps": 0.03}}
    labels = np.zeros(n, dtype=np.int64)
    return Evaluation(np.arange(n), labels, np.where(right < clean, 0, 1), {attack: verdicts}, results)


def assert_same(first, second) -> None:
    """Equal verdicts, to the last bit of distances and margins."""
    assert first.verdicts.keys() == second.verdicts.keys()
    for name, verdict in first.verdicts.items():
        for column in COLUMNS:
            one, other = getattr(verdict, column), getattr(second.verdicts[name], column)
            np.testing.assert_array_equal(one, other, err_msg=f"{name} {column}")


class Bright(nn.Module):
    """Class 1 for bright images."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.new_full((len(x),), 0.5), x.mean((1, 2, 3))], 1)


class StoppedError(Exception):
    """Raised in the midst of an evaluation."""


class StopAfter:
    """A progress that interrupts after a number of calls, and writes down what it was told."""

    def __init__(self, calls: int = -1) -> None:
        self.calls = calls
        self.told: list[tuple[str, int, int, float]] = []

    def update(self, attack: str, done: int, total: int, robust_so_far: float) -> None:
        self.told.append((attack, done, total, robust_so_far))
        if len(self.told) == self.calls:
            raise StoppedError
