"""A model of the user's own, made by a function that the recipe names as `package.module:factory`."""

from __future__ import annotations

import copy
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dualhead.components import plugins
from dualhead.errors import UserError
from dualhead.models.base import Backbone, ImageShape, Wrapped, backbones, check_logits, other_types
from dualhead.models.normalize import Normalize
from dualhead.system.generators import kept_generators
from dualhead.system.modes import in_eval_mode
from dualhead.system.outputs import logits_of, without_inference_tensors, writes_to_images

_log = logging.getLogger(__name__)


def function_at(path: str) -> Callable[..., Any]:
    """Return the function that `package.module:factory` names.

    Raises:
        UserError: if there is none.
    """
    if plugins.split_address(path) is None:
        raise UserError(f"model {path!r}: write package.module:factory or my_file.py:factory")
    found = plugins.find(path, f"model {path!r}")[1]
    if isinstance(found, nn.Module) or not callable(found):
        attribute, kind = path.rpartition(":")[2], type(found).__name__
        raise UserError(f"model {path!r}: {attribute!r} is a {kind}; it must be a function that returns a new module")
    made: Callable[..., Any] = found
    return made


def _takes_num_classes(factory: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # some built-in callables tell nothing of their arguments
        return False
    named = parameters.get("num_classes")
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return any_name or (named is not None and named.kind is not named.POSITIONAL_ONLY)


class _Maker:
    """The function that makes networks in place of the address that a recipe names; None for none."""

    def __init__(self) -> None:
        self._now: Callable[..., Any] | None = None
        self.asked = False  # whether a network has been made by the function since it was put here

    def __call__(self) -> Callable[..., Any] | None:
        """Return the function."""
        self.asked = True
        return self._now

    @contextmanager
    def replaced(self, factory: Callable[..., Any] | None) -> Iterator[None]:
        """Take another one while inside; None leaves it."""
        before, asked = self._now, self.asked
        self._now, self.asked = factory or before, False
        try:
            yield
        finally:
            self._now, self.asked = before, asked or self.asked


maker = _Maker()


def made_by(factory: Callable[..., Any], path: str, num_classes: int) -> tuple[nn.Module, tuple[str, ...]]:
    """Call a factory; return the module, and the names of classes that it, the function or its file has.

    Args:
        factory: called with `num_classes=...` if it takes that argument.
        path: its name in messages.
        num_classes: logits per image.

    Raises:
        UserError: if it fails, or returns something else than a module.
    """
    if isinstance(factory, nn.Module):
        raise UserError(
            f"factory: must be a function that makes the network, got the network itself, {type(factory).__name__}"
        )
    try:
        model = factory(num_classes=num_classes) if _takes_num_classes(factory) else factory()
    except Exception as error:  # whatever somebody else's function may raise
        raise UserError(f"model {path!r}: the factory failed: {plugins.reason(error)}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model {path!r}: the factory returned {type(model).__name__}, not a torch.nn.Module")
    places = (model, factory, sys.modules.get(getattr(factory, "__module__", "")))
    found = (getattr(place, "class_names", None) for place in places)
    named = next((names for names in found if isinstance(names, Sequence) and not isinstance(names, str)), ())
    return model, tuple(map(str, named))


def own_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a network that a program's function returned, since the program may go on using it.

    One that cannot be copied, as with tensors that layers compute anew, is taken as it came, and a line says so.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever somebody else's modules raise
        _log.warning(
            "factory: the %s that it returned cannot be copied (%s), so that network itself gets other weights",
            type(model).__name__, plugins.reason(error),
        )  # fmt: skip
        return model


def on_cpu(model: nn.Module, path: str) -> nn.Module:
    """Return a network that a function made, where networks begin, wherever the function had put it."""
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise UserError(f"model {path!r}: the factory returned tensors without values (device meta); make them on cpu")
    return model.cpu()


@backbones.register("factory", text="path")
@dataclass(frozen=True)
class FactoryBackbone(Backbone):
    """A model of your own: `mypackage.mymodule:make_model` calls `make_model`, as does `my_file.py:make_model`.

    The function is called with `num_classes=...` if it takes that argument, and returns an `nn.Module` from images
    [B, C, H, W] in [0, 1] to logits [B, num_classes]. Its layers keep their names, unless the recipe has a
    normalisation put before it or it returns something other than a tensor: they are then called `model.LAYER`.

    Args:
        path: module or file, and function. A module is looked for among what is installed, and like a file in the
            folder of the recipe and in the current one.
    """

    normalises: ClassVar[bool] = True
    path: str

    def __post_init__(self) -> None:
        split = plugins.split_address(self.path)
        if split is not None and plugins.is_file(split[0]):  # then it means the same in any folder
            object.__setattr__(self, "path", f"{plugins.located(split[0])}:{split[1]}")

    def _build(self, num_classes: int, image_shape: ImageShape, normalize: Normalize) -> nn.Module:
        return self._checked(self._made(num_classes)[0], num_classes, image_shape, normalize)

    def _made(self, num_classes: int) -> tuple[nn.Module, tuple[str, ...]]:
        """Call the function; return the module, and the names of classes that it, the function or its file has."""
        given = maker()
        made, names = made_by(given or function_at(self.path), self.path, num_classes)
        return on_cpu(own_copy(made) if given else made, self.path), names

    def _checked(
        self, model: nn.Module, num_classes: int, image_shape: ImageShape, normalize: Normalize, *, if_more: str = ""
    ) -> nn.Module:
        if wrong := other_types(model):
            raise UserError(
                f"model {self.path!r}: its parameters are {wrong}; they must be torch.float32: let the function return "
                "model.float()"
            )
        model = without_inference_tensors(model)
        output = check_logits(model, num_classes, image_shape, f"model {self.path!r}", if_more=if_more)
        if logits_of(output).numel() == 1:
            return Wrapped(normalize, model, one_logit=True)
        bare = normalize.is_identity and isinstance(output, Tensor) and _trains_on_logits(model, image_shape)
        # A wrapper's normalisation makes new images of those given, which a model may then change in place.
        return model if bare and not _writes_to_images(model, image_shape) else Wrapped(normalize, model)

    def weights_class_names(self, num_classes: int) -> tuple[str, ...]:
        """Call the function; its network, the function or its file may name the classes."""
        with kept_generators(torch.device("cpu")):
            return self._made(num_classes)[1]

    def published(self, num_classes: int, image_shape: ImageShape) -> nn.Module:
        """Call the function; its network loads weights and normalises itself.

        It may name its classes: `class_names`, in the order of its logits, of the module that it returns, of the
        function, or of their Python module. The module that comes out then has them.
        """
        model, names = self._made(num_classes)
        made = self._checked(
            model, len(names) or num_classes, image_shape, Normalize.identity(image_shape[0]),
            if_more="" if names else "for images of some of its classes, give the function or the network class_names, "
            "in the order of the logits",
        )  # fmt: skip
        if names:
            made.class_names = names  # type: ignore[assignment]  # a plain attribute, which is no tensor
        return made


def _writes_to_images(model: nn.Module, image_shape: ImageShape) -> bool:
    with in_eval_mode(model):
        return writes_to_images(model, torch.full((1, *image_shape), 0.4))


def _trains_on_logits(model: nn.Module, image_shape: ImageShape) -> bool:
    """Whether a model gives bare logits in training mode too, and not those of auxiliary heads beside them."""
    try:
        trial = copy.deepcopy(model).train()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return isinstance(trial(torch.zeros(2, *image_shape)), Tensor)
    except Exception:  # what cannot be copied, or not be tried like this, is taken as it came
        return True
