"""Prepare a run: read its images, make its network, and refuse what does not fit, before anything is written."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dualhead.attacks import Attack
from dualhead.data import (
    HELD_OUT,
    Augmentation,
    Digests,
    Poisoned,
    Split,
    among,
    are_numbers,
    digests,
    held_rows,
    hold_out,
    in_turn,
    match,
)
from dualhead.errors import UserError
from dualhead.evaluation import Asked, Evaluation, answers, column, threat_labels
from dualhead.heads import DualHeadClassifier, aggregators, default_aggregator
from dualhead.models import backbones, channel_statistics, load_state
from dualhead.names import head_id
from dualhead.noise import Streams
from dualhead.objectives import BEFORE, CLEAN, Need, Objective, passed
from dualhead.recipe import Recipe, Statistics
from dualhead.report import threat_text
from dualhead.runs.clean import CleanModel
from dualhead.runs.crafted import Crafted
from dualhead.runs.folder import RunFolder, changes, data_facts, refuse_other_data, refuse_other_poison
from dualhead.saving import CONFIG, Architecture, load, load_base_weights, normalisation_of, view
from dualhead.statistics import mcnemar
from dualhead.system.devices import find_device, processors, refuse_tf32, room_for_images, synchronised_batch_norm
from dualhead.system.generators import kept_generators
from dualhead.system.modes import hold_statistics, kept_modes
from dualhead.system.processes import group
from dualhead.threats import Threat, refuse_changed_origins
from dualhead.training import RESET, Passes, Stage, check_choosable, layer_scales, summary_writer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Poisoning:
    """The poison of a run.

    Args:
        clean: the training images as they were, the held-out ones included.
        made: what the poison made of them.
        trained: positions in `clean` of those that are trained on, in their order, int64 [N].
    """

    clean: Split
    made: Poisoned
    trained: Tensor

    def facts(self) -> dict[str, Any]:
        """Return what tells this poison from others, JSON values."""
        return {"digest": self.made.digest(), "images": len(self.made.index)}


@dataclass(frozen=True)
class Images:
    """The images of a run.

    Args:
        training: those that are trained on.
        test: those that the finished model is measured on.
        extra: a second source of training images; None if the recipe names none.
        held_out: training images that choose the best epoch; None for none.
        further: those of objectives' streams, by the name of their source.
        poisoning: what was done to the training images; None for nothing.
    """

    training: Split
    test: Split
    extra: Split | None = None
    held_out: Split | None = None
    further: Mapping[str, Split] = field(default_factory=dict)
    poisoning: Poisoning | None = None

    @property
    def learnt_from(self) -> dict[str, Split | None]:
        """Return the sets that decide what the model becomes, by the words of `check_duplicates`."""
        return {"training": self.training, "extra": self.extra, "held-out": self.held_out}

    def digests(self) -> tuple[dict[str, Digests], list[str]]:
        """Return a number for each image of the sets in memory, and the names of the sets that stay on disk."""
        known = {name: split for name, split in {**self.learnt_from, "test": self.test}.items() if split is not None}
        read = {name: digests(split) for name, split in known.items() if not split.is_stored}
        return read, [name for name in known if name not in read]


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
    facts = processes.lead(lambda: _image_facts(recipe, folder, loaded))

    def fitted() -> Prepared:
        images = _fitting_images(recipe, loaded, device, room)
        return _fitting_network(recipe, folder, device, images, facts, begin_with)

    return processes.agreed(fitted)


def synchronises(recipe: Recipe) -> bool:
    """Tell whether batch norm shares its statistics between the processes of this run."""
    return recipe.runtime.batch_norm == "synchronised" and group().world > 1


@contextmanager
def under(key: str) -> Iterator[None]:
    """Put a key of the recipe before the message of a `UserError`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


# ---- images


def load_images(recipe: Recipe, path: Path, room: int | None = None) -> Images:
    """Load the images that a recipe names, with nothing held out.

    Args:
        recipe: in full.
        path: the run's folder, where lies what a poison was made with.
        room: bytes of memory that there are for them; a split that takes more stays on disk. None: no limit.

    Raises:
        UserError: if they cannot be read, or are not of the same classes and shape.
    """
    data = recipe.data
    training, test = (data.load(part, room=room, workers=processors()) for part in ("train", "test"))
    source = f"data.source {data.source}"
    test = _among_training(test, training, source, f"{source}: training and test images have different classes")
    if test.image_shape[0] != training.image_shape[0]:
        raise UserError(
            f"{source}: training and test images differ in channels (grey and colour); data.channels=3 reads all as "
            "colours, 1 as grey"
        )
    if not data.image_size and test.image_shape != training.image_shape:
        raise UserError(
            f"{source}: training images are {_listed(training.image_shape)}, test images {_listed(test.image_shape)}; "
            "data.image_size brings all to one size"
        )
    images = Images(training, test, _load_extra(recipe, training, room), further=_load_further(recipe, training, room))
    return _poisoned(recipe, path, images)


def _poisoned(recipe: Recipe, path: Path, images: Images) -> Images:
    """Poison the training images as the recipe says; all others stay as they are."""
    poison, clean = recipe.data.poison, images.training
    if poison is None:
        return images
    with under(f"data.poison: {poison.registered_name}"):
        poison.target_of(clean.class_names)
        made = poison.apply(clean, Crafted(recipe, path, images.test) if poison.needs_surrogate else None)
        if not isinstance(made, Poisoned):
            raise UserError(f"apply must return a Poisoned, as Poisoned.of makes it; got {type(made).__name__}")
    if images.extra is not None and group().first:
        _log.warning("data.poison: the images of data.extra are not poisoned")
    return replace(images, training=made.split, poisoning=Poisoning(clean, made, made.rows))


def _load_further(recipe: Recipe, training: Split, room: int | None) -> dict[str, Split]:
    """Load the images that streams of the stages' objectives name."""
    found: dict[str, Split] = {}
    for index, stage in enumerate(recipe.stages):
        for name, stream in stage.objective.streams().items():
            source = stream.named_source
            if source is None or source in found:
                continue
            with under(f"stages.{index}.objective, stream {name}"):
                found[source] = recipe.data.load_other(source, room=room, workers=processors())
                if found[source].image_shape != training.image_shape:
                    raise UserError(
                        f"the images of {source} have shape {_listed(found[source].image_shape)}, those of "
                        f"data.source {_listed(training.image_shape)}; both must agree"
                    )
    return found


def _load_extra(recipe: Recipe, training: Split, room: int | None) -> Split | None:
    with under("data.extra"):
        extra = recipe.data.load_extra(room=room, workers=processors())
    if recipe.data.extra is None or extra is None:
        return None
    ours, name = f"data.source {recipe.data.source}", f"data.extra.source {recipe.data.extra.source}"
    extra = _among_training(extra, training, ours, f"{name}: its images have other classes than those of {ours}")
    if extra.image_shape != training.image_shape:
        raise UserError(
            f"{name}: its images have shape {_listed(extra.image_shape)}, those of data.source "
            f"{_listed(training.image_shape)}; both must agree"
        )
    return extra


def _among_training(split: Split, training: Split, source: str, refusal: str) -> Split:
    """Bring images among the classes of the training images: by name, or in order where one side has numbers alone.

    Raises:
        UserError: beginning with `refusal`, if the classes are others.
    """
    theirs, ours = split.class_names, training.class_names
    trusted = are_numbers(theirs) != are_numbers(ours) and len(theirs) == len(ours)
    if match(theirs, ours) is None and not trusted:
        raise UserError(f"{refusal} ({_listed(theirs)} in place of {_listed(ours)}); the names must agree")
    return replace(among(split, ours, source), class_names=ours)


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:4])) + (f" and {len(values) - 4} more" if len(values) > 4 else "")


def _image_facts(recipe: Recipe, folder: RunFolder, images: Images) -> dict[str, Any]:
    """Return facts about the images by the key that names their source; refuse those of another run."""
    loaded = images.training if images.poisoning is None else images.poisoning.clean
    sources = {"data": (loaded, recipe.data.source)}
    if images.extra is not None and recipe.data.extra is not None:
        sources["data.extra"] = (images.extra, recipe.data.extra.source)
    if recipe.data.test is not None:  # split off the training images: others would be among those trained on
        sources["data.test"] = (images.test, recipe.data.source)
    sources |= {f"stream {source}": (split, source) for source, split in images.further.items()}
    facts = {part: data_facts(split) for part, (split, _) in sources.items()}
    for part, (_, source) in sources.items():
        refuse_other_data(folder.path, facts[part], source, part)
    if images.poisoning is not None:
        facts["poison"] = images.poisoning.facts()
        refuse_other_poison(folder.path, facts["poison"])
    return facts


def _fitting_images(recipe: Recipe, loaded: Images, device: torch.device, room: int) -> Images:
    """Hold validation images out, and refuse what does not fit the images."""
    if recipe.runtime.precision == "tf32":
        refuse_tf32(device)
    if recipe.runtime.tensorboard:
        summary_writer()
    images = _hold_out(recipe, loaded)
    class_weights(recipe, images.training)
    _check_validation(recipe, images)
    load_specialists(recipe)
    _check_augmented(recipe, images.training)
    _check_evaluation(recipe, images.test, room)
    return images


def _hold_out(recipe: Recipe, loaded: Images) -> Images:
    data = recipe.data
    if not data.validation:
        return loaded
    poisoning = loaded.poisoning
    with under("data.validation"):
        training, held_out = hold_out(loaded.training, data.validation, recipe.runtime.seed)
        if poisoning is not None:
            made = loaded.training
            chosen = held_rows(made.labels.cpu(), made.class_names, data.validation, recipe.runtime.seed, HELD_OUT)
            if data.clean_validation:
                held_out = poisoning.clean.take(poisoning.made.rows[chosen])
            poisoning = replace(poisoning, trained=poisoning.made.rows[~chosen])
    if data.image_size:  # larger ones are for augmentations to cut from
        held_out = held_out.show_middle(*data.image_size)
    return replace(loaded, training=training, held_out=held_out, poisoning=poisoning)


def class_weights(recipe: Recipe, training: Split) -> Tensor | None:
    """Return the weight of each class in the loss, float32 [C]; None if all are equal.

    Args:
        recipe: says them in `data.class_weights`.
        training: the images that are trained on.

    Raises:
        UserError: if a name is no class of the images.
    """
    given, names = recipe.data.class_weights, list(training.class_names)
    if given is None:
        return None
    if given == "balanced":
        counts = training.labels.bincount(minlength=training.num_classes).float()
        shown = counts > 0
        return torch.where(shown, counts.sum() / (shown.sum() * counts.clamp(min=1)), 1.0)
    named = cast("Mapping[str, float]", given)
    if unknown := [name for name in named if name not in names]:
        known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise UserError(f"data.class_weights: {unknown[0]!r} is no class of these images; they are {known}")
    return torch.tensor([named.get(name, 1.0) for name in names])


def _check_validation(recipe: Recipe, images: Images) -> None:
    for index, stage in enumerate(recipe.stages):
        if images.held_out is None and stage.keep == "best":
            raise UserError(
                f"stages.{index}.keep: best needs held-out images, but data.validation is 0; "
                "set keep: last or data.validation: 0.02"
            )
        if images.held_out is None and not stage.trains:
            key = "fit" if stage.fit is not None else "interpolate"
            raise UserError(f"stages.{index}.{key}: needs held-out images, but data.validation is 0; set it to 0.02")


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


def augmentations_of(recipe: Recipe, stage: Stage) -> tuple[Augmentation, ...]:
    """Return the augmentations of a stage."""
    return recipe.data.augment if stage.augment is None else stage.augment


def _check_augmented(recipe: Recipe, training: Split) -> None:
    """Refuse augmentations that leave images of another size than the model sees."""
    seen = recipe.data.image_size or training.image_shape[1:]
    for index, stage in enumerate(recipe.stages):
        image = torch.zeros(1, *training.image_shape, dtype=torch.uint8)
        for augmentation in augmentations_of(recipe, stage):
            image = augmentation(image, Streams.of(0, torch.arange(1)))
        if tuple(image.shape[2:]) != tuple(seen):
            key = "data.augment" if stage.augment is None else f"stages.{index}.augment"
            height, width = image.shape[2:]
            raise UserError(
                f"{key}: training images come out as {height}x{width}, but the model takes {seen[0]}x{seen[1]}; "
                f"cut that out with {{name: random_resized_crop, size: [{seen[0]}, {seen[1]}]}}"
            )


def count_measured(recipe: Recipe, test: Split) -> int:
    """Return the number of test images that are measured."""
    return test.count(recipe.evaluate.limit)


def _check_evaluation(recipe: Recipe, test: Split, room: int) -> None:
    """Refuse images that a measurement cannot change, and more than memory holds: an evaluation holds its images.

    A model of clean data that is to stand beside a trigger must know their classes too.
    """
    for measurement in recipe.evaluate.asked.measurements.values():
        with under("evaluate.attacks"):
            measurement.check(test.image_shape)
    clean, poison = recipe.evaluate.clean_model, recipe.data.poison
    if clean is not None and poison is not None and poison.target_of(test.class_names) is not None:
        with under("evaluate.clean_model"):
            CleanModel.of(clean, test)
    count, free = count_measured(recipe, test), 4 * room
    test.warn_if_sorted(count, "evaluate.limit")
    size = count * math.prod(test.image_shape)
    if test.is_stored and size > free:
        raise UserError(
            f"evaluate.limit: an evaluation holds its images in memory, and {count:,} of them take "
            f"{size / 2**30:.1f} GiB of {free / 2**30:.1f} that are free; set {free // (size // count)} or less"
        )


# ---- the network


def _fitting_network(
    recipe: Recipe, folder: RunFolder, device: torch.device, images: Images, image_facts: Mapping[str, Any],
    begin_with: nn.Module | None,
) -> Prepared:  # fmt: skip
    """Make the network for the images, and refuse what does not fit it."""
    architecture = _architecture(recipe, folder, images.training, device)
    torch.manual_seed(recipe.runtime.seed)
    model = architecture.create()
    if begin_with is not None:
        _fill(model, begin_with, architecture)
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


def _fill(model: nn.Module, given: nn.Module, architecture: Architecture) -> None:
    """Put somebody's weights into the network: into trunk and head 1, if theirs has no second head."""
    state = {name: tensor.detach().cpu() for name, tensor in given.state_dict().items()}
    where = f"model ({type(given).__name__})"
    if isinstance(model, DualHeadClassifier) and not isinstance(given, DualHeadClassifier):
        plain = architecture.plain()
        load_state(plain, state, where)
        model.load_base_state_dict(plain.state_dict())
    else:
        load_state(model, state, where)


def _architecture(recipe: Recipe, folder: RunFolder, training: Split, device: torch.device) -> Architecture:
    """Choose the network; it normalises as the weights do that it starts from, unless the recipe says how."""
    made = architecture_of(recipe, training)
    if recipe.model.normalize is not None or recipe.model.backbone.normalises:
        return made
    found = _known_normalisation(recipe, folder)
    if found is not None:
        return made.model_copy(update={"mean": found[0], "std": found[1]})
    for index, stage in enumerate(recipe.stages):
        if stage.init not in (None, RESET):
            with under(f"stages.{index}.init"):
                return _tried(recipe, stage, made, training, device)
    return made


TRIED = 512
"""Training images on which weights are tried with and without a normalisation."""


def _tried(recipe: Recipe, stage: Stage, made: Architecture, training: Split, device: torch.device) -> Architecture:
    """Find out whether weights that say nothing of normalisation were made with one: try both on training images.

    Raises:
        UserError: if neither way is clearly better: the weights' accuracy would be a guess.
    """
    channels = made.image_shape[0]
    raw = made.model_copy(update={"mean": (0.0,) * channels, "std": (1.0,) * channels})
    if raw == made:
        return made
    if stage.replace_classifier:
        if group().first:
            _log.warning(
                "%s says nothing of how it normalises images, and its classes are replaced, so it cannot be tried: "
                "taken is the mean and deviation of the data; model.normalize says it (none: images in [0, 1] as they "
                "are)", stage.init,
            )  # fmt: skip
        return made
    shown = training.take(torch.linspace(0, len(training) - 1, min(TRIED, len(training))).round().long())
    shown = shown.show_middle(*made.image_shape[1:])
    by_data, as_they_are = (_answers(way, stage, shown, device) for way in (made, raw))
    paired = mcnemar(as_they_are, by_data)
    rates = [100 * float(right.mean()) for right in (as_they_are, by_data)]
    largest = 100 * float(shown.labels.bincount().max()) / len(shown)
    told = (
        f"{stage.init} says nothing of how it normalises images; of {len(shown)} training images it classifies "
        f"{rates[0]:.1f} % with values in [0, 1] as they are and {rates[1]:.1f} % normalised by the data's mean and "
        "deviation"
    )
    if paired.p_value >= 1e-3 or max(rates) < 1.5 * largest:
        raise UserError(
            f"{told}: neither is clearly right; set model.normalize to what it was trained with: none, data, or "
            "{mean: [...], std: [...]}"
        )
    plain = rates[0] > rates[1]
    if group().first:
        _log.warning("%s: taken is the former (model.normalize: none)" if plain else
                     "%s: taken is the latter (model.normalize: data)", told)  # fmt: skip
    return raw if plain else made


def _answers(architecture: Architecture, stage: Stage, shown: Split, device: torch.device) -> NDArray[np.bool_]:
    """Tell which images the weights of a stage's `init` classify correctly in a network, bool [N]."""
    with kept_generators(device):
        model = architecture.create()
    load_base_weights(model, cast("str", stage.init), architecture)
    model = model.to(device)
    if isinstance(model, DualHeadClassifier):
        model = view(model, head_id(1))
    return np.asarray(answers(model, torch.as_tensor(shown.images[:]), 64) == shown.labels.cpu().numpy())


def _known_normalisation(recipe: Recipe, folder: RunFolder) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the mean and standard deviation of the weights that a run starts from; None if nothing tells them."""
    if folder.begun and (folder.checkpoints / CONFIG).is_file():  # what it started from may have gone since
        return normalisation_of(folder.checkpoints)
    for index, stage in enumerate(recipe.stages):
        with under(f"stages.{index}.init"):
            found = normalisation_of(stage.init) if stage.init not in (None, RESET) else None
        if found is not None:
            return found
    return recipe.model.backbone.published_normalisation()


def architecture_of(recipe: Recipe, training: Split) -> Architecture:
    """Return the network that a recipe means for its data."""
    channels, classes = training.image_shape[0], len(training.class_names)
    normalize = recipe.model.normalize or ("none" if recipe.model.backbone.normalises else "data")
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
        own=recipe.model.tied,
        num_classes=classes,
        image_shape=(channels, *(recipe.data.image_size or training.image_shape[1:])),
        mean=mean,
        std=std,
    )


def _pieces(split: Split) -> Iterator[Tensor]:
    """Yield the images of a split, some at a time; those on disk are all read for it."""
    if split.is_stored:
        _log.info("reading %d images for their mean and deviation; model.normalize may give these", len(split))
    return in_turn(split.images, torch.split(torch.arange(len(split)), 256), "cpu")


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


def _warn_of_reach(key: str, attack: Attack, threat: Threat) -> None:
    """Warn of steps that are left over from another radius or norm: they end inside the ball."""
    steps, length = getattr(attack, "steps", 1), getattr(attack, "step_size", None)
    if length is not None and steps * length < threat.eps:
        _log.warning(
            "%s: steps=%d of %.3g reach %.3g, and eps is %.3g; leave step_size out (null) for 2.5 eps / steps", key,
            steps, length, steps * length, threat.eps,
        )  # fmt: skip
