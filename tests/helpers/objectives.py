"""What objectives see, made of logits, and what they make of it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dualhead.objectives import ATTACKED, Objective, objectives

REQUIRED = {
    "energy": {"start_steps": 1},
    "hat": {"weights": "standard"},
    "elle": {"adaptive": False, "weight": 0.1},
    "after_dder": {"sentinel": 0, "balance": 0},
    "align": {"distance": "kl", "output": "own", "stop_gradient": False},
}
"""Fields without a default, by objective, and those that let it show all that it does, or see logits alone."""


def shipped() -> list[str]:
    """Names of the objectives in the package itself, whatever else was registered."""
    return [name for name in objectives.names() if objectives.get(name).__module__.startswith("dualhead.")]


def see(objective: Objective, **images: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What an objective sees of images: for each name logits [B, C], or those of each output.

    Needs on images that are not given are left out, so that using them fails.
    """
    found = {}
    for name, need in objective.needs().items():
        logits = images.get(need.on)
        if logits is not None:
            found[name] = logits[need.output] if isinstance(logits, Mapping) else logits
    return found


def climbed(objective: Objective, y: Tensor, seen: Mapping[str, Tensor], made: str = ATTACKED) -> Tensor:
    """What an inner maximisation climbs, [B], given no more than what it says it uses."""
    inner = objective.inner()[made]
    return inner.loss(y, {name: seen[name] for name in inner.uses})
