"""A network that a program holds: a module, or a function that makes it, which no recipe can name by an address."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dualhead.errors import UserError
from dualhead.models.base import ImageShape, backbones
from dualhead.models.factory import FactoryBackbone, function_at, made_by, maker, on_cpu, own_copy
from dualhead.system.generators import kept_generators, seed_generators
from dualhead.system.modes import in_eval_mode
from dualhead.system.outputs import logits_of

_log = logging.getLogger(__name__)


@backbones.register("given", text="path")
@dataclass(frozen=True)
class GivenBackbone(FactoryBackbone):
    """A network that was given in Python, from a class that cannot be imported or made without arguments.

    It can be made where the network, or a function that makes it, is given again: `dualhead.fit(model, ...)`,
    `dualhead.load(path, factory=make_net)`.

    Args:
        path: name of its class.
        digest: of names and shapes of its tensors.
    """

    path: str
    digest: str = ""

    def __post_init__(self) -> None:
        """Keep the name as it is: it is no address."""

    def _made(self, num_classes: int) -> tuple[nn.Module, tuple[str, ...]]:
        factory = maker()
        if factory is None:
            raise UserError(
                f"the network {self.path} was given in Python, and cannot be made from here; load it with "
                "dualhead.load(PATH, factory=MAKE), on the command line with --factory package.module:MAKE, or go on "
                "with dualhead.fit and the network"
            )
        model, names = made_by(factory, self.path, num_classes)
        if self.digest and _digest(model) != self.digest:
            raise UserError(
                f"factory: makes {type(model).__name__} with tensors of other names or shapes than those of the "
                f"{self.path} that was trained"
            )
        return on_cpu(own_copy(model), self.path), names


@contextmanager
def at_hand(factory: Callable[..., Any] | None) -> Iterator[None]:
    """Make networks that a recipe calls `given`, and those of a `factory`, by this function while inside."""
    with maker.replaced(factory):
        yield


@contextmanager
def at_hand_by_name(address: str) -> Iterator[None]:
    """Make such networks by the function at `package.module:NAME` or `my_file.py:NAME` while inside.

    Where no network was made by it one line says so.

    Raises:
        UserError: if there is no such function.
    """
    with maker.replaced(function_at(address)):
        yield
        if not maker.asked:
            _log.warning("--factory %s: is not used: the model says itself how it is made", address)


def describe_given(model: nn.Module) -> dict[str, str]:
    """Return the backbone, as a recipe writes it, that stands for a network without an address."""
    return {"name": "given", "path": type(model).__name__, "digest": _digest(model)}


def _digest(model: nn.Module) -> str:
    shapes = sorted((name, tuple(tensor.shape)) for name, tensor in model.state_dict().items())
    return hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]


def address_of(
    model: nn.Module,
    factory: Callable[..., Any] | None,
    num_classes: int,
    image_shape: ImageShape,
    *,
    to_train: bool = False,
) -> str | None:
    """Return an address by which other programs make a network: that of the factory, or of the class itself.

    A class serves if it can be made without arguments, or with `num_classes` alone, and the result is the same network:
    tensors of the same names and shapes, and with these the same logits. Random number generators keep their states.
    A network to train is the same only if the same parameters learn, unless none does in the one that is given, and if
    it does the same in training mode, such as dropout at the same rate.

    Args:
        model: the network.
        factory: a function that makes it; None to try its class.
        num_classes: logits per image.
        image_shape: channels, height and width.
        to_train: whether it will be trained, and not only asked.

    Returns:
        `module:NAME`; None if there is none.

    Raises:
        UserError: if a factory makes another network.
    """
    source: Any = type(model) if factory is None else factory
    module, name = str(getattr(source, "__module__", "__main__")), getattr(source, "__qualname__", "<>")
    importable = module not in ("__main__", "builtins") and "<" not in name
    if factory is None and (not importable or module.startswith("torch.nn.")):
        return None
    with kept_generators(torch.device("cpu")):
        try:
            made, _ = made_by(source, name, num_classes)
            other = _other(made, model, image_shape, to_train=to_train)
        except Exception as error:
            if factory is None:
                return None
            raise error if isinstance(error, UserError) else UserError(f"factory: fails: {error}") from error
    if other:
        if factory is None:
            return None
        raise UserError(f"factory: {name} makes another network than the {type(model).__name__} that is given: {other}")
    return f"{module}:{name}" if importable else None


def _other(made: nn.Module, model: nn.Module, image_shape: ImageShape, *, to_train: bool) -> str:
    """Say in what a network differs from the one that is given, on whose weights it is put; empty: in nothing."""
    if _digest(made) != _digest(model):
        return "tensors of other names or shapes"
    made.load_state_dict(model.state_dict())
    image = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0))
    logits: list[Tensor] = []
    for one in (made, model):
        device = next((p.device for p in one.parameters()), torch.device("cpu"))
        with in_eval_mode(one), torch.no_grad():
            logits.append(logits_of(one(image.to(device))).cpu())
    if not _close(*logits):
        return "other logits of the same weights"
    return _other_in_training(made, model, image) if to_train else ""


def _close(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-3, atol=1e-4)


def _other_in_training(made: nn.Module, model: nn.Module, images: Tensor) -> str:
    """Say in what two networks of equal weights part once they are trained; empty: in nothing, or it cannot be told."""
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in made.named_parameters():
        if any(learns.values()) and learns.get(name, True) != parameter.requires_grad:
            return f"{name} {'learns' if parameter.requires_grad else 'is fixed'} there, and not in this one"
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for one in (made, model):
        try:
            trial = copy.deepcopy(one).cpu().train()
            seed_generators(0, torch.device("cpu"))
            with torch.no_grad():
                found.append((logits_of(trial(images.clone())), dict(trial.named_buffers())))
        except Exception:  # what cannot be copied, or not be tried like this, is taken as it came
            return ""
    (ours, left), (theirs, wanted) = found
    moved = left.keys() != wanted.keys() or any(not _close(left[n].float(), wanted[n].float()) for n in left)
    if moved or not _close(ours, theirs):
        return "another pass in training mode (dropout, momentum of batch norm)"
    return ""
