"""The state of an unfinished stage: all that determines what comes next."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dualhead.errors import RunError
from dualhead.files import write_atomically
from dualhead.runtime import generator_states, set_generator_states


@dataclass
class Position:
    """Where a run stands.

    Randomness needs no state: order, augmentation and attack are functions of seed, stage, epoch and sample. Torch's
    own generators are kept for modules that draw from them (dropout).

    Args:
        stage: number of the stage, from 0.
        epoch: finished epochs of the stage.
        step: finished steps of the epoch after those.
        seconds: time spent on the stage so far.
        step_cost: floating-point operations of one step, as torch counts them; 0 before the first.
        sums: what the unfinished epoch has added up for its line of metrics.
        best: metrics of the best epoch of the stage so far; empty before the first validation.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    step_cost: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)


def save_position(path: Path, position: Position, model: nn.Module, optimiser: torch.optim.Optimizer | None) -> None:
    """Write the state atomically.

    Args:
        path: the file.
        position: where the run stands.
        model: with the weights of that moment.
        optimiser: of the stage; None between stages.
    """
    state = {
        "position": asdict(position),
        "model": model.state_dict(),
        "optimiser": None if optimiser is None else optimiser.state_dict(),
        **generator_states(),
    }
    write_atomically(path, lambda aside: torch.save(state, aside))


@dataclass
class Saved:
    """What `save_position` wrote: the position, and the states to load into model and optimiser."""

    position: Position
    model: dict[str, torch.Tensor]
    optimiser: dict[str, Any] | None
    generator: torch.Tensor
    accelerator_generators: list[torch.Tensor]

    def restore_generators(self) -> None:
        """Put torch's generators where they stood."""
        set_generator_states(self.generator, self.accelerator_generators)


def load_position(path: Path) -> Saved:
    """Read what `save_position` wrote; nothing in the file is run.

    Raises:
        RunError: if the file is damaged.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return Saved(**{**state, "position": Position(**state["position"])})
    except Exception as error:  # a damaged file fails in many ways: EOFError, RuntimeError, KeyError, ...
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RunError(f"{path}: damaged checkpoint ({reason}); remove it to start the run anew") from None
