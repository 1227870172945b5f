"""Activation checkpointing (Chen et al. 2016): blocks forget what they computed, and compute it again when needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint

from dualhead.training.buffers import settle, slots


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the smallest modules that hold at least two layers with weights, such as residual blocks."""
    inside = [block for child in model.children() for block in blocks(child)]
    if inside:
        return inside
    layers = sum(isinstance(module, _ConvNd | nn.Linear) for module in model.modules())
    return [model] if layers >= 2 else []


@contextmanager
def recomputed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let modules keep only their inputs while inside; the backward pass runs their forward once more.

    Results are the same to the bit. Buffers, which a forward pass may move (batch norm), move once only.
    """
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = _forgetful(module, module.forward)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _forgetful(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        contexts = lambda: (nullcontext(), still_buffers(module))  # noqa: E731  # an argument, not a function to name
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return run


@contextmanager
def still_buffers(module: nn.Module) -> Iterator[None]:
    """Let forward passes move buffers (statistics of batch norm) while inside, and put them back at the end."""
    held = slots(module.modules())
    before = [slot.tensor.clone() for slot in held]
    try:
        yield
    finally:
        settle(held)
        for (*_, buffer), value in zip(held, before, strict=True):
            buffer.copy_(value)
