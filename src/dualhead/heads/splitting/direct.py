"""The two ways of cutting that need no look into `forward`: the model's own `split`, and nn.Sequential."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from dualhead.errors import UserError
from dualhead.heads.splitting.base import CannotCut, Cut, fresh_copy
from dualhead.system.outputs import logits_of

OWN_NOT_OFFERED = "does not offer a cut"


def _plain_logits(module: nn.Module, args: Any, output: Any) -> Any:  # a forward hook
    del module, args
    return logits_of(output)


def own_split(model: nn.Module, at: str) -> Cut:
    """Cut by the model's own `split(at)`, which gives (trunk, tail) with the model's parameter names.

    Raises:
        CannotCut: if the model has no such method, or the method refuses this layer.
    """
    if not callable(getattr(model, "split", None)):
        raise CannotCut(f"the model {OWN_NOT_OFFERED}")
    copied: Any = fresh_copy(model)
    try:
        trunk, tail = copied.split(at)
    except (UserError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise CannotCut(f"the model's own split {OWN_NOT_OFFERED} at this layer: {error}") from None
    except Exception as error:  # any code of any model may run here; it is told, and the next way is tried
        raise CannotCut(f"it fails: {type(error).__name__}: {error}") from error
    for part in (trunk, tail):
        if not isinstance(part, nn.Module):
            raise CannotCut("the model's own split does not give two modules")
    tail.register_forward_hook(_plain_logits)
    return Cut(trunk, tail, "own", at)


def _is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _cut(container: nn.Module, path: list[str]) -> tuple[OrderedDict[str, nn.Module], OrderedDict[str, nn.Module]]:
    """Children up to and including the path, and behind it; the container on the path falls in two."""
    if not _is_sequential(container):
        raise CannotCut(f"{type(container).__name__} on the way to it is not an nn.Sequential")
    before: OrderedDict[str, nn.Module] = OrderedDict()
    after: OrderedDict[str, nn.Module] = OrderedDict()
    passed = False
    for name, child in container.named_children():
        if name != path[0]:
            (after if passed else before)[name] = child
            continue
        passed = True
        if len(path) == 1:
            before[name] = child
            continue
        inner_before, inner_after = _cut(child, path[1:])
        before[name] = nn.Sequential(inner_before)
        if inner_after:
            after[name] = nn.Sequential(inner_after)
    return before, after


def sequential_split(model: nn.Module, at: str) -> Cut:
    """Cut between two children of an nn.Sequential, also of one inside another.

    Raises:
        CannotCut: if anything on the way to the layer is not an nn.Sequential, or holds a module twice.
    """
    path, container = at.split("."), model
    for atom in path:
        if not _is_sequential(container):
            raise CannotCut(f"{type(container).__name__} on the way to it is not an nn.Sequential")
        if len(set(map(id, container._modules.values()))) < len(container):  # type: ignore[arg-type]  # a Sequential
            raise CannotCut("a module is in the nn.Sequential twice")
        container = container.get_submodule(atom)
    before, after = _cut(fresh_copy(model), path)
    tail = nn.Sequential(after)
    tail.register_forward_hook(_plain_logits)
    trunk = nn.Sequential(before)
    trunk.train(model.training)
    tail.train(model.training)
    return Cut(trunk, tail, "sequential", at)


def whole_split(model: nn.Module, at: str) -> Cut:
    """Cut in front of the first layer: the trunk hands the images on, and the tail is the whole model."""
    tail = fresh_copy(model)
    tail.register_forward_hook(_plain_logits)
    return Cut(nn.Identity().train(model.training), tail, "whole", at)
