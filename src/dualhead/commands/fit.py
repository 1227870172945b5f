"""`dualhead.fit`: a run from Python, on one's own network and images."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from dualhead.commands.overrides import naming_stages
from dualhead.commands.terminal import EvaluationDisplay, TrainingDisplay, progress_bar
from dualhead.components.plugins import searched_in
from dualhead.data import GivenImages, Labelled, Split, holding, match, one_form
from dualhead.errors import UserError, under
from dualhead.evaluation import LABEL_KEYS, read_all
from dualhead.heads import DualHeadClassifier, layers, own_words
from dualhead.models import Normalize, address_of, at_hand, backbones, describe_given
from dualhead.recipe import Data, Override, Overrides, Recipe, override, parse_overrides, parse_recipe, recipe_content
from dualhead.runs import RunResult, train
from dualhead.system.generators import kept_generators
from dualhead.system.processes import joined
from dualhead.system.told import told_once

_log = logging.getLogger(__name__)

_ROUNDED = 1e-3  # in steps of 1/255; a float32 of a pixel divided by 255 is nearer
_NO_INIT = "reset"


def fit(
    model: nn.Module | str,
    train: Any = None,
    test: Any = None,
    *,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    overrides: Overrides = (),
    eps: float | str | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    device: str | torch.device | None = None,
    attach_at: str | None = None,
    class_names: Sequence[str] | None = None,
    factory: Callable[..., nn.Module] | None = None,
    run_dir: str | Path | None = None,
    progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> RunResult:
    """Train a network robustly on your images as a recipe says, measure it, and write a report.

    The run is one like those of the command line: the same data, network and seed give the same weights to the bit. The
    same call goes on with a run that was stopped. Images are kept in memory with 8 bits a value; loaders and data sets
    are read once, so augmentation belongs into the recipe (`data.augment`). Processes of torchrun make the same call,
    and share every batch.

    Args:
        model: images [B, C, H, W] in [0, 1] to logits [B, classes], with the weights to begin with; it is left as it
            is. With a second head (`attach_second_head`) or without: a recipe for two heads then attaches one. Or the
            name of a backbone, for fresh weights.
        train: images and labels to train on: a pair of tensors or arrays, images uint8 or floating in [0, 1],
            [N, C, H, W], [N, H, W, C] or [N, H, W], labels integers [N]; a `DataLoader`, a data set (torch's or
            `datasets`'), or what `data.source` names. None: the recipe's `data.source`.
        test: those to measure on, likewise; None: the test part of the source that `train` names.
        recipe: name of a shipped recipe, path to a YAML file, a mapping as such a file holds it, or a `Recipe`.
        overrides: values by dotted key, `{"stages.*.batch_size": 64}`, or `KEY=VALUE` strings as on the command line.
        eps: radius of the threat, 0.03 or `8/255`; None for the recipe's.
        epochs: of every stage that trains; None for the recipe's.
        seed: of all random numbers; None for the recipe's.
        device: `cpu`, `cuda`, ...; None for the recipe's, which is the best there is.
        attach_at: layer at whose output the second head begins; None for the recipe's where the network has such a
            layer, else the one that `dualhead layers` recommends.
        class_names: in the order of the labels; needed where not every class has an image. Labels of a data set that
            names its classes are numbered by these names; it may be given new ones, in its order. None for those of
            the data set, or numbers.
        factory: makes such a network. Where the class cannot be imported, or takes arguments, `dualhead.load` and the
            command line need it.
        run_dir: the run's folder; None for `runs/NAME`.
        progress: show bars, or lines where there is no terminal.
        stop: asked after every step; when true the run saves itself and raises `Interrupted`.

    Returns:
        The run; printed, it is the table of its accuracies.

    Raises:
        UserError: for a model, images, labels or a recipe that do not fit one another; nothing is written then.
        Interrupted: when stopped.
        RunError: when training fails.
    """
    folders: list[Path] = []
    content = recipe_content(recipe, folders)
    images = _images(train, test, class_names)
    source = images.source if images is not None else None if train is None else str(train)
    given = _overrides(overrides, source, eps, seed, device)
    for change in given:
        override(content, change)
    if epochs is not None:
        _set_epochs(content, epochs)
    with told_once(), joined() as processes, searched_in(folders), holding(images):
        _refuse_other_images(processes.gather(source))
        progress = progress and processes.first
        begin_with, maker = _settle_model(content, model, factory, attach_at)
        names = [stage.get("name") for stage in content.get("stages") or () if isinstance(stage, Mapping)]
        with (
            at_hand(maker),
            progress_bar(quiet=not progress) as bar,
            naming_stages(names, [change.key for change in given]),
        ):
            parsed = parse_recipe(content, "recipe" if not isinstance(recipe, str | Path) else f"recipe {recipe}")
            return train_run(
                parsed, run_dir=run_dir, stop=stop, begin_with=begin_with,
                progress=TrainingDisplay(bar) if progress else None,
                evaluation_progress=(lambda row: EvaluationDisplay(bar, row)) if progress else None,
            )  # fmt: skip


train_run = train  # inside `fit`, `train` is the training images


def _overrides(
    given: Overrides,
    source: str | None,
    eps: float | str | None,
    seed: int | None,
    device: str | torch.device | None,
) -> list[Override]:
    """Return all overrides; what has a name of its own in the call comes last."""
    own = {
        "data.source": source,
        "threat.eps": eps,
        "runtime.seed": seed,
        "runtime.device": None if device is None else str(device),
    }
    named = {key: value for key, value in own.items() if value is not None}
    return [*parse_overrides(given), *parse_overrides(named)]


def _set_epochs(content: Mapping[str, Any], epochs: int) -> None:
    """Set the epochs of stages that train: those of 0 epochs leave weights that they begin with as they are."""
    stages = content.get("stages")
    for stage in stages if isinstance(stages, list) else []:
        if (
            isinstance(stage, dict)
            and not stage.get("fit")
            and not stage.get("interpolate")
            and stage.get("epochs") != 0
        ):
            stage["epochs"] = epochs


# ---- images


def _refuse_other_images(sources: Sequence[str | None]) -> None:
    """Refuse processes of torchrun that each hold other images: they share every batch."""
    other = next((rank for rank, source in enumerate(sources) if source != sources[0]), None)
    if other is not None:
        raise UserError(
            f"train, test: process {other} holds other images than process 0, or in another order; give all processes "
            "the same: each trains on its share of every batch"
        )


def _images(train: Any, test: Any, class_names: Sequence[str] | None) -> GivenImages | None:
    """Return the images if a program holds any of them; None if a source names them all."""
    if test is not None and train is None:
        raise UserError(
            "train: give the images to train on too, or leave test out for those of the recipe's data.source"
        )
    if train is None or (isinstance(train, str | Path) and test is None):
        if class_names is not None:
            raise UserError("class_names: names those of tensors; those of a source are its own")
        return None
    parts: dict[str, Labelled | str] = {}
    names: dict[str, tuple[str, ...] | None] = {}
    for part, given in (("train", train), ("test", test)):
        if given is not None:
            parts[part], names[part] = _part(given, part)
    ours, theirs = names["train"], names.get("test")
    content = parts.get("test")
    if ours is not None and theirs is not None and not isinstance(content, str | None):
        parts["test"] = _renumbered(content, _places(theirs, ours, "test: its classes", "those of train"))
        theirs = ours
    named = ours or theirs
    if class_names is not None:
        named = tuple(map(str, class_names))
        for part, own in (("train", ours), ("test", theirs)):
            content = parts.get(part)
            if own is not None and not isinstance(content, str | None):
                parts[part] = _renumbered(content, _named_anew(own, named, part))
    elif ours is None and theirs is not None and not isinstance(parts["train"], str):
        _log.warning("train: does not name its classes; their order is taken to be that of test, 0 is %s", theirs[0])
    return GivenImages(parts, named)


def _places(theirs: Sequence[str], known: Sequence[str], whose: str, of: str) -> list[int]:
    """Return the number of each class among others, by their names."""
    places = match([one_form(name) for name in theirs], [one_form(name) for name in known])
    if places is None:
        raise UserError(f"{whose} ({', '.join(theirs[:4])}, ...) are not {of} ({', '.join(known[:4])}, ...)")
    return places


def _named_anew(own: Sequence[str], named: Sequence[str], part: str) -> list[int]:
    """Return the number of each class of a data set among `class_names`: by name, or in order if all names are new.

    Raises:
        UserError: if some names are the data set's and others are not.
    """
    if len(own) == len(named) and not {one_form(name) for name in own} & {one_form(name) for name in named}:
        return list(range(len(own)))
    return _places(own, named, f"{part}: the names of its classes", "among class_names")


def _renumbered(content: Labelled, places: Sequence[int]) -> Labelled:
    """Give labels other numbers of their classes; text stays, since it names its class."""
    images, labels = content
    if labels.dtype.kind in "US":
        return images, labels
    if labels.ndim == 2 and labels.shape[1] > 1:  # a column for each class
        columns = np.zeros((len(labels), max(places) + 1), labels.dtype)
        columns[:, list(places)] = labels
        return images, columns
    return images, np.asarray(places)[labels.astype(np.int64)]


def _part(given: Any, part: str) -> tuple[Labelled | str, tuple[str, ...] | None]:
    """Return images and labels, or the name of a source, and names of classes if the data set has them."""
    if isinstance(given, str | Path):
        return str(given), None
    if isinstance(given, Split):
        return (np.asarray(given.images[:]), given.labels.numpy()), given.class_names
    names = None
    if isinstance(given, tuple | list) and len(given) == 2 and isinstance(given[0], list):  # of images
        try:
            given = np.stack([_array(one) for one in given[0]]), np.asarray([_array(one) for one in given[1]])
        except (TypeError, ValueError):
            raise UserError(f"{part}: a list of images must hold tensors or arrays of one shape, and labels") from None
    if isinstance(given, tuple | list) and len(given) == 2 and _is_array(given[0]):
        images, labels = (_array(one) for one in given)
    elif _is_array(given):
        raise UserError(f"{part}: images alone have no labels; give a pair, {part}=(images, labels)")
    elif isinstance(given, Mapping):
        raise UserError(
            f"{part}: got a {type(given).__name__} with the keys {', '.join(map(str, list(given)[:4]))}; give one of "
            f"its data sets, {part}=data[KEY], or a pair, {part}=(images, labels)"
        )
    elif isinstance(given, Iterable) or hasattr(given, "__getitem__"):
        names = _class_names(given.dataset if isinstance(given, DataLoader) else given)
        with under(part):
            read = read_all(given)
        images, labels = (_array(one) for one in read)
    else:
        raise UserError(
            f"{part}: got {type(given).__name__}; give (images, labels), a DataLoader, a data set, or a name of one"
        )
    _check(images, labels, part, names)
    return (images, labels), names


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _array(value: Any) -> NDArray[Any]:
    if not isinstance(value, Tensor):
        return np.asarray(value)
    return (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()  # numpy has no bfloat16


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    """Names of classes as torchvision's data sets and those of `datasets` have them, also those of a subset."""
    names = getattr(dataset, "classes", None)
    features = getattr(dataset, "features", None)
    if names is None and isinstance(features, Mapping):
        names = getattr(features.get(next((key for key in LABEL_KEYS if key in features), None)), "names", None)
    if names is None and isinstance(dataset, Subset):
        return _class_names(dataset.dataset)
    return tuple(map(str, names)) if isinstance(names, Sequence) and not isinstance(names, str) and names else None


def _check(images: NDArray[Any], labels: NDArray[Any], part: str, names: tuple[str, ...] | None) -> None:
    """Refuse what can be no labelled images, and tell of values that 8 bits do not hold."""
    if images.ndim not in (3, 4) or not len(images):
        raise UserError(f"{part}: images must be [N, C, H, W], [N, H, W, C] or [N, H, W], got {list(images.shape)}")
    if labels.ndim not in (1, 2) or len(labels) != len(images):
        raise UserError(f"{part}: {len(images)} images need labels [{len(images)}], got {list(labels.shape)}")
    if labels.dtype.kind == "f" and not bool((labels == labels.round()).all()):
        raise UserError(
            f"{part}: labels must be integers, got {labels.dtype} such as {labels[labels != labels.round()][0]:g}"
        )
    if labels.dtype.kind in "iuf" and int(labels.min()) < 0:
        raise UserError(f"{part}: labels must be 0 or more, got {int(labels.min())} for image {int(labels.argmin())}")
    if names is not None and labels.dtype.kind in "iuf" and int(labels.max()) >= len(names):
        raise UserError(f"{part}: labels must lie in 0..{len(names) - 1}, got {int(labels.max())}")
    if images.dtype.kind != "f":
        return
    low, high = float(images.min()), float(images.max())
    if not np.isfinite([low, high]).all():
        raise UserError(f"{part}: images hold NaN or infinite values; leave them out or mend them")
    if low >= -_ROUNDED and high <= 1 + _ROUNDED:
        steps = images[:4096].astype(np.float64) * 255
        if float(np.abs(steps - steps.round()).max()) > 10 * _ROUNDED:
            _log.warning("%s: images are kept with 8 bits a value; these hold more, and are rounded to 1/255", part)


# ---- the network


def _settle_model(
    content: dict[str, Any], model: nn.Module | str, factory: Callable[..., nn.Module] | None, attach_at: str | None
) -> tuple[nn.Module | None, Callable[..., nn.Module] | None]:
    """Write the network into a recipe.

    Returns:
        The network whose weights the run begins with, and what makes the network where no address does.
    """
    section = content.setdefault("model", {})
    if isinstance(model, str):
        if factory is not None:
            raise UserError("factory: goes with a network; a backbone's name says how it is made")
        known = backbones.build(model, "model").attach_at
        section["backbone"] = model
        if attach_at is not None or (section.get("attach_at") is not None and known is not None):
            section["attach_at"] = attach_at or known
        return None, None
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise UserError(f"model: must be a torch.nn.Module or the name of a backbone, got {kind}")
    shown = Data.read(content.get("data")).load("train")
    size = content["data"].get("image_size")
    shape = (shown.image_shape[0], *((int(size[0]), int(size[1])) if size else shown.image_shape[1:]))
    address = address_of(model, factory, shown.num_classes, shape, to_train=True)
    section["backbone"] = describe_given(model) if address is None else {"name": "factory", "path": address}
    if address is None and factory is None:
        _refuse_reset(content)
    if isinstance(model, DualHeadClassifier):
        if attach_at not in (None, model.split_at):
            raise UserError(f"attach_at: this model has its heads already, behind {model.split_at}; leave it out")
        section |= _given_heads(model, section)
    maker = factory or (lambda: _copied(model)) if address is None else None
    if not isinstance(model, DualHeadClassifier) and (attach_at or section.get("attach_at")) is not None:
        with at_hand(maker):
            made = _wrapped(section, shown.num_classes, shape)
        section["attach_at"] = _layer(made, str(attach_at or section["attach_at"]), shape, asked=attach_at is not None)
    return model, maker


def _given_heads(model: DualHeadClassifier, section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a recipe's `model` that tell of the heads of a network that has them."""
    found: dict[str, Any] = {"attach_at": model.split_at, "heads": len(model.heads)}
    if model.tied:
        found |= {"second_head": "tied", "own": list(own_words(model.head2, model.own_of_tied))}
    elif section.get("second_head") == "tied":
        raise UserError(
            "model: its heads share no tensor, and the recipe ties them; attach them with init='tied', or set "
            "model.second_head to reset"
        )
    if model.is_mean:
        found["aggregator"] = "mean"
    return found


def _copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).cpu()


def _wrapped(section: Mapping[str, Any], num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Return the network as a run has it: within another where something is put before it, or reads its logits."""
    channels, bare = shape[0], section.get("normalize") in (None, "none")
    normalize = Normalize.identity(channels) if bare else Normalize([0.5] * channels, [0.5] * channels)
    with kept_generators(torch.device("cpu")):
        return backbones.build(section["backbone"], "model").create(num_classes, shape, normalize)


def _layer(model: nn.Module, named: str, shape: tuple[int, int, int], *, asked: bool) -> str:
    """Return a layer by its name in the network of a run, also if it was given by that in the network itself.

    Args:
        model: the network of the run.
        named: the layer.
        shape: of an image.
        asked: whether the call names it, and not a recipe for a network of its own: no other one is taken then.
    """
    names = dict(model.named_modules())
    inside = f"model.{named}"
    if named == "input" or named in names or inside in names or asked:
        return inside if named not in names and inside in names else named
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    example = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    found = next((layer.name for layer in layers(model, example) if layer.recommended), None)
    if found is None:
        raise UserError("attach_at: no layer of this network can be recommended for a second head; name one")
    _log.warning("attach_at: the network has no layer %s, and the second head is attached at %s", named, found)
    return found


def _refuse_reset(content: Mapping[str, Any]) -> None:
    for index, stage in enumerate(content.get("stages") or ()):
        if isinstance(stage, Mapping) and stage.get("init") == _NO_INIT:
            raise UserError(
                f"stages.{index}.init: reset needs fresh weights; give factory=, a function that makes the network"
            )
