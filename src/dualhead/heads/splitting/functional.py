"""Cutting without a cut: whole forward passes, in which what runs behind the layer belongs to the tail.

For models whose containers cannot be traced. What crosses is the image itself; each head runs the model's own forward
on the trunk's modules and on its own. The trunk is therefore computed once per head, and in training mode its batch
norm sees each batch once per head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dualhead.heads.splitting.base import CannotCut, Cut, fresh_copy, graft, has_state, tensors_of, undisturbed
from dualhead.system.outputs import logits_of


class _Watch(TorchFunctionMode):
    """Notes for parameters and buffers on which side of the cut functions take them."""

    def __init__(self, names: Mapping[int, str], touched: Callable[[str], None]) -> None:
        super().__init__()
        self._names, self._touched = names, touched

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if getattr(func, "__name__", "") != "__get__":  # a look at dtype or shape is no use of the weights
            for value in tree_leaves((args, kwargs)):
                if id(value) in self._names:
                    self._touched(self._names[id(value)])
        return func(*args, **(kwargs or {}))


def _sides(model: nn.Module, at: str, images: Tensor) -> dict[str, set[bool]]:
    """Name the modules, parameters and buffers that a forward pass uses: behind the layer, before it, or both."""
    sides: dict[str, set[bool]] = defaultdict(set)
    behind = False

    def touched(name: str) -> None:
        sides[name].add(behind)

    def passed(*_: object) -> None:
        nonlocal behind
        behind = True

    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: touched(name)) for name, module in model.named_modules()
    ]
    handles.append(model.get_submodule(at).register_forward_hook(passed))
    try:
        for mode in (True, False):
            behind = False
            with undisturbed(images, model), _Watch(tensors_of(model), touched):
                model.train(mode)(images.clone())
    finally:
        for handle in handles:
            handle.remove()
    return sides


def _units(model: nn.Module, at: str) -> dict[str, Any]:
    """List what is assigned as a whole: submodules beside the way to the layer, and the containers' own tensors."""
    containers = ["", *(at[:i] for i, character in enumerate(at) if character == ".")]
    units: dict[str, Any] = {}
    for name in containers:
        container = model.get_submodule(name)
        held = {**container._modules, **container._parameters, **container._buffers}
        for child, value in held.items():
            full = f"{name}.{child}" if name else child
            if value is not None and full not in containers:
                units[full] = value
    return units


def functional_split(model: nn.Module, at: str, images: Tensor) -> Cut:
    """Divide a model's state, and leave its forward whole.

    Raises:
        CannotCut: if weights are used on both sides of the layer.
    """
    sides = _sides(model, at, images)
    copied = fresh_copy(model)
    trunk, tail = PassedOn(), WholePass(copied, at)
    for name, value in _units(copied, at).items():
        used = {side for key, seen in sides.items() if key == name or key.startswith(name + ".") for side in seen}
        stateful = isinstance(value, Tensor) or has_state(value)
        if stateful and len(used) == 2:
            raise CannotCut(f"{name} is used on both sides of it")
        part = tail if True in used or not (used or stateful) else trunk
        saved = not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or name in copied.state_dict()
        graft(part, name, value, persistent=saved)
    if tensors_of(trunk).keys() & tensors_of(tail).keys():
        raise CannotCut("weights are shared across it")
    tail._hidden = (copied, trunk)
    return Cut(trunk.train(model.training), tail.train(model.training), "functional", at)


class PassedOn(nn.Module):
    """The trunk of a whole-pass cut: it holds the weights in front of the layer, and hands the images on."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the images themselves: tails run the trunk."""
        return images


class WholePass(nn.Module):
    """The tail of a whole-pass cut: it holds the weights behind the layer, and runs the whole model on images.

    Args:
        model: the model, whose modules are the trunk's and this tail's; taken over.
        at: name of the layer.
    """

    def __init__(self, model: nn.Module, at: str) -> None:
        super().__init__()
        self._containers = ["", *(at[:i] for i, character in enumerate(at) if character == ".")]
        self._hidden: tuple[nn.Module, ...] = (model,)  # in a tuple, so that the trunk's weights are not this module's

    def _shared_on_copy(self) -> dict[int, Any]:
        """Return what a second tail shares with this one, the trunk, as a memo for `copy.deepcopy`."""
        trunk = self._hidden[1]
        return {id(held): held for held in (*trunk.modules(), *trunk.parameters(), *trunk.buffers())}

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, C] from images [B, ...]."""
        model, trunk = self._hidden
        own: dict[str, Tensor] = {}
        for name in self._containers:
            container = model.get_submodule(name)
            container.training = self.training
            for part in (trunk, self):
                own.update(_direct_tensors(part, name))
        return logits_of(functional_call(model, own, (images,)))


def _direct_tensors(part: nn.Module, name: str) -> dict[str, Tensor]:
    """Return parameters and buffers that a part holds for a container itself."""
    for atom in name.split(".") if name else ():
        if atom not in part._modules:
            return {}
        part = cast("nn.Module", part._modules[atom])
    held = (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
    return {f"{name}.{child}" if name else child: tensor for child, tensor in held}
