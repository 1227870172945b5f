"""The images of a run: read, poisoned, held out, and refused where they do not fit the recipe."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

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
    match,
)
from dualhead.errors import UserError, under
from dualhead.noise import Streams
from dualhead.recipe import Recipe
from dualhead.runs.clean import CleanModel
from dualhead.runs.crafted import Crafted
from dualhead.runs.folder import RunFolder, data_facts, refuse_other_data, refuse_other_poison
from dualhead.system.devices import processors
from dualhead.system.processes import group
from dualhead.training import Stage

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


def image_facts(recipe: Recipe, folder: RunFolder, images: Images) -> dict[str, Any]:
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


def fitting_images(recipe: Recipe, loaded: Images, room: int) -> Images:
    """Hold validation images out, and refuse what does not fit the images.

    Args:
        recipe: in full.
        loaded: its images, with nothing held out.
        room: bytes of memory that there are for them.

    Raises:
        UserError: naming the key of the recipe.
    """
    images = _hold_out(recipe, loaded)
    class_weights(recipe, images.training)
    _check_validation(recipe, images)
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
