"""Training and evaluation mode of modules, put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def kept_modes(*roots: nn.Module) -> Iterator[None]:
    """Put each module's own mode back at the end, whatever sets it inside."""
    modes = [(module, module.training) for root in roots for module in root.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, and each module's own mode back at the end."""
    with kept_modes(model):
        model.eval()
        yield


def hold_statistics(model: nn.Module) -> None:
    """Put batch norm in eval mode: it uses its running statistics and leaves them; scale and shift still learn."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.eval()
