"""`dualhead.fit` as a program of its own, twice in a row, for torchrun or alone: `fit_job.py FOLDER [other]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn

import dualhead
from dualhead.data import load_split

RECIPE = {
    "name": "plain",
    "data": {"validation": 20},
    "threat": {"norm": "Linf", "eps": 0.1},
    "validation": {"attack": "pgd-1"},
    "runtime": {"precision": "float32", "layout": "contiguous", "device": "cpu", "lanes": 1},
    "evaluate": {"attacks": ["pgd-2"], "limit": 16, "gallery": 0},
    "stages": [
        {"name": "main", "train": ["model"], "objective": "sat", "attack": "pgd-2", "epochs": 1, "batch_size": 60}
    ],
}


class Net(nn.Module):
    """One that no other program can import."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.classify = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        logits: torch.Tensor = self.classify(self.features(x))
        return logits


def main(folder: str, other: str = "") -> None:
    """Fit; the first process's weights count, so those of the others may differ."""
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    torch.manual_seed(rank)
    train, test = load_split("digits", "train").first(200 + (rank if other else 0)), load_split("digits", "test")
    for number in range(2):
        made = Path(folder) / str(number)
        dualhead.fit(Net(), (train.images, train.labels), (test.images, test.labels), recipe=RECIPE, run_dir=made)


if __name__ == "__main__":
    main(*sys.argv[1:])
