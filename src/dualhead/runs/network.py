"""The network of a run: its architecture, chosen for the images, and how it normalises them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualhead.data import Split, in_turn, match
from dualhead.errors import UserError, under
from dualhead.evaluation import answers
from dualhead.heads import DualHeadClassifier, aggregators, default_aggregator
from dualhead.models import backbones, channel_statistics, load_state
from dualhead.names import head_id
from dualhead.recipe import Recipe, Statistics
from dualhead.runs.folder import RunFolder
from dualhead.saving import CONFIG, Architecture, class_names_of, load_base_weights, normalisation_of, view
from dualhead.statistics import mcnemar
from dualhead.system.generators import kept_generators
from dualhead.system.processes import group
from dualhead.training import RESET, Stage

_log = logging.getLogger(__name__)


def fitting_architecture(recipe: Recipe, folder: RunFolder, training: Split, device: torch.device) -> Architecture:
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


def refuse_other_order(recipe: Recipe, given: nn.Module | None, ours: Sequence[str]) -> None:
    """Refuse weights whose classes are those of the images in another order: right answers would count as wrong.

    Args:
        recipe: whose stages and backbone name weights.
        given: a network whose weights the run begins with, if there is one.
        ours: names of the images' classes.

    Raises:
        UserError: naming a class and its two places.
    """
    begun: dict[str, tuple[str, ...]] = {"model": tuple(recipe.model.backbone.weights_class_names(len(ours)))}
    named = getattr(given, "class_names", ())
    if isinstance(named, Sequence) and not isinstance(named, str):
        begun["model"] = tuple(map(str, named)) or begun["model"]
    for index, stage in enumerate(recipe.stages):
        if stage.init not in (None, RESET) and not stage.replace_classifier:
            begun[f"stages.{index}.init"] = class_names_of(stage.init)
    for key, theirs in begun.items():
        places = match(ours, theirs) if len(theirs) == len(ours) else None
        moved = next((n for n, place in enumerate(places or ()) if place != n), None)
        if places is not None and moved is not None:
            advice = "; replace_classifier: true starts the classifier afresh" if key != "model" else ""
            raise UserError(
                f"{key}: {ours[moved]!r} is class {moved} of the images and class {places[moved]} of these weights; "
                f"number the images' classes as the weights do{advice}"
            )


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


def fill(model: nn.Module, given: nn.Module, architecture: Architecture) -> None:
    """Put somebody's weights into the network: into trunk and head 1, if theirs has no second head."""
    state = {name: tensor.detach().cpu() for name, tensor in given.state_dict().items()}
    where = f"model ({type(given).__name__})"
    if isinstance(model, DualHeadClassifier) and not isinstance(given, DualHeadClassifier):
        plain = architecture.plain()
        load_state(plain, state, where)
        model.load_base_state_dict(plain.state_dict())
    else:
        load_state(model, state, where)
