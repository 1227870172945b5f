"""Logits from whatever a model returns: a tensor, a tuple, a dict, or an object with `.logits`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, fx

from dualhead.errors import UserError


def as_logits(output: Any) -> Tensor:  # whatever a model may return
    """The logits [B, C] in a model's output.

    Args:
        output: a tensor; an object with `.logits` (as transformers return); a dict with the key `logits` or with one
            tensor; a tuple or list whose first entry holds the logits (auxiliary outputs after it are dropped).

    Raises:
        UserError: if none of these fits.
    """
    if isinstance(output, Tensor | fx.Proxy):
        return cast("Tensor", output)
    if isinstance(output, Mapping):
        found = output["logits"] if "logits" in output else next(iter(output.values())) if len(output) == 1 else None
    else:
        found = getattr(output, "logits", None)
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    if found is None:
        raise UserError(
            f"the model returns {type(output).__name__}, in which no logits are found; "
            "return a tensor [B, C], a tuple that begins with it, or something with `logits`"
        )
    return as_logits(found)
