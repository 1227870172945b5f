"""Logits from whatever a model returns: a tensor, a tuple, a dict, or an object with `.logits`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from dualhead.errors import UserError


def logits_of(output: Any) -> Tensor:  # whatever a model may return
    """Find the logits [B, C] in a model's output.

    Args:
        output: a tensor; an object with `.logits` (as transformers return); a dict with the key `logits`, or with one
            tensor and nothing else; a tuple or list whose first entry holds the logits (auxiliary outputs after it are
            dropped).

    Raises:
        UserError: if none of these fits.
    """
    found = output
    while not isinstance(found, Tensor | fx.Proxy):  # a proxy stands for a tensor while a model is traced
        if isinstance(found, Mapping):
            alone = next(iter(found.values())) if len(found) == 1 else None
            found = found["logits"] if "logits" in found else alone if isinstance(alone, Tensor | fx.Proxy) else None
        elif (named := getattr(found, "logits", None)) is not None:
            found = named
        else:
            found = found[0] if isinstance(found, tuple | list) and found else None
        if found is None:
            raise UserError(
                f"the model returned {type(output).__name__} without logits; it must return a tensor, a tuple that has "
                "them first, or an object or dict that names them `logits`"
            )
    return cast("Tensor", found)


@fx.wrap  # kept as one call where torch.fx traces a model, since it depends on the shape
def two_at_least(logits: Tensor, images: int) -> Tensor:
    """Read one logit z per image as the logits [0, z] of two classes; give back any others as they are.

    Args:
        logits: [B, C]; or one number per image: [B, 1], [B], or a scalar for one image.
        images: B.
    """
    if logits.numel() == images and (logits.ndim == 0 or logits.shape[0] == images):
        z = logits.reshape(images, 1)
        return torch.cat((torch.zeros_like(z), z), 1)
    return logits


def writes_to_images(model: nn.Module, images: Tensor) -> bool:
    """Tell whether a model changes the images that it is given, as one that normalises in place does.

    Args:
        model: asked once, without a graph, on a copy.
        images: [B, C, H, W].
    """
    shown = images.clone()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model(shown)
    return not torch.equal(shown, images)


def without_inference_tensors(model: nn.Module) -> nn.Module:
    """Copy a model that was made under `torch.inference_mode`, so that gradients can go through it.

    Returns:
        The model itself if none of its tensors is an inference tensor. Else another, which shares all others.
    """
    made = (*model.parameters(), *model.buffers())
    tensors = {id(t): t for t in made if not nn.parameter.is_lazy(t) and t.is_inference()}
    if not tensors:
        return model
    with torch.inference_mode(False):
        memo: dict[int, Any] = {}
        for number, tensor in tensors.items():
            fresh = torch.empty_like(tensor, requires_grad=False).copy_(tensor)
            memo[number] = (
                nn.Parameter(fresh, tensor.is_floating_point()) if isinstance(tensor, nn.Parameter) else fresh
            )
        return copy.deepcopy(model, memo)
