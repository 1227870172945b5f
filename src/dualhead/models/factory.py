"""A model of the user's own, made by a function that the recipe names as `package.module:factory`."""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualhead.errors import UserError
from dualhead.models.base import Backbone, ImageShape, Wrapped, backbones, check_logits
from dualhead.models.normalize import Normalize
from dualhead.system.processes import group

logger = logging.getLogger(__name__)


def _reason(error: Exception) -> str:
    return (f"{type(error).__name__}: {error}".splitlines() or [""])[0]


def _import(path: str) -> Callable[..., Any]:
    """What `package.module:factory` names; the module may lie in the current directory, as with `python -m`."""
    name, colon, attribute = path.partition(":")
    if not (name and colon and attribute):
        raise UserError(f"model {path!r}: write package.module:factory")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"model {path!r}: importing {name!r} failed: {_reason(error)}") from error
        raise UserError(f"model {path!r}: there is no module {error.name!r}, neither installed nor in {here}") from None
    except Exception as error:  # whatever somebody else's module may raise
        raise UserError(f"model {path!r}: importing {name!r} failed: {_reason(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(f"model {path!r}: module {name!r} has no {attribute!r}")
        found = getattr(found, part)
    if isinstance(found, nn.Module) or not callable(found):
        kind = type(found).__name__
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


@backbones.register("factory", text="path")
@dataclass(frozen=True)
class FactoryBackbone(Backbone):
    """A model of your own: `mypackage.mymodule:make_model` calls `make_model`.

    The function is called with `num_classes=...` if it takes that argument, and returns an `nn.Module` from images
    [B, C, H, W] in [0, 1] to logits [B, num_classes]. Its layers keep their names, unless the recipe has a
    normalisation put before it or it returns something other than a tensor: they are then called `model.LAYER`.

    Args:
        path: module and function, found among what is installed and in the current directory.
    """

    path: str

    def _build(self, num_classes: int, image_shape: ImageShape, normalize: Normalize) -> nn.Module:
        return self._checked(self._made(num_classes)[0], num_classes, image_shape, normalize)

    def _made(self, num_classes: int) -> tuple[nn.Module, tuple[str, ...]]:
        """What the function returns, and the names of its classes: its own, the function's, or their module's."""
        if group().first:
            logger.warning("model %s: code named there is run", self.path)
        factory = _import(self.path)
        try:
            model = factory(num_classes=num_classes) if _takes_num_classes(factory) else factory()
        except Exception as error:  # whatever somebody else's function may raise
            raise UserError(f"model {self.path!r}: the factory failed: {_reason(error)}") from error
        if not isinstance(model, nn.Module):
            raise UserError(f"model {self.path!r}: the factory returned {type(model).__name__}, not a torch.nn.Module")
        places = (model, factory, sys.modules.get(getattr(factory, "__module__", "")))
        found = (getattr(place, "class_names", None) for place in places)
        named = next((names for names in found if isinstance(names, Sequence) and not isinstance(names, str)), ())
        return model, tuple(map(str, named))

    def _checked(self, model: nn.Module, num_classes: int, image_shape: ImageShape, normalize: Normalize) -> nn.Module:
        wrong = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
        if wrong:
            raise UserError(
                f"model {self.path!r}: its parameters are {', '.join(sorted(map(str, wrong)))}; they must be "
                f"torch.float32: let the function return model.float()"
            )
        output = check_logits(model, num_classes, image_shape, f"model {self.path!r}")
        bare = normalize.is_identity and isinstance(output, Tensor) and _trains_on_logits(model, image_shape)
        return model if bare else Wrapped(normalize, model)

    def published(self, num_classes: int, image_shape: ImageShape) -> nn.Module:
        """What the function returns, which loads weights and normalises itself.

        It may name its classes: `class_names`, in the order of its logits, of the module that it returns, of the
        function, or of their Python module. The module that comes out then has them.
        """
        model, names = self._made(num_classes)
        made = self._checked(model, len(names) or num_classes, image_shape, Normalize.identity(image_shape[0]))
        if names:
            made.class_names = names  # type: ignore[assignment]  # a plain attribute, which is no tensor
        return made


def _trains_on_logits(model: nn.Module, image_shape: ImageShape) -> bool:
    """Whether a model gives bare logits in training mode too, and not those of auxiliary heads beside them."""
    try:
        trial = copy.deepcopy(model).train()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return isinstance(trial(torch.zeros(2, *image_shape)), Tensor)
    except Exception:  # what cannot be copied, or not be tried like this, is taken as it came
        return True
