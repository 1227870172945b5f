"""A run: from a recipe to trained weights, their evaluation, and a folder that holds all of it."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from dualhead.attacks import Attack, attacks
from dualhead.data import Augmentation, Loader, Split, among, are_numbers, digests, hold_out, in_turn, match
from dualhead.errors import UserError
from dualhead.evaluation import Evaluation, EvaluationProgress, Finding, check_duplicates, evaluate, make_gallery
from dualhead.heads import DualHeadClassifier, aggregators, default_aggregator, depends_on, is_head
from dualhead.models import backbones, channel_statistics, count_parameters, load_state, read_state
from dualhead.noise import Streams
from dualhead.recipe import Recipe, Runtime, Statistics, load_recipe
from dualhead.report import write_report
from dualhead.runs.folder import DIGESTS, changes, data_facts, read_recipe, refuse_other_data, write_digests
from dualhead.saving import (
    CONFIG,
    Architecture,
    load,
    load_base_weights,
    normalisation_of,
    read_config,
    save_model,
    view,
    write_card,
    write_config,
)
from dualhead.system.files import write_json, write_text
from dualhead.system.flops import CountFlops
from dualhead.system.lock import FolderLock
from dualhead.system.processes import group
from dualhead.system.runtime import (
    Arithmetic,
    Precision,
    choose_arithmetic,
    describe_environment,
    find_device,
    float32_products,
    in_eval_mode,
    processors,
    refuse_tf32,
    room_for_images,
    slowdown_by_bf16,
    synchronised_batch_norm,
    with_lanes,
)
from dualhead.threats import ThreatModel
from dualhead.training import (
    RESET,
    CheckpointStore,
    MetricsLog,
    Position,
    Program,
    Saved,
    Selection,
    Silent,
    Stage,
    StageFiles,
    StageRun,
    StepProfiler,
    TrainingProgress,
    Validator,
    check_choosable,
    summary_writer,
)

_log = logging.getLogger(__name__)

BASE = "base model"
ROWS = {"mean": "mean of heads", "aggregate": "DH-AT"}
"""What tables call the outputs of a dual-head model that are no heads; those are `head 1`, `head 2`, ..."""

GALLERY = "gallery.npz"
REPORT = "report.html"
"""The last that a run writes."""
"""Images under attack, for the report."""


@dataclass(frozen=True)
class Row:
    """One line of a comparison: an output of the run's model, or its base model as it was before the second head.

    Args:
        name: as tables call it.
        evaluation: what was measured.
        parameters: of the modules that the output runs.
        flops: floating-point operations of its training.
        forward_equivalents: the same in forward passes of one image through the base model.
        seconds: of its training.
    """

    name: str
    evaluation: Evaluation
    parameters: int
    flops: int
    forward_equivalents: float
    seconds: float

    def describe(self) -> dict[str, Any]:
        """As `comparison.json` holds it."""
        return {
            "name": self.name,
            "clean_accuracy": self.evaluation.clean_accuracy,
            "robust_accuracy": dict(self.evaluation.robust_accuracy),
            "intervals": {name: list(ends) for name, ends in self.evaluation.intervals.items()},
            "parameters": self.parameters,
            "training_cost": {
                "flops": self.flops,
                "forward_equivalents": round(self.forward_equivalents, 1),
                "seconds": round(self.seconds, 1),
            },
        }


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Args:
        run_dir: the folder that holds it.
        model: the deployed classifier, in eval mode.
        rows: the evaluations, the deployed one last.
    """

    run_dir: Path
    model: nn.Module
    rows: tuple[Row, ...]


def train(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    run_dir: str | Path | None = None,
    progress: TrainingProgress | None = None,
    evaluation_progress: Callable[[str], EvaluationProgress] | None = None,
    stop: Callable[[], bool] = lambda: False,
    command: str | None = None,
    profile: bool = False,
) -> RunResult:
    """Train as a recipe says and evaluate what came of it; in a folder with an unfinished run, go on with it.

    In a group of processes (`dualhead.system.processes`) each calls this with the same arguments and trains on its
    share of every batch; the first one writes, and is the only one to tell of progress.

    Args:
        recipe: a recipe, the name of a shipped one, or a path to a YAML file.
        overrides: `KEY=VALUE` with dotted keys, for a recipe by name or path.
        run_dir: the run's folder; None for `runs/NAME`.
        progress: told of stages, steps and epochs.
        evaluation_progress: gives, for the name of a row, who is told of its evaluation.
        stop: asked after every step; when true the run saves itself and raises `Interrupted`.
        command: what the user typed, kept with the results.
        profile: look at a few steps of each stage, and leave what takes how long in the run's folder, in `profile`.

    Raises:
        UserError: for a bad recipe, bad data, or a folder that holds another run or where another process works;
            nothing is written then.
        Interrupted: when stopped.
        RunError: when training fails.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(str(recipe), overrides)
    elif overrides:
        raise UserError("overrides apply to a recipe by name or path, not to one that is built already")
    processes = group()
    if not processes.first:
        progress = evaluation_progress = None
    run = Run(recipe, Path(run_dir) if run_dir is not None else Path("runs") / recipe.name)
    with ExitStack() as held:

        def take_folder() -> None:
            held.enter_context(FolderLock(run.folder))

        processes.lead(take_folder)
        with float32_products(tf32=recipe.runtime.precision == "tf32"):
            run.train(progress or Silent(), stop, profile=profile)
        rows = run.evaluate(evaluation_progress, command, stop)
    processes.lead(lambda: write_report([run.folder], run.folder / REPORT))
    return RunResult(run.folder, view(run.model, run.output), tuple(rows))


def _precision(runtime: Runtime) -> Precision:
    """What passes run in; to round the products of float32 is up to `float32_products`."""
    return "float32" if runtime.precision == "tf32" else runtime.precision


class Run:
    """A recipe with its data and its network, in a folder.

    Nothing is written before recipe, data and network have been found to fit one another.

    Args:
        recipe: what to do.
        folder: where.

    Raises:
        UserError: for bad data, a network that does not fit them, or a folder that holds another run.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        processes = group()
        processes.lead(lambda: changes(folder, recipe))
        self.device = processes.agreed(lambda: find_device(recipe.runtime.device))
        self.room = room_for_images(self.device)
        whole, self.test = processes.in_turn(lambda: load_data(recipe, self.room))
        self.extra = processes.in_turn(lambda: load_extra(recipe, whole, self.room))
        self.data_facts = processes.lead(lambda: self._refuse_other_data(whole))
        processes.agreed(lambda: self._fit(whole))
        self.output = recipe.stages[-1].output
        self.position = Position()
        self._states = CheckpointStore(folder / "checkpoints" / "states")
        self._saved: Saved | None = None

    def _refuse_other_data(self, whole: Split) -> dict[str, Any]:
        """Facts about the images, by the key that names their source, if a run that has begun may go on with them."""
        sources = {"data": (whole, self.recipe.data.source)}
        if self.extra is not None and self.recipe.data.extra is not None:
            sources["data.extra"] = (self.extra, self.recipe.data.extra.source)
        facts = {part: data_facts(split) for part, (split, _) in sources.items()}
        for part, (_, source) in sources.items():
            refuse_other_data(self.folder, facts[part], source, part)
        return facts

    def _fit(self, whole: Split) -> None:
        """Make the network for the data, and refuse what does not fit."""
        recipe = self.recipe
        if recipe.runtime.precision == "tf32":
            refuse_tf32(self.device)
        if recipe.runtime.tensorboard:
            summary_writer()
        amount = recipe.data.validation
        self.held_out: Split | None
        try:
            self.training, self.held_out = hold_out(whole, amount, recipe.runtime.seed) if amount else (whole, None)
        except UserError as error:
            raise UserError(f"data.validation: {error}") from None
        if self.held_out is not None and recipe.data.train_size and recipe.data.image_size:
            self.held_out = self.held_out.show_middle(*recipe.data.image_size)
        self._check_validation()
        self._check_augmented()
        self._check_evaluation()
        self.architecture = self._architecture()
        torch.manual_seed(recipe.runtime.seed)
        self.model = self.architecture.create().to(self.device)
        self._check_attacks()
        self._check_stages()
        if self._synchronises:
            self.model = synchronised_batch_norm(self.model, self.device)

    @property
    def _synchronises(self) -> bool:
        return self.recipe.runtime.batch_norm == "synchronised" and group().world > 1

    def _architecture(self) -> Architecture:
        """The network, which normalises as the weights do that it starts from, unless the recipe says how."""
        made = architecture_of(self.recipe, self.training)
        if self.recipe.model.normalize is not None or self.recipe.model.backbone.registered_name == "factory":
            return made
        begun = (self.folder / "config.yaml").is_file()
        if begun and (self.folder / "checkpoints" / CONFIG).is_file():  # what it started from may have gone since
            found = normalisation_of(self.folder / "checkpoints")
            return made if found is None else made.model_copy(update={"mean": found[0], "std": found[1]})
        for index, stage in enumerate(self.recipe.stages):
            try:
                found = normalisation_of(stage.init) if stage.init not in (None, RESET) else None
            except UserError as error:
                raise UserError(f"stages.{index}.init: {error}") from None
            if found is not None:
                return made.model_copy(update={"mean": found[0], "std": found[1]})
        found = self.recipe.model.backbone.published_normalisation()
        return made if found is None else made.model_copy(update={"mean": found[0], "std": found[1]})

    def _learnt_from(self) -> dict[str, Split | None]:
        return {"training": self.training, "extra": self.extra, "held-out": self.held_out}

    def _duplicates(self) -> Finding:
        """Whether images are in two of the sets that the run learns from and is measured on."""
        sets = {**self._learnt_from(), "test": self.test}
        known = {name: split for name, split in sets.items() if split is not None}
        read = {name: digests(split) for name, split in known.items() if not split.is_stored}
        return check_duplicates(read, [name for name in known if name not in read])

    # ---- the folder

    def _stage_file(self, stage: Stage, which: str) -> Path:
        return self.folder / "checkpoints" / stage.name / f"{which}.safetensors"

    def _check_validation(self) -> None:
        for index, stage in enumerate(self.recipe.stages):
            if self.held_out is None and stage.keep == "best":
                raise UserError(
                    f"stages.{index}.keep: best needs held-out images, but data.validation is 0; "
                    "set keep: last or data.validation: 0.02"
                )
            if self.held_out is None and stage.fit is not None:
                raise UserError(f"stages.{index}.fit: needs held-out images, but data.validation is 0; set it to 0.02")

    def _check_augmented(self) -> None:
        """What augmentations leave of a training image is what the model sees."""
        data = self.recipe.data
        seen = data.image_size or self.training.image_shape[1:]
        for index, stage in enumerate(self.recipe.stages):
            image = torch.zeros(1, *self.training.image_shape, dtype=torch.uint8)
            for augmentation in self._augmentations(stage):
                image = augmentation(image, Streams.of(0, torch.arange(1)))
            if tuple(image.shape[2:]) != tuple(seen):
                key = "data.augment" if stage.augment is None else f"stages.{index}.augment"
                height, width = image.shape[2:]
                raise UserError(
                    f"{key}: training images come out as {height}x{width}, but the model takes {seen[0]}x{seen[1]}; "
                    f"cut that out with {{name: random_resized_crop, size: [{seen[0]}, {seen[1]}]}}"
                )

    def _check_attacks(self) -> None:
        """Every output of the model is measured, also those of one head: something must attack each."""
        for_heads = [name for name, attack in self._attacks().items() if attack.needs_heads]
        if for_heads and not isinstance(self.model, DualHeadClassifier):
            raise UserError(f"evaluate.attacks: {for_heads[0]} needs several heads, and this model has one")
        if for_heads and len(for_heads) == len(self._attacks()):
            raise UserError(
                f"evaluate.attacks: {for_heads[0]} cannot attack the outputs of one head, which are measured beside "
                "the aggregate; add one that can, such as autoattack"
            )

    def _attacks(self) -> dict[str, Attack]:
        """Those of the final evaluation, by label."""
        built = [attacks.build(spec, "evaluate.attacks") for spec in self.recipe.evaluate.attacks]
        return {attack.label: attack for attack in built}

    def _check_evaluation(self) -> None:
        """An evaluation holds its images in memory, also those of a set that stays on disk."""
        self.test.warn_if_sorted(self._evaluated, "evaluate.limit")
        count, free = self._evaluated, 4 * self.room
        size = count * math.prod(self.test.image_shape)
        if self.test.is_stored and size > free:
            raise UserError(
                f"evaluate.limit: an evaluation holds its images in memory, and {count:,} of them take "
                f"{size / 2**30:.1f} GiB of {free / 2**30:.1f} that are free; set {free // (size // count)} or less"
            )

    @property
    def _evaluated(self) -> int:
        """Number of test images that are measured."""
        return min(self.recipe.evaluate.limit or len(self.test), len(self.test))

    def _augmentations(self, stage: Stage) -> tuple[Augmentation, ...]:
        return self.recipe.data.augment if stage.augment is None else stage.augment

    def _check_stages(self) -> None:
        """A stage that cannot be is refused now, not after the hours before it."""
        begun = (self.folder / "config.yaml").is_file()  # then a stage's first weights may have gone since
        for index, stage in enumerate(self.recipe.stages):
            learning = Program.of(self.model, stage).parameters()
            if stage.fit is None and stage.epochs and not learning:
                raise UserError(
                    f"stages.{index}.train: {', '.join(stage.train)} has no weights that learn, as of the aggregators "
                    "mean and mixed_nuts; leave the stage out, and let the one before it say what to deploy"
                )
            self._warn_of_idle(stage)
            if stage.objective.adversarial and stage.fit is None and stage.free is None and stage.epochs:
                _warn_of_reach(f"stages.{index}.attack", stage.attack, stage.threat(self.recipe.threat))
            if stage.fit is not None:
                try:
                    check_choosable(self.model)
                except UserError as error:
                    raise UserError(f"stages.{index}.fit: {error}") from None
            if self._synchronises and stage.micro_batch is not None and stage.batch_size % group().world:
                raise UserError(
                    f"stages.{index}.batch_size: must be a multiple of the {group().world} processes, since "
                    f"synchronised batch norm needs as many micro-batches in each; got {stage.batch_size}"
                )
            if stage.helper is not None:
                try:
                    self._check_helper(index, stage.helper.weights, begun=begun)
                except UserError as error:
                    raise UserError(f"stages.{index}.helper.weights: {error}") from None
            if stage.checkpoint_activations and self.recipe.runtime.compile:
                raise UserError(f"stages.{index}.checkpoint_activations: not with runtime.compile; set one to false")
            if stage.init is not None and not begun:
                try:
                    self._start_from(copy.deepcopy(self.model), stage)
                except UserError as error:
                    raise UserError(f"stages.{index}.init: {error}") from None

        if self.held_out is not None:
            _warn_of_reach("validation.attack", self.recipe.validation.attack, self.recipe.threat)

    @staticmethod
    def _warn_of_idle(stage: Stage) -> None:
        """A word on settings that begin only after the stage's end, as when it was shortened for a trial."""
        late = {
            "awp.start": None if stage.awp is None else stage.awp.start,
            "average.start": getattr(stage.average, "start", None),
            "schedule.warmup": getattr(stage.schedule, "warmup", None),
        }
        for key, start in late.items():
            if start and start >= stage.epochs > 0:
                _log.warning(
                    "stage %s: %s is %g, and the stage has %d epochs: it ends before that", stage.name, key, start,
                    stage.epochs,
                )  # fmt: skip

    def _start_from(self, model: nn.Module, stage: Stage) -> None:
        if stage.init == RESET:
            fresh = self._fresh()
            for part in stage.train:
                own, new = (model, fresh) if part == "model" else (model.get_submodule(part), fresh.get_submodule(part))
                own.load_state_dict(new.state_dict())
        elif stage.init is not None:
            load_base_weights(model, stage.init, self.architecture, replace_classifier=stage.replace_classifier)

    def _fresh(self) -> nn.Module:
        """The network as the run began with it; torch's generator stays where it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.runtime.seed)
            return self.architecture.create()

    def _check_helper(self, number: int, weights: str, *, begun: bool) -> None:
        if self._earlier(number, weights) is None and not begun:
            self._check_labels(load(weights), weights)

    def _check_labels(self, model: nn.Module, weights: str) -> None:
        image = torch.zeros(1, *self.architecture.image_shape)
        try:
            with torch.no_grad():
                given = model(image).shape[1]
        except RuntimeError as error:
            raise UserError(f"{weights}: does not take images {list(image.shape[1:])}: {error}") from None
        if given != self.architecture.num_classes:
            raise UserError(f"{weights}: knows {given} classes, the data have {self.architecture.num_classes}")

    def _earlier(self, number: int, name: str) -> Stage | None:
        """The stage of that name among those before a stage."""
        return next((stage for stage in self.recipe.stages[:number] if stage.name == name), None)

    def _helper(self, number: int) -> nn.Module | None:
        """The model that a stage's `helper` names."""
        settings = self.recipe.stages[number].helper
        if settings is None:
            return None
        stage = self._earlier(number, settings.weights)
        if stage is None:
            return load(settings.weights).to(self.device)
        model = self._fresh()
        self._load_stage(model, stage)
        return view(model, stage.output).to(self.device)

    def _make_folder(self) -> None:
        # Again, since another process may have been here before the folder was locked.
        changed = changes(self.folder, self.recipe)
        for unfinished in self.folder.rglob(".*.tmp"):  # of a process that was killed while it wrote
            unfinished.unlink()
        if changed:
            told = ", ".join(f"{key}={value}" for key, value in sorted(changed.items()))
            _log.warning("%s: goes on with %s", self.folder, told)
        elif (self.folder / "config.yaml").is_file():
            return
        else:
            write_config(self.folder / "checkpoints", self.architecture, {**self._facts(), **self.data_facts})
        write_text(self.folder / "config.yaml", yaml.safe_dump(self.recipe.resolved(), sort_keys=False))
        if not (self.folder / "checkpoints" / DIGESTS).is_file():
            write_digests(self.folder, self._learnt_from())

    def _open(self) -> Arithmetic:
        """Make the folder, or find in it where the run stands; all processes get the first one's weights."""
        processes = group()
        processes.lead(self._make_folder)
        self._saved = self._states.load()
        if self._saved is not None:
            self.position = self._saved.position
            load_state(self.model, self._saved.model, str(self._states.folder))
        arithmetic = processes.lead(self._arithmetic)
        arithmetic.lay_out(self.model)
        processes.share_state(self.model)
        if self._saved is None and not processes.first:
            torch.manual_seed(self.recipe.runtime.seed + processes.rank)  # dropout of its own for each share
        if self._saved is not None and self._saved.optimiser is None:  # between stages: what comes next draws from here
            self._saved.restore_generators(self.device)
            self._saved = None
        return arithmetic

    def _arithmetic(self) -> Arithmetic:
        environment_file = self.folder / "environment.json"
        if self._saved is not None and environment_file.is_file():  # it is kept, whatever would be faster now
            known = yaml.safe_load(environment_file.read_text(encoding="utf-8"))
            if lacking := {"precision", "channels_last", "lanes"} - set(known):
                raise UserError(
                    f"{environment_file}: an earlier version began this run, and did not write down "
                    f"{min(lacking)}; finish it with that version, or choose another --run-dir"
                )
            bf16 = known["precision"] == "bf16"
            return Arithmetic(bf16, known["channels_last"], known["lanes"], self.recipe.runtime.compile)
        shape = (min(128, self.recipe.stages[0].batch_size), *self.architecture.image_shape)
        example = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        runtime = self.recipe.runtime
        chosen = choose_arithmetic(_precision(runtime), self.model, example, runtime.layout)
        if runtime.precision == "bf16" and self.device.type == "cpu":
            slower = slowdown_by_bf16(chosen, self.model, example)
            if slower > 1.5:
                _log.warning(
                    "runtime.precision: on this CPU bf16 takes %.1f times as long as float32; "
                    "auto takes the faster one", slower,
                )  # fmt: skip
        lanes = 1 if runtime.compile else runtime.lanes
        chosen = replace(chosen, compiled=runtime.compile)
        chosen = with_lanes(chosen, self.model, example) if lanes == "auto" else replace(chosen, lanes=lanes)
        name = "tf32" if runtime.precision == "tf32" else chosen.name
        facts = {"precision": name, "channels_last": chosen.channels_last, "lanes": chosen.lanes}
        facts["compiled"] = chosen.compiled
        write_json(environment_file, {**describe_environment(self.device), **facts})
        return chosen

    # ---- training

    def train(self, progress: TrainingProgress, stop: Callable[[], bool], *, profile: bool = False) -> None:
        """Do the stages that are not done yet, and write the model; of several processes the first is profiled."""
        profile = profile and group().first
        arithmetic = self._open()
        log = MetricsLog(
            self.folder / "metrics.jsonl",
            keep=self._is_past,
            tensorboard=self.folder / "tensorboard" if self.recipe.runtime.tensorboard else None,
        )
        while self.position.stage < len(self.recipe.stages):
            number = self.position.stage
            if self.recipe.stages[number].fit is None:
                self._train_stage(number, arithmetic, log, progress, stop, profile=profile)
            else:
                self._fit_stage(number, arithmetic, log, progress, stop)
        if self._synchronises:  # what is measured and saved is the network of the architecture
            trained, self.model = self.model.state_dict(), self.architecture.create().to(self.device)
            load_state(self.model, trained, "trained weights")
            arithmetic.lay_out(self.model)
        group().lead(lambda: save_model(self.folder / "model", self.model, self.architecture, self._facts()))

    def _facts(self) -> dict[str, Any]:
        return {
            "class_names": list(self.training.class_names),
            "threat": {"norm": self.recipe.threat.norm, "eps": self.recipe.threat.eps},
            "output": self.output,
            "recipe": self.recipe.name,
            **self.recipe.data.reading(),
        }

    def _is_past(self, line: Mapping[str, Any]) -> bool:
        numbers = {stage.name: number for number, stage in enumerate(self.recipe.stages)}
        return (numbers.get(line["stage"], -1), line["epoch"]) <= (self.position.stage, self.position.epoch)

    def _train_stage(
        self,
        number: int,
        arithmetic: Arithmetic,
        log: MetricsLog,
        progress: TrainingProgress,
        stop: Callable[[], bool],
        *,
        profile: bool,
    ) -> None:
        recipe, stage = self.recipe, self.recipe.stages[number]
        if self._saved is None:
            self._prepare_stage(number)
        program = Program.of(self.model, stage)
        loader = Loader(
            self.training, stage.batch_size, seed=recipe.runtime.seed + number,
            augment=self._augmentations(stage),
            cutmix=stage.cutmix, extra=self.extra, fraction=recipe.data.extra.fraction if recipe.data.extra else 0.0,
            device=self.device, group=group(),
        )  # fmt: skip
        progress.stage(
            stage.name, number + 1, len(recipe.stages), stage.epochs, len(loader),
            self.position.epoch * len(loader) + self.position.step,
        )  # fmt: skip
        run = StageRun(
            stage,
            program,
            loader,
            validator=self._validator(),
            threat=stage.threat(recipe.threat),
            arithmetic=arithmetic,
            seed=recipe.runtime.seed,
            device=self.device,
            files=StageFiles(self._states, self._stage_file(stage, "best"), self._stage_file(stage, "last")),
            log=log,
            progress=progress,
            stop=stop,
            save_minutes=recipe.runtime.save_minutes,
            profiler=StepProfiler(self.folder / "profile", stage.name, self.device) if profile else None,
            helper=self._helper(number),
        )
        if self._saved is not None:
            run.restore(self._saved)
            self._saved = None
        finished = run.run(self.position)
        self._close_stage(stage, finished, len(loader))

    def _fit_stage(
        self,
        number: int,
        arithmetic: Arithmetic,
        log: MetricsLog,
        progress: TrainingProgress,
        stop: Callable[[], bool],
    ) -> None:
        """Choose the aggregator's parameters; short, so that a stage that was stopped begins anew."""
        stage, validator = self.recipe.stages[number], self._validator()
        assert isinstance(self.model, DualHeadClassifier) and stage.fit is not None and validator is not None
        self._prepare_stage(number)
        progress.stage(stage.name, number + 1, len(self.recipe.stages), 0, 0, 0)
        selection = Selection(self.model, stage.fit, validator, arithmetic, self.device, stop)
        finished = selection.run(Position(stage=number))
        line = {"stage": stage.name, "epoch": 1, "step": 0, **finished.best, "seconds": round(finished.seconds, 3)}
        log.write(line)
        files = StageFiles(self._states, self._stage_file(stage, "best"), self._stage_file(stage, "last"))
        files.write_best(self.model)
        files.write_last(self.model)
        self._close_stage(stage, finished, 0)

    def _prepare_stage(self, number: int) -> None:
        stage = self.recipe.stages[number]
        if stage.init is not None:
            group().lead(lambda: self._start_from(self.model, stage))
            group().share_state(self.model)
        if isinstance(self.model, DualHeadClassifier) and self.recipe.model.second_head == "clone":
            trained = {part for earlier in self.recipe.stages[:number] for part in earlier.train}
            for head in set(self.model.heads[1:]) & set(stage.train) - trained:
                self.model.get_submodule(head).load_state_dict(self.model.head1.state_dict())

    def _close_stage(self, stage: Stage, finished: Position, steps: int) -> None:
        kept = self._stage_file(stage, stage.keep)
        summary = {
            "stage": stage.name,
            "epochs": finished.epoch,
            "seconds": round(finished.seconds, 3),
            "steps": finished.epoch * steps,
            "flops": finished.flops,
            "best": finished.best or None,
            "kept": stage.keep,
        }
        group().lead(lambda: write_json(kept.parent / "summary.json", summary))
        self._load_stage(self.model, stage)
        self.position = Position(stage=finished.stage + 1)
        self._states.save(self.position, self.model, None)

    def _load_stage(self, model: nn.Module, stage: Stage) -> None:
        """Give a network the weights that a finished stage keeps."""
        path = self._stage_file(stage, stage.keep)
        load_state(model, group().lead(lambda: read_state(path)), str(path))

    def _validator(self) -> Validator | None:
        if self.held_out is None:
            return None
        settings = self.recipe.validation
        return Validator(self.held_out, settings.attack, settings.every, self.recipe.threat, self.recipe.runtime.seed)

    # ---- evaluation

    def evaluate(
        self,
        progress: Callable[[str], EvaluationProgress] | None,
        command: str | None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Row]:
        """Measure every output of the finished model, and its base model, on the test images.

        The deployed output's results lie in `evaluation/`, the others' in `evaluation/rows/`, all of them side by side
        in `comparison.json`.
        """
        settings = self.recipe.evaluate
        images, labels = self.test.images[: self._evaluated], self.test.labels[: self._evaluated]
        costs, unit = group().lead(self._costs), self._forward_flops()
        checks = [self._duplicates()]
        rows = []
        for name, model, output in self._outputs():
            model.eval()
            deployed = output == self.output and name != BASE
            folder = self.folder / "evaluation"
            evaluation = evaluate(
                model,
                images,
                labels,
                threat=self.recipe.threat,
                attacks=[a for a in self._attacks().values() if hasattr(model, "head_logits") or not a.needs_heads],
                batch_size=settings.batch_size,
                seed=self.recipe.runtime.seed,
                precision=_precision(self.recipe.runtime),
                class_names=list(self.test.class_names),
                skipped=len(self.test.skipped),
                checks=checks,
                output_dir=folder if deployed else folder / "rows" / name.replace(" ", "_"),
                progress=progress(name) if progress else None,
                command=command,
                stop=stop,
            )
            flops, seconds = costs["base" if name == BASE else output]
            rows.append(Row(name, evaluation, self._parameters(output), flops, flops / unit, seconds))
        rows.sort(key=lambda row: row.name == self._row_name(self.output))
        group().lead(lambda: self._write_rows(rows))
        return rows

    def _write_rows(self, rows: Sequence[Row]) -> None:
        write_json(self.folder / "comparison.json", {"rows": [row.describe() for row in rows]})
        write_card(self.folder / "model", self.folder)
        settings = self.recipe.evaluate
        shown = min(settings.gallery, len(self.test))
        if shown and not (self.folder / "evaluation" / GALLERY).is_file():
            gallery = make_gallery(
                view(self.model, self.output),
                self.test.images[:shown],
                self.test.labels[:shown],
                threat=self.recipe.threat,
                seed=self.recipe.runtime.seed,
                batch_size=settings.batch_size,
            )
            gallery.save(self.folder / "evaluation" / GALLERY)

    def _row_name(self, output: str) -> str:
        if is_head(output):
            return output.replace("head", "head ")
        return ROWS.get(output, self.recipe.name)

    def _outputs(self) -> Iterator[tuple[str, nn.Module, str]]:
        """Row, classifier and output of all that is evaluated; the base model has the weights it was left with."""
        if not isinstance(self.model, DualHeadClassifier):
            yield self._row_name("model"), self.model, "model"
            return
        first = self._base_stages()
        if first:
            base = self.architecture.create().to(self.device)
            self._load_stage(base, first[-1])
            yield BASE, view(base, "head1"), "head1"
        # With the aggregator `mean` two outputs are one: only what is deployed is measured.
        same = {"mean", "aggregate"} if self.model.is_mean else set()
        kept = self.output if self.output in same else "mean"
        for output in self.model.outputs:
            if output not in same or output == kept:
                yield self._row_name(output), view(self.model, output), output

    def _base_stages(self) -> list[Stage]:
        """The stages that make the base model: those before any other part than trunk and head 1 is trained."""
        return list(takewhile(lambda stage: set(stage.train) <= {"trunk", "head1"}, self.recipe.stages))

    def _parameters(self, output: str) -> int:
        if not isinstance(self.model, DualHeadClassifier):
            return count_parameters(self.model)
        used = [part for part in self.model.parts if depends_on(output, part)]
        return sum(count_parameters(self.model.get_submodule(part)) for part in used)

    def _costs(self) -> dict[str, tuple[int, float]]:
        """Training cost of each output, in floating-point operations and in seconds.

        An output costs the stages up to the last one that trains a part it runs.
        """
        stages = []
        for stage in self.recipe.stages:
            path = self._stage_file(stage, stage.keep).parent / "summary.json"
            summary = yaml.safe_load(path.read_text(encoding="utf-8"))
            stages.append((set(stage.train), summary["flops"], summary["seconds"]))
        needed = {"model": {"model"}}
        if isinstance(self.model, DualHeadClassifier):
            needed = {o: {part for part in self.model.parts if depends_on(o, part)} for o in self.model.outputs}
        base = stages[: len(self._base_stages())]
        costs = {"base": (sum(s[1] for s in base), sum(s[2] for s in base))}
        for output, parts in needed.items():
            reached = max((n + 1 for n, (trained, _, _) in enumerate(stages) if trained & parts), default=0)
            costs[output] = (sum(s[1] for s in stages[:reached]), sum(s[2] for s in stages[:reached]))
        return costs

    def _forward_flops(self) -> int:
        base = view(self.model, "head1") if isinstance(self.model, DualHeadClassifier) else self.model
        example = torch.zeros(1, *self.architecture.image_shape, device=self.device)
        counter = CountFlops()
        with counter, in_eval_mode(base), torch.no_grad():
            base(example)
        return counter.total


def load_data(recipe: Recipe, room: int | None = None) -> tuple[Split, Split]:
    """Training and test images as a recipe names them; on disk if they would take more memory than there is room."""
    data = recipe.data
    training, test = (data.load(part, room=room, workers=processors()) for part in ("train", "test"))
    source = f"data.source {data.source}"
    test = _among_training(test, training, source, f"{source}: training and test images have different classes")
    if test.image_shape[0] != training.image_shape[0]:
        raise UserError(
            f"data.source {data.source}: training and test images differ in channels (grey and colour); "
            "data.channels=3 reads all as colours, 1 as grey"
        )
    return training, test


def load_extra(recipe: Recipe, training: Split, room: int | None = None) -> Split | None:
    """The second source of training images; None if the recipe names none.

    Raises:
        UserError: if they cannot be read, or are not of the same classes and shape.
    """
    try:
        extra = recipe.data.load_extra(room=room, workers=processors())
    except UserError as error:
        raise UserError(f"data.extra: {error}") from None
    if recipe.data.extra is None or extra is None:
        return None
    ours, name = f"data.source {recipe.data.source}", f"data.extra.source {recipe.data.extra.source}"
    extra = _among_training(extra, training, ours, f"{name}: its images have other classes than those of {ours}")
    if extra.image_shape != training.image_shape:
        raise UserError(
            f"{name}: its images have shape {_told(extra.image_shape)}, those of data.source "
            f"{_told(training.image_shape)}; both must agree"
        )
    return extra


def _among_training(split: Split, training: Split, source: str, refusal: str) -> Split:
    """Images among the classes of the training images: by name, or in their order where one side has numbers alone.

    Raises:
        UserError: beginning with `refusal`, if the classes are others.
    """
    theirs, ours = split.class_names, training.class_names
    trusted = are_numbers(theirs) != are_numbers(ours) and len(theirs) == len(ours)
    if match(theirs, ours) is None and not trusted:
        raise UserError(f"{refusal} ({_told(theirs)} in place of {_told(ours)}); the names must agree")
    return replace(among(split, ours, source), class_names=ours)


def _told(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:4])) + (f" and {len(values) - 4} more" if len(values) > 4 else "")


def _warn_of_reach(key: str, attack: Attack, threat: ThreatModel) -> None:
    """A word on steps that are left over from another radius or norm: they end inside the ball."""
    steps, length = getattr(attack, "steps", 1), getattr(attack, "step_size", None)
    if length is not None and steps * length < threat.eps:
        _log.warning(
            "%s: steps=%d of %.3g reach %.3g, and eps is %.3g; leave step_size out (null) for 2.5 eps / steps", key,
            steps, length, steps * length, threat.eps,
        )  # fmt: skip


def architecture_of(recipe: Recipe, training: Split) -> Architecture:
    """The network that a recipe means for its data."""
    channels, classes = training.image_shape[0], len(training.class_names)
    imported = recipe.model.backbone.registered_name == "factory"
    normalize = recipe.model.normalize or ("none" if imported else "data")
    if normalize == "data":
        mean, std = channel_statistics(_pieces(training))
        std = tuple(deviation or 1.0 for deviation in std)  # a channel that never varies keeps its scale
    elif isinstance(normalize, Statistics):
        mean, std = normalize.mean, normalize.std
    else:
        mean, std = (0.0,) * channels, (1.0,) * channels
    aggregator = recipe.model.aggregator or aggregators.build(default_aggregator(classes))
    return Architecture(
        backbone=backbones.describe(recipe.model.backbone),
        attach_at=recipe.model.attach_at,
        aggregator=aggregators.describe(aggregator) if recipe.model.attach_at else None,
        heads=recipe.model.heads,
        num_classes=classes,
        image_shape=(channels, *(recipe.data.image_size or training.image_shape[1:])),
        mean=mean,
        std=std,
    )


def _pieces(split: Split) -> Iterator[Tensor]:
    """The images of a split, some at a time; those on disk are all read for it."""
    if split.is_stored:
        _log.info("reading %d images for their mean and deviation; model.normalize may give these", len(split))
    return in_turn(split.images, torch.split(torch.arange(len(split)), 256), "cpu")


def load_stage(folder: Path, stage: str | None = None, checkpoint: str | None = None) -> tuple[nn.Module, str]:
    """The network of a run as a finished stage left it, and the output that the stage trained.

    Args:
        folder: of the run.
        stage: its name; None for the last finished one.
        checkpoint: `best` or `last` epoch; None for the one that the recipe keeps.

    Raises:
        UserError: if the stage does not exist or is not finished.
    """
    recipe = read_recipe(folder)
    finished = [s for s in recipe.stages if (folder / "checkpoints" / s.name / "summary.json").is_file()]
    if not finished:
        raise UserError(f"{folder}: no stage is finished yet; `dualhead train` with the same recipe goes on with it")
    names = ", ".join(s.name for s in finished)
    chosen = next((s for s in finished if s.name == stage), None) if stage is not None else finished[-1]
    if chosen is None:
        raise UserError(f"--stage {stage}: not a finished stage of {folder}; finished: {names}")
    if checkpoint not in (None, "best", "last"):
        raise UserError(f"--checkpoint {checkpoint}: use best or last")
    config = read_config(folder / "checkpoints")
    model = Architecture.parse(config["architecture"], str(folder / "checkpoints")).create()
    path = folder / "checkpoints" / chosen.name / f"{checkpoint or chosen.keep}.safetensors"
    load_state(model, read_state(path), str(path))
    return model, chosen.output
