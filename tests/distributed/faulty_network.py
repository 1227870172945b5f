"""A network that gives no finite numbers now and then, in the second of two processes only."""

from __future__ import annotations

import os

import torch
import training_job
from torch import Tensor, nn


class Sometimes(nn.Module):
    """Its gradient is not finite in every fifth pass that is differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        """The input, as it is or with a gradient that is not finite."""
        if not (self.training and torch.is_grad_enabled()) or os.environ.get("RANK") != "1":
            return x
        self.passes += 1
        return x * float("nan") if self.passes % 5 == 0 else x


def sometimes(num_classes: int) -> nn.Module:
    """A network that trains in spite of it."""
    return training_job.network(Sometimes, num_classes)
