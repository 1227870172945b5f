"""The buffers of a network, which stay the same tensors whatever its forward does.

Layers that others wrote often assign a new tensor, `self.mean = 0.9 * self.mean + ...`. Copies of the network that
share its tensors, averages of them, and whoever puts a dropped step back hold on to the old one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Slot(NamedTuple):
    """Where a buffer lies, and the tensor that is to lie there."""

    module: nn.Module
    name: str
    tensor: Tensor


def slots(modules: Iterable[nn.Module]) -> list[Slot]:
    """Return the buffers of modules, each module's own."""
    return [
        Slot(module, name, tensor)
        for module in modules
        for name, tensor in module._buffers.items()
        if tensor is not None
    ]


@torch.no_grad()
def settle(held: Sequence[Slot]) -> None:
    """Put values that a forward has assigned as new tensors into the tensors that were there."""
    for module, name, tensor in held:
        now = module._buffers[name]
        if now is not None and now is not tensor and now.shape == tensor.shape:
            tensor.copy_(now)
            module._buffers[name] = tensor
