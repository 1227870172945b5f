"""Types and checks common to the ways of cutting a model."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dualhead.system.generators import kept_generators
from dualhead.system.modes import kept_modes

How = Literal["own", "sequential", "traced", "functional", "whole"]

Features = Any
"""Features that cross a cut: a tensor, or a tuple of tensors."""


class CannotCut(Exception):  # noqa: N818  # a way of cutting does not apply; the next one is tried
    """This way of cutting does not serve here; the message is a clause that says why."""


def reason(error: Exception) -> str:
    """Return a model's error in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class Cut:
    """A model cut in two: `tail(trunk(x))` equals its logits.

    Both keep the model's own parameter names, so that their state dicts together are the model's. They are copies:
    nothing done to them reaches the model.

    The ways of cutting: `own`, the model's own `split`; `sequential`; `traced`, a torch.fx trace of the containers
    around the layer; `functional`, whole forward passes in which only what runs behind the cut is the tail's, so that
    the trunk is computed once per head. At `input` nothing is in front of the cut, and the tail is `whole`.

    Args:
        trunk: images to what crosses the cut: a tensor, or a tuple of tensors.
        tail: what crosses the cut to logits [B, C].
        how: which way of cutting served.
        at: name of the layer whose output is cut, or `input`.
    """

    trunk: nn.Module
    tail: nn.Module
    how: How
    at: str

    def another_tail(self) -> nn.Module:
        """A copy of the tail with weights of its own, on the same trunk."""
        return copy.deepcopy(self.tail, dict(cast("Any", getattr(self.tail, "_shared_on_copy", dict))()))


def _is_expanded(tensor: Tensor) -> bool:
    """Whether entries share memory, as after `expand`: nothing can write to it in place."""
    return any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))


@contextmanager
def undisturbed(images: Tensor, *modules: nn.Module) -> Iterator[None]:
    """Run without gradients, and put modes, buffers and random numbers back at the end."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for root in modules
        for module in root.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    with kept_generators(images.device), kept_modes(*modules), torch.no_grad():
        try:
            yield
        finally:
            for module, name, buffer, saved in buffers:
                module._buffers[name] = buffer if _is_expanded(buffer) else buffer.copy_(saved)


def kept_in_evaluation(model: nn.Module, images: Tensor) -> list[str]:
    """Names of submodules that a `train` of the model's own leaves in evaluation mode, such as frozen batch norm."""
    with undisturbed(images, model):
        model.train()
        return [name for name, module in model.named_modules() if name and not module.training]


def _to_evaluation(module: nn.Module, args: object) -> None:  # a forward pre-hook
    del args
    module.eval()


def keep_in_evaluation(cut: Cut, names: Collection[str]) -> None:
    """Let modules be in evaluation mode in the halves too, which have no `train` of the model's own."""
    for part in (cut.trunk, cut.tail):
        for name, module in part.named_modules():
            if name in names:
                module.register_forward_pre_hook(_to_evaluation)


def graft(root: nn.Module, name: str, value: nn.Module | Tensor | None, *, persistent: bool = True) -> None:
    """Put a module, parameter or buffer into a tree of modules under its dotted name, with plain modules on the way."""
    *path, last = name.split(".")
    for atom in path:
        if atom not in root._modules:
            root.add_module(atom, nn.Module())
        root = root._modules[atom]  # type: ignore[assignment]  # just made or found
    if isinstance(value, nn.Module):
        root.add_module(last, value)
    elif isinstance(value, nn.Parameter):
        root.register_parameter(last, value)
    else:
        root.register_buffer(last, value, persistent=persistent)


def shape_of(tensor: Tensor) -> Tensor:
    """A tensor of the same shape that holds a single number: what crosses a cut for its shape alone."""
    return tensor.detach().new_zeros(()).expand(tensor.shape)


def is_shape_only(tensor: Tensor) -> bool:
    """Whether a tensor was made by `shape_of`."""
    return tensor.numel() > 1 and not any(tensor.stride())


def tensors_of(module: nn.Module) -> dict[int, str]:
    """Parameters and buffers by identity, each with its first name."""
    found: dict[int, str] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        found.setdefault(id(tensor), name)
    return found


def has_state(module: nn.Module) -> bool:
    """Whether a module holds parameters or buffers."""
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def fresh_copy(model: nn.Module) -> nn.Module:
    """A deep copy of a model, without gradients, and with buffers that can be written to."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.grad = None
    for module in copied.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and _is_expanded(buffer):
                module._buffers[name] = buffer.contiguous()
    return copied
