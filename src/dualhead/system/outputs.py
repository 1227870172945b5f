"""Logits from whatever a model returns: a tensor, a tuple, a dict, or an object with `.logits`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, fx

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
