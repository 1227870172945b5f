"""A stage without training: weights between those of two earlier stages, chosen on the held-out images."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dualhead.errors import Interrupted
from dualhead.system.arithmetic import Arithmetic
from dualhead.system.flops import CountFlops
from dualhead.system.processes import group
from dualhead.training.checkpoint import Position
from dualhead.training.passes import Passes
from dualhead.training.validation import Validator


def between(first: Mapping[str, Tensor], second: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return (1 - share) first + share second; what is not floating point is the second's.

    Args:
        first: tensors by name.
        second: the same names and shapes.
        share: in [0, 1]; at the ends the result is one of the two to the bit.
    """
    if share in (0.0, 1.0):
        return dict(second if share else first)
    return {
        name: torch.lerp(first[name], tensor, share) if tensor.is_floating_point() else tensor
        for name, tensor in second.items()
    }


def interpolate(
    passes: Passes,
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    shares: Sequence[float],
    validator: Validator,
    arithmetic: Arithmetic,
    device: torch.device,
    stop: Callable[[], bool],
    position: Position,
) -> Position:
    """Give the network the best weights between two others.

    Args:
        passes: through the network.
        first: the state with share 0.
        second: the state with share 1.
        shares: those that are tried.
        validator: held-out images, and how they are attacked.
        arithmetic: number format of the passes.
        device: where the network is.
        stop: asked before each share.
        position: at the stage's beginning.

    Returns:
        The position at its end; `best` holds the share that was chosen and its accuracies on the held-out images.

    Raises:
        Interrupted: when stopped; the stage begins anew next time.
    """
    began, flops, found = time.monotonic(), 0, []
    for share in shares:
        if group().any(stop())[0]:
            raise Interrupted("stopped while weights were interpolated; the same command begins this stage anew")
        passes.model.load_state_dict(between(first, second, share))
        with CountFlops() as counter:
            found.append({"share": share, **validator(passes, arithmetic, device)})
        flops += sum(group().gather(counter.total))
    best: dict[str, Any] = max(found, key=lambda line: (line["validation_robust"], line["validation_clean"]))
    passes.model.load_state_dict(between(first, second, best["share"]))
    spent = position.seconds + time.monotonic() - began
    return replace(position, flops=position.flops + flops, seconds=spent, best={**best, "tried": len(found)})
