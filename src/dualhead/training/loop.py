"""The epochs of one stage: steps, validation, the best and the last weights, and a state to go on from."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from dualhead.attacks import predictions
from dualhead.data import Batch, Loader, OpenStream, StreamImages
from dualhead.errors import Interrupted, RunError
from dualhead.models import write_state
from dualhead.noise import Streams
from dualhead.statistics import AGAINST_OVERFITTING, overfits_single_steps
from dualhead.system.arithmetic import Arithmetic
from dualhead.system.flops import CountFlops
from dualhead.system.modes import in_eval_mode
from dualhead.system.processes import group
from dualhead.threats import Threat
from dualhead.training.averaging import WeightAverage
from dualhead.training.checkpoint import CheckpointStore, Position, Saved
from dualhead.training.curriculum import Curriculum
from dualhead.training.layer_decay import decayed_groups
from dualhead.training.metrics import MetricsLog
from dualhead.training.optimisation import LR_SCALE
from dualhead.training.passes import Passes
from dualhead.training.profiler import StepProfiler, labelled
from dualhead.training.progress import TrainingProgress
from dualhead.training.single_step import SingleStepWatch
from dualhead.training.stage import Stage
from dualhead.training.step import StepOutcome, TrainingStep
from dualhead.training.validation import Validator

logger = logging.getLogger(__name__)

PATIENCE = 10
"""Dropped steps in a row after which a stage goes back; the loop looks this often, since each look waits."""
MAX_RETREATS = 3
"""Times that a stage goes back, each with half the learning rate, before it gives up."""


class NotFinite(Exception):  # noqa: N818  # caught by the stage that raises it
    """Raised when loss or gradient is not finite too often; the message says when."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory has run out, on any device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@dataclass(frozen=True)
class StageFiles:
    """Paths of a stage's results.

    Args:
        states: saved positions of an unfinished stage.
        best: weights of the epoch with the highest robust validation accuracy; averaged ones if the stage averages.
        last: weights after the last epoch, likewise.
    """

    states: CheckpointStore
    best: Path
    last: Path

    def write_best(self, model: nn.Module) -> None:
        """Write the model's weights as those of the best epoch."""
        if group().first:
            write_state(model.state_dict(), self.best)

    def write_next(self, model: nn.Module, epoch: int) -> None:
        """Write the weights of the best epoch so far as pending, until a state that names it is saved."""
        if group().first:
            write_state(model.state_dict(), self._aside(epoch))

    def settle(self, epoch: int | None) -> None:
        """Promote the pending weights of `epoch` to `best`; delete any others that a crash left."""
        if not group().first:
            return
        for path in self.best.parent.glob(self._aside("*").name):
            if epoch is not None and path == self._aside(epoch):
                path.replace(self.best)
            else:
                path.unlink()

    def _aside(self, epoch: int | str) -> Path:
        return self.best.with_name(f"{self.best.stem}-{epoch}{self.best.suffix}")

    def write_last(self, model: nn.Module) -> None:
        """Write the model's weights as those of the last epoch."""
        if group().first:
            write_state(model.state_dict(), self.last)


FEWEST_ANSWERS = 16
"""Fewest images on which answers of one class alone are worth a warning; fewer may share a class by chance."""


class StageRun:
    """One stage, from its first step or from a saved position to its last.

    Args:
        stage: the recipe's part.
        passes: through the network; its model holds the weights to start from.
        loader: training batches.
        validator: chooses the best epoch; None: the last one counts.
        threat: what the adversary may do.
        arithmetic: number format of the passes.
        seed: names the attack's noise.
        device: where the model is.
        files: where results go.
        log: the run's metrics.
        progress: told what happens.
        stop: asked after every step; when true the stage saves itself and ends with `Interrupted`.
        save_minutes: longest time between two saved positions.
        profiler: looks at a few steps; None: nobody does.
        streams: the objective's own streams of the data, by name.
        class_weights: float32 [C] on the device, of images' losses; None for equal ones.
        memory: what the objective remembers of the network as the stage began.
        watch: looks after each epoch whether training on single steps overfits catastrophically; None: nobody does.
    """

    def __init__(
        self,
        stage: Stage,
        passes: Passes,
        loader: Loader,
        *,
        validator: Validator | None,
        threat: Threat,
        arithmetic: Arithmetic,
        seed: int,
        device: torch.device,
        files: StageFiles,
        log: MetricsLog,
        progress: TrainingProgress,
        stop: Callable[[], bool],
        save_minutes: float,
        profiler: StepProfiler | None = None,
        streams: Mapping[str, OpenStream] | None = None,
        class_weights: Tensor | None = None,
        memory: Mapping[str, Tensor] | None = None,
        watch: SingleStepWatch | None = None,
    ) -> None:
        self._stage = stage
        self._watch = watch
        self._overfits = False
        self._profiler = profiler
        self._passes = passes
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
        self._schedule = stage.schedule.in_epochs(len(loader))
        self._optimiser = stage.optimiser.create(
            passes.parameters() if stage.layer_decay is None else decayed_groups(passes, stage.layer_decay)
        )
        self._step = TrainingStep(passes, stage, threat, self._optimiser, arithmetic, class_weights, memory)
        self._streams = dict(streams or {})
        self._curriculum = Curriculum(stage.objective, len(loader) * (1 if stage.free is None else stage.free.replays))
        self._collapsed = False
        self._average = None if stage.average is None else WeightAverage(passes.model, stage.average)

    def restore(self, saved: Saved) -> None:
        """Restore a saved state, except for the model's weights, which the caller has loaded."""
        saved.restore_generators(self._device)
        if saved.optimiser is not None:
            self._optimiser.load_state_dict(saved.optimiser)
        if self._average is not None and saved.average is not None:
            self._average.load_state_dict(saved.average)
        if self._step.carried is not None:
            self._step.carried.delta = saved.carried_by(group().rank)
        if saved.objective is not None:
            self._passes.heads.load_state_dict(saved.objective["heads"])
            self._curriculum.load_state_dict(saved.objective["curriculum"], self._device)

    def run(self, position: Position) -> Position:
        """Train from a position to the end of the stage.

        Returns:
            The position at the stage's end, with the metrics of its best epoch.

        Raises:
            Interrupted: if asked to stop; the position is saved.
            RunError: if loss or gradients stay without finite values, or memory runs out.
        """
        self._position = position
        self._clock = time.monotonic() - position.seconds
        if (position.epoch, position.step) == (0, 0):
            self._save()  # so that there is always a state of this stage to go back to
        self._saved_at = time.monotonic()
        self._files.settle(position.best.get("epoch"))
        with self._profiler or nullcontext():
            self._epochs()
        with self._averaged():
            self._files.write_last(self._passes.model)
            if self._validator is None or not self._position.best:
                self._files.write_best(self._passes.model)
        return self._position

    def _epochs(self) -> None:
        while self._position.epoch < self._stage.epochs:
            try:
                self._epoch(self._position.epoch)
            except NotFinite as fault:
                self._retreat(fault)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                raise RunError(self._memory_advice()) from None

    def _epoch(self, epoch: int) -> None:
        position = self._position
        sums = {name: torch.tensor(value, dtype=torch.float32) for name, value in position.sums.items()}
        sums = {name: value.to(self._device) for name, value in sums.items()}
        self._step.guard.set_streak(position.streak)
        if self._step.begin(epoch, self._curriculum.state):
            position.step_cost = self._step.cost
        batch = None
        for batch, further in labelled("load images", self._batches(epoch, position.step)):
            self._set_rate(epoch + position.step / len(self._loader))
            noise = self._noise(batch, epoch)
            for _ in range(1 if self._stage.free is None else self._stage.free.replays):
                outcome = self._take_step(batch, noise, further)
                position.flops += position.step_cost
                self._add(sums, outcome, self._loader.global_batch)
                if self._average is not None and self._average.averaging.after_step():
                    self._average.update(outcome.taken)
                advanced = self._curriculum.add(outcome.terms, outcome.taken)
                if advanced and self._step.begin(epoch, self._curriculum.state):
                    position.step_cost = self._step.cost
            position.step += 1
            self._progress.step(epoch + 1, outcome.terms["loss"])
            if position.step % PATIENCE == 0:
                self._check_streak(outcome.terms)
            stop, due = group().any(self._stop(), time.monotonic() - self._saved_at > self._save_seconds)
            if stop or due:
                self._save_within_epoch(sums, stop=stop)
            if self._profiler is not None and position.step < len(self._loader):
                self._profiler.step()
        with record_function("end of epoch"):
            self._check_epoch(sums)
            if self._validator is None and batch is not None:
                self._warn_of_one_class(self._answers(batch.x), "training", epoch + 1)
            self._finish_epoch({name: float(value) for name, value in sums.items()})
        if self._profiler is not None:
            self._profiler.step()

    def _batches(self, epoch: int, first_step: int) -> Iterator[tuple[Batch, dict[str, StreamImages]]]:
        """Yield the batches of an epoch, each with the images of the objective's streams."""
        beside = {name: stream.epoch(epoch, first_step) for name, stream in self._streams.items()}
        for batch in self._loader.epoch(epoch, first_step):
            yield batch, {name: next(steps)(batch) for name, steps in beside.items()}

    def _noise(self, batch: Batch, epoch: int) -> Streams:
        return Streams.of(self._seed, batch.index).fork(self._stage.name, "attack", epoch)

    def _take_step(self, batch: Batch, noise: Streams, further: Mapping[str, StreamImages]) -> StepOutcome:
        """Train on a batch; count the operations of the first step of each kind."""
        if self._position.step_cost:
            return self._step(batch, noise, further)
        counter = CountFlops()
        with counter:
            outcome = self._step(batch, noise, further, one_thread=True)
        self._position.step_cost = self._step.cost = sum(group().gather(counter.total))
        return outcome

    def _save_within_epoch(self, sums: Mapping[str, Tensor], *, stop: bool) -> None:
        position = self._position
        position.sums = {name: float(value) for name, value in sums.items()}
        position.streak = int(self._step.guard.streak)
        self._save()
        if stop:
            raise Interrupted(
                f"stopped in stage {self._stage.name}, epoch {position.epoch + 1}, after step {position.step}; "
                "the same command goes on from there"
            )

    @staticmethod
    def _add(sums: dict[str, Tensor], outcome: StepOutcome, images: int) -> None:
        # Added up on the device: the loop does not wait for a step's numbers.
        taken = outcome.taken
        values = {name: term.float() * images for name, term in outcome.terms.items()}
        values |= {"correct": outcome.correct.float(), "images": taken.new_full((), images, dtype=torch.float32)}
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + torch.where(taken, value, 0.0)
        sums["dropped"] = sums.get("dropped", 0.0) + (~taken).float()

    def _memory_advice(self) -> str:
        stage = self._stage
        at_once = min(stage.micro_batch or stage.batch_size, stage.batch_size)
        smaller = f"set stages.{stage.name}.micro_batch={at_once // 2}, " if at_once > 1 else ""
        return (
            f"stage {stage.name}, epoch {self._position.epoch + 1}: out of memory with {at_once} images at once; "
            f"{smaller}or stages.{stage.name}.checkpoint_activations=true. What was saved is kept"
        )

    # ---- numbers that are not finite

    def _check_streak(self, terms: Mapping[str, Tensor]) -> None:
        if int(self._step.guard.streak) >= PATIENCE:
            seen = ", ".join(f"{name} {float(value):g}" for name, value in terms.items())
            raise NotFinite(f"in {PATIENCE} steps in a row, up to epoch {self._position.epoch + 1} ({seen})")

    def _check_epoch(self, sums: Mapping[str, Tensor]) -> None:
        """Refuse an epoch that ends amid dropped steps: a finished epoch leaves a state to go back to."""
        if float(sums["images"]) == 0:
            raise NotFinite(f"in all {self._position.step} steps of epoch {self._position.epoch + 1}")
        if int(self._step.guard.streak) >= PATIENCE:
            raise NotFinite(f"in the last {PATIENCE} steps of epoch {self._position.epoch + 1}")

    def _retreat(self, fault: NotFinite) -> None:
        """Go back to the last saved state, and halve the learning rate from there on."""
        where, rate = f"stage {self._stage.name}", self._stage.optimiser.lr
        saved = self._files.states.load(lambda position: position.streak == 0)
        if saved is None or self._position.retreats >= MAX_RETREATS:
            raise RunError(
                f"{where}: loss or gradient was not finite {fault}, also at {self._rate_factor():g} of the learning "
                f"rate; in another --run-dir lower optimiser.lr (now {rate:g}) or set runtime.precision=float32. The "
                "epochs before are kept"
            )
        self._passes.model.load_state_dict(saved.model)
        self.restore(saved)
        self._position = saved.position
        self._position.retreats += 1
        logger.warning(
            "%s: loss or gradient was not finite %s; going on from step %d of epoch %d with %g of the learning rate",
            where, fault, self._position.step, self._position.epoch + 1, self._rate_factor(),
        )  # fmt: skip
        self._save()

    def _rate_factor(self) -> float:
        return float(0.5**self._position.retreats)

    def _set_rate(self, epoch: float) -> None:
        rate = self._stage.optimiser.lr * self._schedule.factor(epoch, self._stage.epochs) * self._rate_factor()
        for parameters in self._optimiser.param_groups:
            parameters["lr"] = rate * parameters.get(LR_SCALE, 1.0)

    def _finish_epoch(self, sums: Mapping[str, float]) -> None:
        position, stage, first = self._position, self._stage, self._optimiser.param_groups[0]
        counts = ("images", "correct", "dropped")
        means = {name: value / sums["images"] for name, value in sums.items() if name not in counts}
        position.epoch += 1
        line: dict[str, Any] = {
            "stage": stage.name,
            "epoch": position.epoch,
            "step": position.epoch * len(self._loader),
            "learning_rate": first["lr"] / first.get(LR_SCALE, 1.0),
            **means,
            "train_accuracy": sums["correct"] / sums["images"],
            "dropped_steps": int(sums["dropped"]),
        }
        last = position.epoch == stage.epochs
        validates = self._validator is not None and (last or position.epoch % self._validator.every == 0)
        self._average_epoch(used=last or validates)
        if self._validator is not None and validates:
            with self._averaged():
                line |= self._validator(self._passes, self._arithmetic, self._device)
                self._warn_of_one_class(line.get("validation_largest_answer", 0.0), "held-out", line["epoch"])
                if not position.best or self._rank(line) > self._rank(position.best):
                    position.best = line
                    self._files.write_next(self._passes.model, position.epoch)
        if self._watch is not None:
            line |= self._watch(self._passes, self._arithmetic, self._device)
            self._warn_of_single_steps(line)
        line["seconds"] = round(time.monotonic() - self._clock, 3)
        self._log.write(line)
        self._progress.epoch(line)
        position.step, position.streak, position.sums = 0, 0, {}
        self._save()
        self._files.settle(position.best.get("epoch"))

    def _answers(self, x: Tensor) -> float:
        """Return the share of the most frequent answer to some training images; 0 if they are too few to tell."""
        if len(x) < FEWEST_ANSWERS or not group().first:
            return 0.0
        with in_eval_mode(self._passes.model), torch.no_grad():
            answered = predictions(self._arithmetic.wrap(self._passes.logits)(x))
        return float((answered == answered.mode().values).float().mean())

    def _warn_of_one_class(self, largest: float, images: str, epoch: int) -> None:
        """Warn when a network answers everything with one class; once, until it answers otherwise."""
        collapsed = largest == 1.0
        if collapsed and not self._collapsed and group().first:
            logger.warning(
                "stage %s, epoch %d: all %s images are taken for one class; if that lasts, training has "
                "collapsed: lower optimiser.lr (now %g) or eps, or warm up",
                self._stage.name, epoch, images, self._stage.optimiser.lr,
            )  # fmt: skip
        self._collapsed = collapsed

    def _warn_of_single_steps(self, line: Mapping[str, Any]) -> None:
        """Say that training withstands single steps alone, once until it recovers."""
        fgsm, pgd = line["watched_fgsm"], line["watched_pgd"]
        found = overfits_single_steps(fgsm, pgd)
        if found and not self._overfits and group().first:
            logger.warning(
                "stage %s, epoch %d: catastrophic overfitting: of a few images %.0f %% stay right under one step of "
                "FGSM and %.0f %% under a few of PGD; %s", self._stage.name, line["epoch"], 100 * fgsm, 100 * pgd,
                AGAINST_OVERFITTING,
            )  # fmt: skip
        self._overfits = found

    def _average_epoch(self, *, used: bool) -> None:
        """Add a finished epoch to the average; estimate its batch norm statistics if it is used now."""
        average, finished = self._average, self._position.epoch
        if average is None:
            return
        if not average.averaging.after_step() and average.averaging.starts(finished - 1):
            average.update()
        if used and average.averaging.batch_norm == "reestimate":
            with CountFlops() as counter:
                average.reestimate(self._estimates())
            self._position.flops += sum(group().gather(counter.total))

    def _estimates(self) -> Iterator[Callable[[], None]]:
        """Yield passes that estimate batch norm statistics, each head on the images that it trains on."""
        for batch, further in self._batches(0, 0):
            yield partial(self._step.estimate, batch, self._noise(batch, 0), further)

    def _averaged(self) -> AbstractContextManager[None]:
        """Put the average in place of the live weights while inside, if the stage takes one."""
        return nullcontext() if self._average is None else self._average.in_place()

    @staticmethod
    def _rank(line: Mapping[str, Any]) -> tuple[float, float]:
        return line["validation_robust"], line["validation_clean"]

    def _save(self) -> None:
        self._position.seconds = time.monotonic() - self._clock
        carried = None if self._step.carried is None else self._step.carried.delta
        objective = {"heads": self._passes.heads.state_dict(), "curriculum": self._curriculum.state_dict()}
        self._files.states.save(self._position, self._passes.model, self._optimiser, self._average, carried, objective)
        self._saved_at = time.monotonic()
