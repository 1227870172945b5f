"""Prepare a run: read its images, make its network, and refuse what does not fit, before anything is written."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dualhead.attacks import Attack
from dualhead.errors import UserError, under
from dualhead.evaluation import Asked, Evaluation, column, threat_labels
from dualhead.heads import DualHeadClassifier
from dualhead.objectives import BEFORE, CLEAN, Around, Need, Objective, passed
from dualhead.recipe import Recipe
from dualhead.report import threat_text
from dualhead.runs.folder import RunFolder, changes
from dualhead.runs.images import Images, fitting_images, image_facts, load_images
from dualhead.runs.network import fill, fitting_architecture, refuse_other_order
from dualhead.saving import Architecture, load, load_base_weights
from dualhead.system.devices import find_device, refuse_tf32, room_for_images, synchronised_batch_norm
from dualhead.system.modes import hold_statistics, kept_modes
from dualhead.system.processes import group
from dualhead.threats import Threat, refuse_changed_origins
from dualhead.training import RESET, Passes, Stage, check_choosable, layer_scales, summary_writer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A run that may begin or go on: its recipe, images and network fit one another.

    Args:
        recipe: in full.
        folder: where the run lies.
        device: where it computes.
        images: what it trains on and is measured on.
        architecture: of the network.
        model: the network, on the device, with the weights that the run begins with; training changes it.
        asked: the attacks of the final evaluation, and the measurements that are none.
        image_facts: what tells these images from others, by the key that names their source.
        given_weights: the run begins with weights that only a program holds.
    """

    recipe: Recipe
    folder: RunFolder
    device: torch.device
    images: Images
    architecture: Architecture
    model: nn.Module
    asked: Asked
    image_facts: Mapping[str, Any]
    given_weights: bool = False

    @property
    def output(self) -> str:
        """Return the output that is deployed."""
        return self.recipe.stages[-1].output

    @property
    def facts(self) -> dict[str, Any]:
        """Return what a saved model tells of itself beside its architecture, JSON values."""
        return {
            "class_names": list(self.images.training.class_names),
            "threat": self.recipe.threat.describe(),
            "output": self.output,
            "recipe": self.recipe.name,
            **self.recipe.data.reading(),
        }


def prepare(recipe: Recipe, path: Path, begin_with: nn.Module | None = None) -> Prepared:
    """Read a run's images and make its network; write nothing.

    In a group of processes each calls this; what fails in one fails in all.

    Args:
        recipe: in full.
        path: the run's folder.
        begin_with: a network whose weights the run begins with; None for fresh ones.

    Raises:
        UserError: for bad data, a network that does not fit them, a stage that cannot be trained, or a folder that
            holds another run.
    """
    processes, folder = group(), RunFolder(path)
    processes.lead(lambda: changes(path, recipe))
    device = processes.agreed(lambda: find_device(recipe.runtime.device))
    room = room_for_images(device)
    loaded = processes.in_turn(lambda: load_images(recipe, path, room))
    facts = processes.lead(lambda: image_facts(recipe, folder, loaded))

    def fitted() -> Prepared:
        if recipe.runtime.precision == "tf32":
            refuse_tf32(device)
        if recipe.runtime.tensorboard:
            summary_writer()
        load_specialists(recipe)
        images = fitting_images(recipe, loaded, room)
        return _fitting_network(recipe, folder, device, images, facts, begin_with)

    return processes.agreed(fitted)


def synchronises(recipe: Recipe) -> bool:
    """Tell whether batch norm shares its statistics between the processes of this run."""
    return recipe.runtime.batch_norm == "synchronised" and group().world > 1


def _fitting_network(
    recipe: Recipe, folder: RunFolder, device: torch.device, images: Images, image_facts: Mapping[str, Any],
    begin_with: nn.Module | None,
) -> Prepared:  # fmt: skip
    """Make the network for the images, and refuse what does not fit it."""
    if not folder.begun:  # later, what a stage starts from may have gone
        refuse_other_order(recipe, begin_with, images.training.class_names)
    architecture = fitting_architecture(recipe, folder, images.training, device)
    torch.manual_seed(recipe.runtime.seed)
    model = architecture.create()
    if begin_with is not None:
        fill(model, begin_with, architecture)
    model = model.to(device)
    prepared = Prepared(
        recipe, folder, device, images, architecture, model, recipe.evaluate.asked, image_facts, begin_with is not None
    )
    _check_attacks(prepared)
    for number in range(len(recipe.stages)):
        _check_stage(prepared, number)
    if images.held_out is not None:
        _warn_of_reach("validation.attack", recipe.validation.attack, recipe.threat)
    return replace(prepared, model=synchronised_batch_norm(model, device)) if synchronises(recipe) else prepared


def chosen_under(recipe: Recipe, stage: Stage) -> tuple[Threat, ...]:
    """Return what held-out images are attacked within where a stage interpolates."""
    assert stage.interpolate is not None
    return stage.interpolate.threats or (stage.against(recipe.threat),)


def load_specialists(recipe: Recipe) -> list[Evaluation]:
    """Read the evaluations of a sequence's specialists.

    Raises:
        UserError: if one was not measured under the sequence's threats by the same attacks.
    """
    found = []
    threats = recipe.threats_measured
    wanted = {
        column(attack.label, label)
        for attack in recipe.evaluate.asked.attacks.values()
        for threat, label in zip(threats, threat_labels(threats), strict=True)
        if attack.takes(threat)
    }
    for index, place in enumerate(recipe.sequence.specialists if recipe.sequence is not None else ()):
        with under(f"sequence.specialists.{index}"):
            inside = RunFolder(Path(place)).evaluation
            evaluation = Evaluation.load(inside if inside.is_dir() else Path(place))
            if not wanted <= set(evaluation.verdicts):
                lacking = ", ".join(sorted(wanted - set(evaluation.verdicts)))
                raise UserError(f"{place} was not measured by {lacking}; evaluate it as the sequence is")
            ours, theirs = {"union": [threat.describe() for threat in threats]}, evaluation.results["threat"]
            if theirs != ours:
                raise UserError(
                    f"{place} was measured under {threat_text(theirs)}, the sequence is under {threat_text(ours)}; "
                    "evaluate it as the sequence is"
                )
            found.append(evaluation)
    return found


def fresh_model(prepared: Prepared) -> nn.Module:
    """Make the network on the CPU as the run began with it; torch's generator stays where it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(prepared.recipe.runtime.seed)
        return prepared.architecture.create()


def start_from(prepared: Prepared, stage: Stage, model: nn.Module) -> bool:
    """Load into a network the weights that a stage's `init` names.

    Returns:
        Whether heads after the first had theirs among them.

    Raises:
        UserError: if they cannot be read or do not fit.
    """
    if stage.init == RESET:
        fresh = fresh_model(prepared)
        for part in stage.train:
            if isinstance(model, DualHeadClassifier) and isinstance(fresh, DualHeadClassifier):
                model.load_part(part, fresh)
            else:
                model.load_state_dict(fresh.state_dict())
    elif stage.init is not None:
        return load_base_weights(model, stage.init, prepared.architecture, replace_classifier=stage.replace_classifier)
    return False


# ---- what each stage needs


def _check_attacks(prepared: Prepared) -> None:
    """Refuse attacks that cannot measure every output: also those of one head are measured."""
    for_heads = prepared.asked.for_heads
    if for_heads and not isinstance(prepared.model, DualHeadClassifier):
        raise UserError(f"evaluate.attacks: {for_heads[0]} needs several heads, and this model has one")
    if for_heads and len(for_heads) == len(prepared.asked.attacks):
        raise UserError(
            f"evaluate.attacks: {for_heads[0]} cannot attack the outputs of one head, which are measured beside "
            "the aggregate; add one that can, such as autoattack"
        )


def _check_stage(prepared: Prepared, number: int) -> None:
    """Refuse a stage that cannot be trained now, not after the hours before it."""
    stage, key = prepared.recipe.stages[number], f"stages.{number}"
    if stage.trains:
        passes = passes_of(prepared, stage)
        if stage.epochs and not passes.parameters():
            raise UserError(
                f"{key}.train: {', '.join(stage.train)} has no weights that learn, as of the aggregators "
                "mean and mixed_nuts; leave the stage out, and let the one before it say what to deploy"
            )
        _check_needs(prepared, number, passes)
        if 1 in _piece_sizes(stage, len(prepared.images.training)) and not synchronises(prepared.recipe):
            _check_pieces_of_one(prepared, number, passes)
    if stage.layer_decay is not None:
        with under(f"{key}.layer_decay"):
            layer_scales(prepared.model, stage.layer_decay)
    _warn_of_idle(stage, len(prepared.images.training))
    _warn_of_own_threats(stage, prepared.recipe.threat)
    _warn_of_one_threat(stage)
    with under(f"{key}.threat"):
        for threat in stage.met(prepared.recipe.threat):
            refuse_changed_origins(threat, prepared.architecture.image_shape)
    if stage.objective.adversarial and stage.trains and stage.free is None and stage.epochs:
        _warn_of_reach(f"{key}.attack", stage.attack, stage.against(prepared.recipe.threat))
    if stage.fit is not None:
        with under(f"{key}.fit"):
            check_choosable(prepared.model)
    if synchronises(prepared.recipe) and stage.micro_batch is not None and stage.batch_size % group().world:
        raise UserError(
            f"{key}.batch_size: must be a multiple of the {group().world} processes, since "
            f"synchronised batch norm needs as many micro-batches in each; got {stage.batch_size}"
        )
    if not prepared.folder.begun:  # later, what a stage starts from or learns from may have gone
        _check_teachers(prepared, number)
    if stage.checkpoint_activations and prepared.recipe.runtime.compile:
        raise UserError(f"{key}.checkpoint_activations: not with runtime.compile; set one to false")
    if stage.init is not None and not prepared.folder.begun:
        with under(f"{key}.init"):
            start_from(prepared, stage, copy.deepcopy(prepared.model))


def passes_of(prepared: Prepared, stage: Stage, teachers: Mapping[str, nn.Module] | None = None) -> Passes:
    """Plan a stage's passes through the run's network, with fresh heads of the objective's own if it has any."""
    example = torch.zeros(1, *prepared.architecture.image_shape, device=prepared.device)
    return Passes.of(prepared.model, stage, teachers=teachers, example=example, seed=prepared.recipe.runtime.seed)


def _piece_sizes(stage: Stage, images: int) -> set[int]:
    """Return how many images run through the network at once in a stage's steps."""
    batch, world = min(stage.batch_size, images), group().world
    shares = {batch // world, -(-batch // world)} - {0}  # a batch of less than an image each is refused elsewhere
    return {size for share in shares for piece in [min(stage.micro_batch or share, share)]
            for size in (piece, share % piece) if size}  # fmt: skip


def _check_pieces_of_one(prepared: Prepared, number: int, passes: Passes) -> None:
    """Refuse one image at once where batch norm that trains would see one value of each channel.

    Raises:
        UserError: naming the layer.
    """
    stage, found = prepared.recipe.stages[number], list[str]()
    look = passes.look(passed(_needs_of_its_own(stage.objective)))
    example = torch.zeros(1, *prepared.architecture.image_shape, device=prepared.device)

    def seen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda layer, args: found.append(name) if args[0].numel() == args[0].shape[1] else None

    with kept_modes(passes.learners), ExitStack() as hooks, torch.no_grad():
        passes.learners.train()
        if stage.batch_norm == "frozen":
            hold_statistics(passes.model)
        for name, layer in (*passes.model.named_modules(), *passes.heads.named_modules()):
            if isinstance(layer, _BatchNorm) and layer.training:
                hooks.callback(layer.register_forward_pre_hook(seen(name)).remove)
        passes.learners.eval()
        look({need.on: passes.prefix(example) for need in look.needs.values()})
    if found:
        raise UserError(
            f"stages.{number}.batch_size: one image at once leaves the batch norm {found[0]} one value of a channel to "
            "normalise; choose batch_size and micro_batch so that no piece of a batch is one image"
        )


def _needs_of_its_own(objective: Objective) -> dict[str, Need]:
    """Return what an objective needs of the network that it trains: not of its teachers."""
    teachers = objective.teachers()
    return {name: need for name, need in objective.needs().items() if getattr(need, "output", None) not in teachers}


def _check_needs(prepared: Prepared, number: int, passes: Passes) -> None:
    """Refuse an objective that needs what this network does not have; warn where several processes change it."""
    stage = prepared.recipe.stages[number]
    with under(f"stages.{number}.objective"):
        _check_images(stage.objective, prepared.architecture.image_shape)
        passes.look(passed(_needs_of_its_own(stage.objective)))
        for inner in stage.objective.inner().values():
            passes.look(inner.through)
    if group().world > 1 and not stage.objective.per_image:
        _log.warning(
            "stage %s: the loss of %s is taken over each process's share of the batch: it is another one than on one "
            "process", stage.name, stage.objective.registered_name,
        )  # fmt: skip


def _check_images(objective: Objective, image_shape: Sequence[int]) -> None:
    """Refuse an objective that looks at images which nothing makes, or climbs what it does not see."""
    inner, needs = objective.inner(), objective.needs()
    begin = (CLEAN, *objective.streams())
    views = objective.views(dict.fromkeys((*begin, *inner), torch.zeros(2, *image_shape)))
    there = dict.fromkeys((*begin, *inner, *views))
    for name, need in needs.items():
        if getattr(need, "on", CLEAN) not in there:
            raise UserError(
                f"needs: {name} is of images {need.on!r}, which nothing makes; there are {', '.join(there)}"
            )
    for made, how in inner.items():
        if how.start not in there:
            raise UserError(f"inner: {made} starts at images {how.start!r}; there are {', '.join(there)}")
        if unknown := [name for name in how.uses if name not in needs]:
            raise UserError(f"inner: {made} uses {unknown[0]!r}, which is none of the needs: {', '.join(needs)}")


def earlier_stage(recipe: Recipe, number: int, name: str) -> Stage | None:
    """Return the stage of a name among those before a stage; None if there is none."""
    return next((stage for stage in recipe.stages[:number] if stage.name == name), None)


def _check_teachers(prepared: Prepared, number: int) -> None:
    """Refuse teachers that cannot be loaded, or do not know these images and classes."""
    for name, where in prepared.recipe.stages[number].objective.teachers().items():
        if where != BEFORE and earlier_stage(prepared.recipe, number, where) is None:
            with under(f"stages.{number}.objective, teacher {name}"):
                _check_labels(prepared.architecture, load(where), where)


def _check_labels(architecture: Architecture, model: nn.Module, where: str) -> None:
    image = torch.zeros(1, *architecture.image_shape)
    try:
        with torch.no_grad():
            given = model(image).shape[1]
    except RuntimeError as error:
        raise UserError(f"{where}: does not take images {list(image.shape[1:])}: {error}") from None
    if given != architecture.num_classes:
        raise UserError(f"{where}: knows {given} classes, the data have {architecture.num_classes}")


def _warn_of_idle(stage: Stage, images: int) -> None:
    """Warn of settings that begin only after the stage's end, as when it was shortened for a trial."""
    schedule = stage.schedule.in_epochs(images // min(stage.batch_size, images))
    late = {
        "awp.start": None if stage.awp is None else stage.awp.start,
        "average.start": getattr(stage.average, "start", None),
        "schedule.warmup": getattr(schedule, "warmup", None),
    }
    for key, start in late.items():
        if start and start >= stage.epochs > 0:
            _log.warning(
                "stage %s: %s is %g, and the stage has %d epochs: it ends before that", stage.name, key, start,
                stage.epochs,
            )  # fmt: skip


def _warn_of_own_threats(stage: Stage, threat: Threat) -> None:
    """Warn of a radius or threat within which nothing is attacked, since the objective names its own."""
    if (stage.eps is None and stage.threat is None) or not stage.epochs or stage.against(threat) in stage.met(threat):
        return
    if met := stage.met(threat):
        _log.warning(
            "stage %s: %s changes nothing, since objective %s names the threats that it attacks within: %s",
            stage.name, "eps" if stage.threat is None else "threat", stage.objective.registered_name,
            ", ".join(threat_text(each.describe()) for each in met),
        )  # fmt: skip


def _warn_of_one_threat(stage: Stage) -> None:
    """Warn of a method around one that attacks within several threats at once, if it looks at one of them."""
    objective = stage.objective.at(0, stage.objective.begin())
    while isinstance(objective, Around):
        there = objective.base.needs()
        looks = {getattr(need, "on", CLEAN) for name, need in objective.needs().items() if name not in there}
        made = objective.base.inner()
        if (seen := [name for name in made if name in looks]) and len(seen) < len(made):
            _log.warning(
                "stage %s: %s attacks within %d threats at once, and what %s adds looks at the images of the first "
                "alone", stage.name, objective.base.registered_name, len(made), objective.registered_name,
            )  # fmt: skip
        objective = objective.base


def _warn_of_reach(key: str, attack: Attack, threat: Threat) -> None:
    """Warn of steps that are left over from another radius or norm: they end inside the ball."""
    steps, length = getattr(attack, "steps", 1), getattr(attack, "step_size", None)
    if length is not None and steps * length < threat.eps:
        _log.warning(
            "%s: steps=%d of %.3g reach %.3g, and eps is %.3g; leave step_size out (null) for 2.5 eps / steps", key,
            steps, length, steps * length, threat.eps,
        )  # fmt: skip
