"""Adversarial weight perturbation (AWP; Wu, Xia, Wang 2020, NeurIPS, arXiv 2004.05884)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import nn

from dualhead.components.fields import Real
from dualhead.components.sections import Section


class AWP(Section):
    """The gradient of a step is taken where the loss is higher: at weights moved against it.

    Each trained tensor w with more than one dimension moves by gamma ||w|| g / ||g||, g being the gradient of the loss
    on the attacked batch (equations 7 and 8, one step); biases and batch norm stay. The weights come back to the bit
    before the optimiser steps. It costs the loss's passes once more: 6 forward equivalents with TRADES, 3 with SAT.
    """

    gamma: Real = Field(0.005, gt=0)
    """Length of the step as a share of each tensor's norm; 0.01 with SAT and 0.005 with TRADES, as published."""
    start: int = Field(10, ge=0)
    """Finished epochs before the first that is perturbed."""

    @contextmanager
    def ascended(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Move the weights along the gradients in `.grad` while inside."""
        moved = [p for p in parameters if p.dim() > 1 and p.grad is not None]
        before = [p.detach().clone() for p in moved]
        with torch.no_grad():
            for p in moved:
                assert p.grad is not None
                p.add_(p.grad * (self.gamma * p.norm() / (p.grad.norm() + 1e-20)))
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(moved, before, strict=True):
                    p.copy_(value)
