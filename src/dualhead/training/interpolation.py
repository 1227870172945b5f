"""A stage without training: weights between those of two earlier stages, chosen on the held-out images."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dualhead.components.fields import Real
from dualhead.components.sections import Section
from dualhead.errors import Interrupted, UserError
from dualhead.system.arithmetic import Arithmetic
from dualhead.system.flops import CountFlops
from dualhead.system.processes import group
from dualhead.threats import THREAT, Threat
from dualhead.training.checkpoint import Position
from dualhead.training.passes import Passes
from dualhead.training.validation import Validator


class Interpolate(Section):
    """Weights between those that two earlier stages keep, (1 - a) first + a second.

    The share a is the one with the highest robust accuracy on the held-out images, as the mean over `threats`; of equal
    ones the one with the highest clean accuracy. Running statistics of batch norm are interpolated too. It costs as
    many validations as there are shares, and no training. After Wortsman et al. 2022, Robust fine-tuning of zero-shot
    models, CVPR, arXiv 2109.01903.
    """

    between: tuple[str, str]
    """Names of two earlier stages."""
    shares: tuple[Annotated[Real, Field(ge=0, le=1)], ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Those that are tried."""
    threats: tuple[Annotated[Threat, *THREAT], ...] = ()
    """What choosing looks at; empty: the stage's own threat."""

    @model_validator(mode="after")
    def _has_shares(self) -> Self:
        if not self.shares:
            raise UserError(".shares: must hold at least one, e.g. [0, 0.5, 1]")
        if self.between[0] == self.between[1]:
            raise UserError(f".between: names {self.between[0]} twice; name two earlier stages")
        return self


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
