"""Fresh weights for a second head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dualhead.errors import UserError

Scheme = Callable[[nn.Module], object]


def reset_tail(model: nn.Module, head: nn.Module) -> None:
    """Re-initialise a head that was cut off a model, in place.

    Each layer is initialised the way its class does it: `reset_parameters` (or torch's `_reset_parameters`) of every
    layer from the inside out. Then the model's own scheme, where it offers one: the `_init_weights(layer)` of the
    innermost module around a layer that has it, as models of transformers do; and last the model's
    `reset_head_parameters(head)`. What a constructor did beyond these (a last batch norm set to zero, say) cannot be
    run again. Weights are drawn from torch's default generator.

    Buffers that no layer resets (position indices, for example) are kept.

    Args:
        model: the whole model, which knows the layers' classes; left as it is.
        head: a copy of its tail, with the model's own names.

    Raises:
        UserError: naming a parameter that none of these initialises: it would silently be a clone.
    """
    names = set(head.state_dict())
    fresh = copy.deepcopy(model)
    parameters = {name: p for name, p in fresh.named_parameters(remove_duplicate=False) if name in names}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.fill_(torch.nan)  # what is not initialised below shows
        for name, layer in _inside_out(fresh):
            if any(key.startswith(f"{name}." if name else "") for key in names):
                _reset(layer)
        for scheme, layer in _schemes(fresh):
            scheme(layer)
        for name, parameter in parameters.items():
            if parameter.isnan().any() and not callable(getattr(model, "reset_head_parameters", None)):
                _refuse(fresh, name)
    state = fresh.state_dict()
    head.load_state_dict({name: state[name] for name in names})
    own: Any = getattr(model, "reset_head_parameters", None)
    if callable(own):
        own(head)
    for name, parameter in head.named_parameters():
        if parameter.isnan().any():
            _refuse(fresh, name)


def _inside_out(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Submodules and the module itself, children first."""
    found = []
    for name, child in module.named_children():
        found += _inside_out(child, f"{prefix}.{name}" if prefix else name)
    return [*found, (prefix, module)]


def _schemes(module: nn.Module, scheme: Scheme | None = None) -> list[tuple[Scheme, nn.Module]]:
    """Submodules, children first, each with the `_init_weights` of the innermost module around it."""
    scheme = getattr(module, "_init_weights", scheme)
    found = [pair for child in module.children() for pair in _schemes(child, scheme)]
    return [*found, (scheme, module)] if callable(scheme) else found


def _reset(layer: nn.Module) -> None:
    for method in ("reset_parameters", "_reset_parameters"):
        if callable(getattr(layer, method, None)):
            getattr(layer, method)()
            return


def _refuse(model: nn.Module, name: str) -> None:
    owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
    raise UserError(
        f"the second head cannot be reset: {owner} does not say how to initialise {name}; "
        f"give {owner} a reset_parameters(), or use init='clone' or a module of your own"
    )
