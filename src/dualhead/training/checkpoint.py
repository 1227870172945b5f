"""The state of an unfinished run: all that determines what comes next, and a folder that keeps the last few."""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dualhead.errors import RunError
from dualhead.system.files import write_atomically
from dualhead.system.generators import generator_states, set_generator_states
from dualhead.system.processes import group
from dualhead.training.averaging import WeightAverage

logger = logging.getLogger(__name__)

_NAME = re.compile(r"(\d{8})-([0-9a-f]{16})\.pt")


@dataclass
class Position:
    """Where a run stands.

    Randomness needs no state: order, augmentation and attack are functions of seed, stage, epoch and sample. Torch's
    own generators are kept, those of each process, for modules that draw from them (dropout).

    Args:
        stage: number of the stage, from 0.
        epoch: finished epochs of the stage.
        step: finished steps of the epoch after those.
        seconds: time spent on the stage so far.
        step_cost: floating-point operations of one step, as torch counts them; 0 where the next step is to be counted.
        flops: floating-point operations of all steps so far.
        streak: steps of the epoch dropped in a row, up to now.
        retreats: number of times that the stage went back to a saved state because its numbers were no longer finite.
        sums: the unfinished epoch's sums for its line of metrics.
        best: metrics of the best epoch of the stage so far; empty before the first validation.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    step_cost: int = 0
    flops: int = 0
    streak: int = 0
    retreats: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)


@dataclass
class Saved:
    """A checkpoint's content: the position, and the states to load into model, optimiser and weight average.

    Of each process it holds the generators, and the perturbation that it carries from step to step; of the stage's
    objective its own heads and its curriculum.
    """

    position: Position
    model: dict[str, torch.Tensor]
    optimiser: dict[str, Any] | None
    generators: list[list[torch.Tensor]]
    average: dict[str, torch.Tensor] | None = None
    carried: list[torch.Tensor | None] = field(default_factory=list)
    objective: dict[str, Any] | None = None

    def carried_by(self, rank: int) -> torch.Tensor | None:
        """Return the perturbation that a process carried; None for one that is new, or if there was none."""
        return self.carried[rank] if rank < len(self.carried) else None

    def restore_generators(self, device: torch.device) -> None:
        """Put torch's generators where they stood in this process; one that is new begins its own numbers."""
        rank = group().rank
        if rank < len(self.generators):
            set_generator_states(self.generators[rank], device)
        else:
            torch.manual_seed(torch.initial_seed() + rank)


class CheckpointStore:
    """The last few states of a run: files `NUMBER-CHECKSUM.pt`, numbered as they come.

    The checksum in the name (the first 16 hexadecimal digits of SHA-256) tells a file that is whole from one that a
    disk or a copy has damaged; the one before it is taken then.

    Args:
        folder: where the files lie.
        keep: number of files that stay, at least 1.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder = folder
        self._keep = keep

    def save(
        self,
        position: Position,
        model: nn.Module,
        optimiser: torch.optim.Optimizer | None,
        average: WeightAverage | None = None,
        carried: torch.Tensor | None = None,
        objective: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a state, and remove those that are too old; a crash leaves the old ones or the new one besides.

        Called by all processes of a run; the first one writes.

        Args:
            position: where the run stands.
            model: with the weights of that moment.
            optimiser: optimiser of the stage; None between stages.
            average: average of the stage's weights; None if it keeps none.
            carried: the perturbation that this process carries from step to step; None if it carries none.
            objective: state of the stage's objective, its own heads and its curriculum; None between stages.
        """
        generators = group().gather(generator_states(next(model.parameters()).device))
        perturbations = group().gather(None if carried is None else carried.cpu())
        if not group().first:
            return
        buffer = io.BytesIO()
        state = {
            "position": asdict(position),
            "model": model.state_dict(),
            "optimiser": None if optimiser is None else optimiser.state_dict(),
            "average": None if average is None else average.state_dict(),
            "generators": generators,
            "carried": perturbations,
            "objective": None if objective is None else dict(objective),
        }
        torch.save(state, buffer)
        content, before = buffer.getbuffer(), self._files()
        number = _number(before[-1]) + 1 if before else 1
        path = self.folder / f"{number:08d}-{_checksum(content)}.pt"
        write_atomically(path, lambda aside: aside.write_bytes(content))
        for old in before[: max(0, len(before) + 1 - self._keep)]:
            old.unlink()

    def load(self, wanted: Callable[[Position], bool] = lambda position: True) -> Saved | None:
        """Load the newest whole and wanted state, on the CPU; None if there is none. Nothing in a file is run.

        Called by all processes of a run; the first one reads.

        Raises:
            RunError: if there are files and all of them are damaged.
        """
        return group().lead(lambda: self._load(wanted))

    def _load(self, wanted: Callable[[Position], bool]) -> Saved | None:
        files = self._files()
        damaged = 0
        for path in reversed(files):
            try:
                saved = _read(path)
            except Exception as error:  # a damaged file fails in many ways: EOFError, RuntimeError, KeyError, ...
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                logger.warning("%s: damaged checkpoint (%s); the one before it is taken", path, reason)
                damaged += 1
                continue
            if wanted(saved.position):
                return saved
        if files and damaged == len(files):
            raise RunError(f"{self.folder}: all {len(files)} checkpoints are damaged; remove them to start anew")
        return None

    def _files(self) -> list[Path]:
        """Return checkpoints by name, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))


def _number(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _checksum(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _read(path: Path) -> Saved:
    content = path.read_bytes()
    if _checksum(content) != path.stem.partition("-")[2]:
        raise ValueError("its checksum is not the one in its name")
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return Saved(**{**state, "position": Position(**state["position"])})
