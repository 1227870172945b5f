"""Train the stages of a run, from where its folder stands to the finished model."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from dualhead.data import Loader, OpenStream, Split, StreamSetting, batches
from dualhead.errors import Interrupted, UserError
from dualhead.heads import DualHeadClassifier
from dualhead.models import load_state, read_state, write_state
from dualhead.noise import Streams
from dualhead.objectives import BEFORE, Before
from dualhead.recipe import Runtime
from dualhead.runs.folder import load_kept, open_folder, write_digests, write_manifest
from dualhead.runs.images import augmentations_of, class_weights
from dualhead.runs.prepare import (
    Prepared,
    chosen_under,
    earlier_stage,
    fresh_model,
    passes_of,
    start_from,
    synchronises,
)
from dualhead.saving import load, read_config, save_model, view
from dualhead.system.arithmetic import Arithmetic, Precision, choose_arithmetic, slowdown_by_bf16, with_lanes
from dualhead.system.devices import describe_environment, float32_products
from dualhead.system.files import write_json
from dualhead.system.flops import CountFlops
from dualhead.system.modes import in_eval_mode
from dualhead.system.processes import group
from dualhead.threats import Threat
from dualhead.training import (
    CheckpointStore,
    MetricsLog,
    Passes,
    Position,
    Saved,
    Selection,
    SingleStepWatch,
    Stage,
    StageFiles,
    StageRun,
    StepProfiler,
    TrainingProgress,
    Validator,
    interpolate,
)

_log = logging.getLogger(__name__)

MEMORY = "memory"
"""What the file is called in which a stage's objective remembers something of the network as it began."""
RECALLED_AT_ONCE = 16
"""Images at once of which it finds that out: each may have a gradient of its own."""
GIVEN_WEIGHTS = "given_weights"
"""Key of `checkpoints/config.json` of a run that began with weights from a program."""


@dataclass(frozen=True)
class _Training:
    """State that all stages of a run share.

    Args:
        prepared: the run.
        arithmetic: number format of the passes.
        states: what an unfinished run goes on from.
        log: the run's metrics.
        progress: told what happens.
        stop: whether to end early.
        profile: look at a few steps of each stage.
    """

    prepared: Prepared
    arithmetic: Arithmetic
    states: CheckpointStore
    log: MetricsLog
    progress: TrainingProgress
    stop: Callable[[], bool]
    profile: bool

    def files(self, stage: Stage) -> StageFiles:
        """Return where a stage leaves its results."""
        folder = self.prepared.folder
        return StageFiles(self.states, folder.weights(stage.name, "best"), folder.weights(stage.name, "last"))


def train_stages(
    prepared: Prepared, progress: TrainingProgress, stop: Callable[[], bool], *, profile: bool = False
) -> nn.Module:
    """Train the stages that are not done yet, and write checkpoints and model into the run's folder.

    Args:
        prepared: the run; this process holds its folder.
        progress: told of stages, steps and epochs.
        stop: asked after every step; when true the run saves itself and raises `Interrupted`.
        profile: look at a few steps of each stage; of several processes the first is profiled.

    Returns:
        The trained network, on the run's device.

    Raises:
        Interrupted: when stopped.
        RunError: when training fails.
    """
    recipe, states = prepared.recipe, CheckpointStore(prepared.folder.states)
    with float32_products(tf32=recipe.runtime.precision == "tf32"):
        position, saved, arithmetic = _open(prepared, states)
        log = _open_log(prepared, position)
        training = _Training(prepared, arithmetic, states, log, progress, stop, profile and group().first)
        while position.stage < len(recipe.stages):
            stage = recipe.stages[position.stage]
            if stage.trains:
                finished, steps = _train_stage(training, position, saved)
            else:
                choose = _interpolate_stage if stage.fit is None else _fit_stage
                finished, steps = choose(training, position), 0
            position, saved = _close_stage(training, finished, steps), None
        model = _of_architecture(prepared, arithmetic)
        group().lead(lambda: save_model(prepared.folder.model, model, prepared.architecture, prepared.facts))
    return model


def train_one(prepared: Prepared, number: int, progress: TrainingProgress, stop: Callable[[], bool]) -> float:
    """Train one stage, from the network as it is, until `stop`; write into the run's folder what training writes.

    Returns:
        Floating-point operations of a step.
    """
    recipe, states = prepared.recipe, CheckpointStore(prepared.folder.states)
    with float32_products(tf32=recipe.runtime.precision == "tf32"):
        arithmetic = _open(prepared, states)[2]
        training = _Training(
            prepared, arithmetic, states, _open_log(prepared, Position()), progress, stop, profile=False
        )
        with suppress(Interrupted):
            _train_stage(training, Position(stage=number), None)
        saved = states.load()
        assert saved is not None  # whoever is stopped has saved itself
        free = recipe.stages[number].free
        return float(saved.position.step_cost * (1 if free is None else free.replays))


# ---- where the run stands


def _open(prepared: Prepared, states: CheckpointStore) -> tuple[Position, Saved | None, Arithmetic]:
    """Make the folder, or load from it where the run stands; all processes get the first one's weights.

    Returns:
        The position, the state of an unfinished stage (None between stages), and the arithmetic.
    """
    processes, model = group(), prepared.model
    facts = {**prepared.facts, **prepared.image_facts, **({GIVEN_WEIGHTS: True} if prepared.given_weights else {})}
    processes.lead(lambda: open_folder(prepared.folder, prepared.recipe, prepared.architecture, facts))
    processes.lead(lambda: write_digests(prepared.folder, prepared.images.learnt_from))
    poisoning = prepared.images.poisoning
    if poisoning is not None:
        processes.lead(lambda: write_manifest(prepared.folder, poisoning.made, poisoning.clean))
    saved = states.load()
    if saved is None:
        _refuse_lost_weights(prepared)
    else:
        load_state(model, saved.model, str(states.folder))
    arithmetic = processes.lead(lambda: _arithmetic(prepared, begun=saved is not None))
    arithmetic.lay_out(model)
    processes.share_state(model)
    if saved is None:
        if not processes.first:  # dropout of its own for each share
            torch.manual_seed(prepared.recipe.runtime.seed + processes.rank)
        if prepared.given_weights:  # whoever goes on may not hold them
            states.save(Position(), model, None)
        return Position(), None, arithmetic
    if saved.optimiser is None:  # between stages: what comes next draws from here
        saved.restore_generators(prepared.device)
        return saved.position, None, arithmetic
    return saved.position, saved, arithmetic


def _refuse_lost_weights(prepared: Prepared) -> None:
    """Refuse fresh weights for a run that was killed before its first state, which would have held those it was given.

    Raises:
        UserError: saying who has them.
    """
    if not prepared.given_weights and read_config(prepared.folder.checkpoints).get(GIVEN_WEIGHTS):
        raise UserError(
            f"{prepared.folder.path}: was stopped before the weights were saved that it began with; go on with "
            "dualhead.fit and the network, or choose another --run-dir"
        )


def _open_log(prepared: Prepared, position: Position) -> MetricsLog:
    """Open the log of epochs without the lines that came after a position."""
    numbers = {stage.name: number for number, stage in enumerate(prepared.recipe.stages)}

    def is_past(line: Mapping[str, Any]) -> bool:
        return (numbers.get(line["stage"], -1), line["epoch"]) <= (position.stage, position.epoch)

    tensorboard = prepared.folder.tensorboard if prepared.recipe.runtime.tensorboard else None
    return MetricsLog(prepared.folder.metrics, keep=is_past, tensorboard=tensorboard)


def _arithmetic(prepared: Prepared, *, begun: bool) -> Arithmetic:
    """Choose number format, layout and lanes, and write them down; a run that has begun keeps its own."""
    environment = prepared.folder.environment
    if begun and environment.is_file():  # it is kept, whatever would be faster now
        known = yaml.safe_load(environment.read_text(encoding="utf-8"))
        if lacking := {"precision", "channels_last", "lanes"} - set(known):
            raise UserError(
                f"{environment}: an earlier version began this run, and did not write down "
                f"{min(lacking)}; finish it with that version, or choose another --run-dir"
            )
        bf16 = known["precision"] == "bf16"
        return Arithmetic(bf16, known["channels_last"], known["lanes"], prepared.recipe.runtime.compile)
    chosen = choose_for_training(prepared)
    name = "tf32" if prepared.recipe.runtime.precision == "tf32" else chosen.name
    facts = {"precision": name, "channels_last": chosen.channels_last, "lanes": chosen.lanes}
    facts |= {"compiled": chosen.compiled, "arithmetic_chosen": chosen.told or "by the recipe"}
    write_json(environment, {**describe_environment(prepared.device), **facts})
    return chosen


def choose_for_training(prepared: Prepared) -> Arithmetic:
    """Choose number format, layout and lanes for a new run, by measuring where the recipe leaves them open."""
    runtime, model = prepared.recipe.runtime, prepared.model
    shape = (min(128, prepared.recipe.stages[0].batch_size), *prepared.architecture.image_shape)
    example = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(prepared.device)
    chosen = choose_arithmetic(precision_of(runtime), model, example, runtime.layout)
    if runtime.precision == "bf16" and prepared.device.type == "cpu":
        slower = slowdown_by_bf16(chosen, model, example)
        if slower > 1.5:
            _log.warning(
                "runtime.precision: on this CPU bf16 takes %.1f times as long as float32; "
                "auto takes the faster one", slower,
            )  # fmt: skip
    lanes = 1 if runtime.compile else runtime.lanes
    chosen = replace(chosen, compiled=runtime.compile)
    return with_lanes(chosen, model, example) if lanes == "auto" else replace(chosen, lanes=lanes)


def precision_of(runtime: Runtime) -> Precision:
    """Return the number format of passes; `float32_products` rounds the products of float32."""
    return "float32" if runtime.precision == "tf32" else runtime.precision


def _of_architecture(prepared: Prepared, arithmetic: Arithmetic) -> nn.Module:
    """Return the trained network as its architecture makes it, without synchronised batch norm."""
    if not synchronises(prepared.recipe):
        return prepared.model
    model = prepared.architecture.create().to(prepared.device)
    load_state(model, prepared.model.state_dict(), "trained weights")
    arithmetic.lay_out(model)
    return model


# ---- one stage


def _train_stage(training: _Training, position: Position, saved: Saved | None) -> tuple[Position, int]:
    """Train a stage from a position.

    Args:
        training: the run.
        position: within the stage.
        saved: the state at that position; None at the stage's beginning.

    Returns:
        The position at its end, and the number of steps of an epoch.
    """
    prepared, number = training.prepared, position.stage
    recipe, stage = prepared.recipe, prepared.recipe.stages[number]
    if saved is None:
        _begin_stage(prepared, number)
    teachers = teachers_of(prepared, number, begun=saved is not None)
    passes, loader = passes_of(prepared, stage, teachers), _loader(prepared, number)
    memory, flops = _memory(prepared, number, passes, training.arithmetic, begun=saved is not None)
    position.flops += flops
    training.progress.stage(
        stage.name, number + 1, len(recipe.stages), stage.epochs, len(loader),
        position.epoch * len(loader) + position.step,
    )  # fmt: skip
    run = StageRun(
        stage,
        passes,
        loader,
        validator=_validator(prepared, recipe.validated_under(stage)),
        threat=stage.against(recipe.threat),
        arithmetic=training.arithmetic,
        seed=recipe.runtime.seed,
        device=prepared.device,
        files=training.files(stage),
        log=training.log,
        progress=training.progress,
        stop=training.stop,
        save_minutes=recipe.runtime.save_minutes,
        profiler=StepProfiler(prepared.folder.profile, stage.name, prepared.device) if training.profile else None,
        streams=_streams(prepared, stage, loader),
        class_weights=_class_weights(prepared),
        memory=memory,
        watch=_watch(prepared, stage),
    )
    if saved is not None:
        run.restore(saved)
    return run.run(position), len(loader)


def _fit_stage(training: _Training, position: Position) -> Position:
    """Choose the aggregator's parameters; short, so that a stage that was stopped begins anew."""
    prepared = training.prepared
    stage, validator = prepared.recipe.stages[position.stage], _validator(prepared)
    assert isinstance(prepared.model, DualHeadClassifier) and stage.fit is not None and validator is not None
    _begin_stage(prepared, position.stage)
    training.progress.stage(stage.name, position.stage + 1, len(prepared.recipe.stages), 0, 0, 0)
    selection = Selection(prepared.model, stage.fit, validator, training.arithmetic, prepared.device, training.stop)
    finished = selection.run(Position(stage=position.stage))
    _keep_chosen(training, stage, finished)
    return finished


def _interpolate_stage(training: _Training, position: Position) -> Position:
    """Choose weights between those of two stages; short, so that a stage that was stopped begins anew."""
    prepared = training.prepared
    recipe, stage = prepared.recipe, prepared.recipe.stages[position.stage]
    chosen, validator = stage.interpolate, _validator(prepared, chosen_under(recipe, stage))
    assert chosen is not None and validator is not None

    def kept(name: str) -> dict[str, Tensor]:
        earlier = earlier_stage(recipe, position.stage, name)
        assert earlier is not None
        load_kept(prepared.folder, earlier, prepared.model)
        return {key: value.clone() for key, value in prepared.model.state_dict().items()}

    first, second = map(kept, chosen.between)
    training.progress.stage(stage.name, position.stage + 1, len(recipe.stages), 0, 0, 0)
    finished = interpolate(
        passes_of(prepared, stage), first, second, chosen.shares, validator, training.arithmetic, prepared.device,
        training.stop, Position(stage=position.stage),
    )  # fmt: skip
    _keep_chosen(training, stage, finished)
    return finished


def _keep_chosen(training: _Training, stage: Stage, finished: Position) -> None:
    """Write the weights that a stage without epochs chose, and one line on them."""
    training.log.write(
        {"stage": stage.name, "epoch": 1, "step": 0, **finished.best, "seconds": round(finished.seconds, 3)}
    )
    files = training.files(stage)
    files.write_best(training.prepared.model)
    files.write_last(training.prepared.model)


def _begin_stage(prepared: Prepared, number: int) -> None:
    """Give the network the weights that a stage begins with: `init`, and head 1's for heads attached."""
    recipe, model, stage = prepared.recipe, prepared.model, prepared.recipe.stages[number]
    given = False
    if stage.init is not None:
        given = group().lead(lambda: start_from(prepared, stage, model))
        group().share_state(model)
    kind = recipe.model.second_head
    if isinstance(model, DualHeadClassifier) and kind in ("clone", "tied") and not given:
        trained = {part for earlier in recipe.stages[:number] for part in earlier.train}
        new = set(model.heads[1:]) & set(stage.train) - trained
        if stage.init is None and new and isinstance(prepared.architecture.plain(), DualHeadClassifier):
            return  # heads that came with the network keep their weights
        for head in new:
            model.get_submodule(head).load_state_dict(model.head1.state_dict())


def _loader(prepared: Prepared, number: int) -> Loader:
    recipe, stage = prepared.recipe, prepared.recipe.stages[number]
    return Loader(
        prepared.images.training, stage.batch_size, seed=recipe.runtime.seed + number,
        augment=augmentations_of(recipe, stage), cutmix=stage.cutmix, extra=prepared.images.extra,
        fraction=recipe.data.extra.fraction if recipe.data.extra else 0.0,
        balanced=recipe.data.sampling == "balanced", device=prepared.device, group=group(),
    )  # fmt: skip


def _class_weights(prepared: Prepared) -> Tensor | None:
    weights = class_weights(prepared.recipe, prepared.images.training)
    return None if weights is None else weights.to(prepared.device)


def _validator(prepared: Prepared, threats: Sequence[Threat] = ()) -> Validator | None:
    held_out, recipe = prepared.images.held_out, prepared.recipe
    if held_out is None:
        return None
    settings, (threat, *also) = recipe.validation, threats or (recipe.threat,)
    return Validator(held_out, settings.attack, settings.every, threat, recipe.runtime.seed, also=tuple(also))


def _watch(prepared: Prepared, stage: Stage) -> SingleStepWatch | None:
    if not stage.single_step:
        return None
    images = prepared.images.held_out or prepared.images.training
    return SingleStepWatch(_as_seen(prepared, images), stage.against(prepared.recipe.threat))


def _as_seen(prepared: Prepared, split: Split) -> Split:
    """Return images as the network takes them without augmentation: the middle of those that are larger."""
    return split.show_middle(*prepared.architecture.image_shape[1:])


def _streams(prepared: Prepared, stage: Stage, loader: Loader) -> dict[str, OpenStream]:
    """Open the streams of a stage's objective."""
    opened = {}
    for name, stream in stage.objective.streams().items():
        setting = StreamSetting(
            prepared.images.training, len(loader), loader.global_batch,
            zlib.crc32(f"{stage.name}/{name}".encode()) + prepared.recipe.runtime.seed, prepared.device, group(),
            prepared.images.further.__getitem__, prepared.architecture.image_shape[1:],
            augmentations_of(prepared.recipe, stage),
        )  # fmt: skip
        opened[name] = stream.open(setting)
    return opened


def teachers_of(prepared: Prepared, number: int, *, begun: bool) -> dict[str, nn.Module]:
    """Load the models outside the network that a stage's objective asks.

    Args:
        prepared: the run.
        number: of the stage.
        begun: whether the stage goes on; else the network is what it begins with, and is kept if it is a teacher.

    Returns:
        By name, classifiers from images [B, C, H, W] to logits [B, num_classes], on the run's device.

    Raises:
        UserError: if one cannot be loaded.
    """
    stage, found = prepared.recipe.stages[number], {}
    for name, where in stage.objective.teachers().items():
        if where == BEFORE and not begun:
            _keep_before(prepared, stage)
        teacher = _teacher(prepared, number, where).to(prepared.device)
        found[name] = teacher.requires_grad_(requires_grad=False)
    return found


def _memory(
    prepared: Prepared, number: int, passes: Passes, arithmetic: Arithmetic, *, begun: bool
) -> tuple[dict[str, Tensor], int]:
    """Return what a stage's objective remembers of the network as the stage began, and what finding it out cost.

    Args:
        prepared: the run.
        number: of the stage.
        passes: of the stage, through the network as it begins.
        arithmetic: number format of the passes.
        begun: whether the stage goes on; else it is found out now, and written beside the stage's weights.
    """
    recipe, folder = prepared.recipe, prepared.folder
    stage, processes = recipe.stages[number], group()
    path, flops = folder.weights(stage.name, MEMORY), 0
    if not begun:
        earlier: dict[str, Tensor] = {}
        for other in recipe.stages[:number]:
            place = folder.weights(other.name, MEMORY)
            earlier = processes.lead(lambda at=place, known=earlier: read_state(at) if at.is_file() else known)  # type: ignore[misc]
        split = prepared.images.training

        def images(count: int) -> Iterator[tuple[Tensor, Tensor, Streams]]:
            some = _as_seen(prepared, split.spread(count))
            for batch in batches(some, RECALLED_AT_ONCE, prepared.device, processes.share_of(len(some))):
                yield batch.x, batch.y, Streams.of(recipe.runtime.seed, batch.index).fork(stage.name, MEMORY)

        with in_eval_mode(passes.learners), CountFlops() as counter:
            found = stage.objective.recall(
                Before(
                    {name: p.detach() for name, p in passes.model.named_parameters() if p.requires_grad},
                    passes.functional,
                    images,
                    stage.attack,
                    processes.sum_,
                    {name: tensor.to(prepared.device) for name, tensor in earlier.items()},
                )
            )
        flops = sum(processes.gather(counter.total))
        if found:
            processes.lead(lambda: write_state({name: value.cpu() for name, value in found.items()}, path))
    if not processes.lead(path.is_file):
        return {}, flops
    return {name: value.to(prepared.device) for name, value in processes.lead(lambda: read_state(path)).items()}, flops


def _keep_before(prepared: Prepared, stage: Stage) -> None:
    """Write the weights that a stage begins with, for those who learn from them."""
    path, model = prepared.folder.weights(stage.name, BEFORE), prepared.model
    group().lead(lambda: write_state(model.state_dict(), path))


def _teacher(prepared: Prepared, number: int, where: str) -> nn.Module:
    if where == BEFORE:
        stage, model = prepared.recipe.stages[number], fresh_model(prepared)
        path = prepared.folder.weights(stage.name, BEFORE)
        load_state(model, group().lead(lambda: read_state(path)), str(path))
        return view(model, stage.learner)  # what is compared is one output, then and now, whichever is deployed
    earlier = earlier_stage(prepared.recipe, number, where)
    if earlier is None:
        return load(where)
    model = fresh_model(prepared)
    load_kept(prepared.folder, earlier, model)
    return view(model, earlier.output)


def _close_stage(training: _Training, finished: Position, steps: int) -> Position:
    """Write what a finished stage cost and reached, and go on from the weights that it keeps.

    Returns:
        The position at the next stage's beginning.
    """
    prepared = training.prepared
    stage = prepared.recipe.stages[finished.stage]
    summary = {
        "stage": stage.name,
        "epochs": finished.epoch,
        "seconds": round(finished.seconds, 3),
        "steps": finished.epoch * steps,
        "flops": finished.flops,
        "best": finished.best or None,
        "kept": stage.keep,
    }
    group().lead(lambda: write_json(prepared.folder.summary(stage.name), summary))
    load_kept(prepared.folder, stage, prepared.model)
    position = Position(stage=finished.stage + 1)
    training.states.save(position, prepared.model, None)
    return position
