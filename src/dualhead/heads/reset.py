"""Fresh weights for a second head."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dualhead.errors import UserError

Scheme = Callable[[nn.Module], object]


def reset_tail(model: nn.Module, head: nn.Module) -> None:
    """Re-initialise a head that was cut off a model, in place.

    Each layer is initialised the way its class does it: `reset_parameters` (or torch's `_reset_parameters`) of every
    layer from the inside out, where it needs no arguments. Then the model's own scheme, where it offers one: the
    `_init_weights(layer)` of the innermost module around a layer that has it, as models of transformers do; and last
    the model's `reset_head_parameters(head)`. What a constructor did beyond these (a last batch norm set to zero, say)
    cannot be run again, except for models that are made from a `config` alone, as those of transformers: what is left
    then comes from a second one. Weights are drawn from torch's default generator.

    Buffers that no layer resets (position indices, for example) and parameters that the model does not train are kept.

    Args:
        model: the whole model, which knows the layers' classes; left as it is.
        head: a copy of its tail, with the model's own names.

    Raises:
        UserError: naming a parameter that none of these initialises: it would silently be a clone.
    """
    fresh = copy.deepcopy(model)
    names = set(head.state_dict())
    parameters = {name: p for name, p in fresh.named_parameters(remove_duplicate=False) if name in names}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.fill_(torch.nan)  # what nobody initialises shows
        for name, layer in _inside_out(fresh):
            if any(key.startswith(f"{name}." if name else "") for key in names):
                _reset(layer)
        for scheme, layer in _schemes(fresh):
            scheme(layer)
        for name, parameter in parameters.items():
            if not (given := model.get_parameter(name)).requires_grad:
                parameter.copy_(given)
            elif parameter.isnan().any():
                parameter.copy_(_otherwise(model, name))
    state = fresh.state_dict()
    head.load_state_dict({name: state[name] for name in names})
    if callable(own := getattr(model, "reset_head_parameters", None)):
        own(head)
    for name, parameter in head.named_parameters():
        if parameter.isnan().any():
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            raise UserError(
                f"the second head cannot be reset: {owner} does not say how to initialise {name}; "
                f"give {owner} a reset_parameters(), or use init='clone' or a module of your own"
            )


def _otherwise(model: nn.Module, name: str) -> Tensor:
    """Return a parameter that no layer initialises: from a config, or NaN."""
    parameter = model.get_parameter(name)
    path = name.split(".")
    for depth in range(len(path) - 1, -1, -1):
        owner: Any = model.get_submodule(".".join(path[:depth]))
        if hasattr(owner, "config") and callable(getattr(owner, "_init_weights", None)):
            again: nn.Module = type(owner)(owner.config)
            made = dict(again.named_parameters()).get(".".join(path[depth:]))
            if made is not None and made.shape == parameter.shape:
                return made
    return torch.full_like(parameter, torch.nan)


def _inside_out(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Return submodules and the module itself, children first."""
    found = []
    for name, child in module.named_children():
        found += _inside_out(child, f"{prefix}.{name}" if prefix else name)
    return [*found, (prefix, module)]


def _schemes(module: nn.Module, scheme: Scheme | None = None) -> list[tuple[Scheme, nn.Module]]:
    """Return submodules, children first, each with the `_init_weights` of the innermost module around it."""
    own = getattr(module, "_init_weights", None)
    scheme = own if callable(own) and _takes(own, nn.Module()) else scheme
    found = [pair for child in module.children() for pair in _schemes(child, scheme)]
    return [*found, (scheme, module)] if scheme is not None else found


def _takes(method: Callable[..., object], *arguments: object) -> bool:
    """Whether a method can be called with these arguments alone."""
    try:
        inspect.signature(method).bind(*arguments)
    except TypeError:
        return False
    return True


def _reset(layer: nn.Module) -> None:
    for method in ("reset_parameters", "_reset_parameters"):
        own = getattr(layer, method, None)
        if callable(own) and _takes(own):
            own()
            return
