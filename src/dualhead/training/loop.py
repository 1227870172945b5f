"""The epochs of one stage: steps, validation, the best and the last weights, and a state to go on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualhead.attacks import Attack
from dualhead.data import Batch, Loader, Split, batches
from dualhead.errors import Interrupted, RunError
from dualhead.flops import CountFlops
from dualhead.models import write_state
from dualhead.noise import Streams
from dualhead.runtime import Arithmetic, in_eval_mode
from dualhead.threat import ThreatModel
from dualhead.training.checkpoint import Position, Saved, save_position
from dualhead.training.metrics import MetricsLog
from dualhead.training.program import Program
from dualhead.training.progress import TrainingProgress
from dualhead.training.stage import Stage
from dualhead.training.step import StepOutcome, TrainingStep


@dataclass(frozen=True)
class Validator:
    """Clean and robust accuracy on the held-out part of the training images.

    Args:
        split: the held-out images.
        attack: what decides robust accuracy.
        every: epochs between validations.
        threat: ball and box.
        seed: names the attack's noise, the same at every validation.
        batch_size: images at once.
    """

    split: Split
    attack: Attack
    every: int
    threat: ThreatModel
    seed: int
    batch_size: int = 256

    def __call__(self, program: Program, arithmetic: Arithmetic, device: torch.device) -> dict[str, float]:
        """`validation_clean` and `validation_robust`, fractions of the held-out images."""
        clean = robust = 0
        logits_fn = arithmetic.wrap(program.logits)
        with in_eval_mode(program.model):
            for batch in batches(self.split, self.batch_size, device):
                streams = Streams.of(self.seed, batch.index).fork("validation")
                x_adv = self.attack(logits_fn, batch.x, batch.y, self.threat, generator=streams)
                with torch.no_grad():
                    right = logits_fn(batch.x).argmax(1) == batch.y
                    clean += int(right.sum())
                    robust += int((right & (logits_fn(x_adv).argmax(1) == batch.y)).sum())
        return {"validation_clean": clean / len(self.split), "validation_robust": robust / len(self.split)}


@dataclass(frozen=True)
class StageFiles:
    """Where a stage leaves its results.

    Args:
        state: what an unfinished stage goes on from.
        best: weights of the epoch with the highest robust validation accuracy.
        last: weights after the last epoch.
    """

    state: Path
    best: Path
    last: Path


class StageRun:
    """One stage, from its first step or from a saved position to its last.

    Args:
        stage: the recipe's part.
        program: what of the network runs; its model holds the weights to start from.
        loader: training batches.
        validator: chooses the best epoch; None: the last one counts.
        threat: ball and box.
        arithmetic: number format of the passes.
        seed: names the attack's noise.
        device: where the model is.
        files: where results go.
        log: the run's metrics.
        progress: told what happens.
        stop: asked after every step; when true the stage saves itself and ends with `Interrupted`.
        save_minutes: longest time between two saved positions.
    """

    def __init__(
        self,
        stage: Stage,
        program: Program,
        loader: Loader,
        *,
        validator: Validator | None,
        threat: ThreatModel,
        arithmetic: Arithmetic,
        seed: int,
        device: torch.device,
        files: StageFiles,
        log: MetricsLog,
        progress: TrainingProgress,
        stop: Callable[[], bool],
        save_minutes: float,
    ) -> None:
        self._stage = stage
        self._program = program
        self._loader = loader
        self._validator = validator
        self._arithmetic = arithmetic
        self._seed = seed
        self._device = device
        self._files = files
        self._log = log
        self._progress = progress
        self._stop = stop
        self._save_seconds = 60.0 * save_minutes
        self._optimiser = stage.optimiser.create(program.parameters())
        self._step = TrainingStep(program, stage, threat, self._optimiser, arithmetic)

    def run(self, position: Position, saved: Saved | None = None) -> Position:
        """Train to the end of the stage.

        Args:
            position: where the stage stands.
            saved: the state to go on from; None at the stage's beginning. Its model is loaded already.

        Returns:
            The position at the stage's end, with the metrics of its best epoch.

        Raises:
            Interrupted: if asked to stop; the position is saved.
            RunError: if the loss is no longer finite.
        """
        if saved is not None and saved.optimiser is not None:
            self._optimiser.load_state_dict(saved.optimiser)
            saved.restore_generators()
        self._position = position
        self._clock = time.monotonic() - position.seconds
        self._saved_at = time.monotonic()
        for epoch in range(position.epoch, self._stage.epochs):
            self._epoch(epoch)
        write_state(self._program.model.state_dict(), self._files.last)
        if self._validator is None or not position.best:
            write_state(self._program.model.state_dict(), self._files.best)
        return position

    def _epoch(self, epoch: int) -> None:
        position = self._position
        sums = {name: torch.tensor(value, dtype=torch.float32) for name, value in position.sums.items()}
        sums = {name: value.to(self._device) for name, value in sums.items()}
        for batch in self._loader.epoch(epoch, position.step):
            self._set_rate(epoch + position.step / len(self._loader))
            streams = Streams.of(self._seed, batch.index).fork(self._stage.name, "attack", epoch)
            outcome = self._counted_step(batch, streams) if position.step_cost == 0 else self._step(batch, streams)
            self._add(sums, outcome, len(batch))
            position.step += 1
            self._progress.step(epoch + 1, outcome.terms["loss"])
            if self._stop() or time.monotonic() - self._saved_at > self._save_seconds:
                position.sums = {name: float(value) for name, value in sums.items()}
                self._save()
                if self._stop():
                    raise Interrupted(
                        f"stopped in stage {self._stage.name}, epoch {epoch + 1}, after step {position.step}; "
                        "the same command goes on from there"
                    )
        self._finish_epoch({name: float(value) for name, value in sums.items()})

    def _counted_step(self, batch: Batch, streams: Streams) -> StepOutcome:
        counter = CountFlops()
        with counter:
            outcome = self._step(batch, streams)
        self._position.step_cost = counter.total
        return outcome

    @staticmethod
    def _add(sums: dict[str, Tensor], outcome: StepOutcome, images: int) -> None:
        # Added up on the device: the loop does not wait for a step's numbers.
        for name, value in {**outcome.terms, "correct": outcome.correct}.items():
            weighted = value.float() * (1 if name == "correct" else images)
            sums[name] = sums[name] + weighted if name in sums else weighted
        sums["images"] = sums.get("images", torch.zeros(())) + images

    def _set_rate(self, epoch: float) -> None:
        rate = self._stage.optimiser.lr * self._stage.schedule.factor(epoch, self._stage.epochs)
        for group in self._optimiser.param_groups:
            group["lr"] = rate

    def _finish_epoch(self, sums: Mapping[str, float]) -> None:
        position, stage = self._position, self._stage
        means = {name: value / sums["images"] for name, value in sums.items() if name not in ("images", "correct")}
        self._check_finite(means, position.epoch + 1)
        position.epoch += 1
        line: dict[str, Any] = {
            "stage": stage.name,
            "epoch": position.epoch,
            "step": position.epoch * len(self._loader),
            "learning_rate": self._optimiser.param_groups[0]["lr"],
            **means,
            "train_accuracy": sums["correct"] / sums["images"],
        }
        last = position.epoch == stage.epochs
        if self._validator is not None and (last or position.epoch % self._validator.every == 0):
            line |= self._validator(self._program, self._arithmetic, self._device)
            if not position.best or self._rank(line) > self._rank(position.best):
                position.best = line
                write_state(self._program.model.state_dict(), self._files.best)
        line["seconds"] = round(time.monotonic() - self._clock, 3)
        self._log.write(line)
        self._progress.epoch(line)
        position.step, position.sums = 0, {}
        self._save()

    @staticmethod
    def _rank(line: Mapping[str, Any]) -> tuple[float, float]:
        return line["validation_robust"], line["validation_clean"]

    def _check_finite(self, means: Mapping[str, float], epoch: int) -> None:
        wrong = [name for name, value in means.items() if not math.isfinite(value)]
        if wrong:
            raise RunError(
                f"stage {self._stage.name}, epoch {epoch}: {', '.join(wrong)} is no longer finite; "
                f"lower optimiser.lr (now {self._stage.optimiser.lr:g}) or set runtime.precision=float32. "
                "The epochs before are kept"
            )

    def _save(self) -> None:
        self._position.seconds = time.monotonic() - self._clock
        save_position(self._files.state, self._position, self._program.model, self._optimiser)
        self._saved_at = time.monotonic()
