"""Do what `dualhead evaluate`, `gallery` and `layers` are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from dualhead.commands.quality import assess_further, chosen_by_samples
from dualhead.commands.resolve import BY_SAMPLES, Request, Resolved, resolve
from dualhead.commands.triggers import assess_trigger, clean_rate, marked_images
from dualhead.data import Split, digests
from dualhead.errors import UserError
from dualhead.evaluation import (
    ESTIMATE,
    Evaluation,
    EvaluationProgress,
    Finding,
    Gallery,
    RouterSetting,
    RouteSetting,
    check_duplicates,
    evaluate,
    evaluate_routers,
    evaluate_routes,
    make_gallery,
    parse_kinds,
)
from dualhead.heads import DualHeadClassifier, LayerInfo, layers
from dualhead.models import Normalize, backbones
from dualhead.objectives import ATTACKED, CLEAN, Logits
from dualhead.runs import GALLERY, RunFolder, parted, read_digests, read_recipe
from dualhead.saving import Architecture, OneHeadError, find_model, read_config
from dualhead.system.arithmetic import Precision
from dualhead.system.files import check_folder
from dualhead.system.processes import group


def assess(
    request: Request, progress: EvaluationProgress | None = None, stop: Callable[[], bool] = lambda: False
) -> tuple[Path, Evaluation]:
    """Evaluate what was asked for.

    Args:
        request: the options.
        progress: told how far it is.
        stop: as in `evaluate`.

    Returns:
        The folder with the results, and the evaluation.

    Raises:
        UserError: for a model, data or values that do not exist or do not fit one another.
    """
    if request.precision not in ("auto", "float32", "bf16"):
        raise UserError(f"--precision {request.precision}: use auto, float32 or bf16")
    request, checkpoint = chosen_by_samples(request)
    asked = resolve(request)
    test, count = asked.images, asked.images.count(request.limit)
    if group().first:
        test.warn_if_sorted(count, "--limit")
    marked = marked_images(request, asked, count)
    check_folder(asked.results, "--output")
    rate = clean_rate(request, asked, marked)  # first, so that a model that does not fit is refused now
    options: dict[str, Any] = {
        "threat": asked.threats or asked.threat, "attacks": asked.attacks, "batch_size": request.batch_size,
        "seed": request.seed, "precision": cast("Precision", request.precision), "command": request.command,
        "resume": not request.overwrite, "progress": progress, "stop": stop,
    }  # fmt: skip
    evaluation = evaluate(
        asked.model,
        test.images[:count],
        test.labels[:count],
        eps=asked.radii,
        class_names=list(test.class_names),
        skipped=len(test.skipped),
        checks=_duplicates(request, test.first(count)),
        save_adversarial=request.save_adversarial,
        output_dir=asked.results,
        transfer_from=None if request.transfer_from is None else _other(request),
        transfer_name=Path(request.transfer_from or "").name,
        subject={
            "stage": request.stage,
            "checkpoint": request.checkpoint,
            "output": request.output,
            **({"chosen": BY_SAMPLES} if checkpoint else {}),
        },
        **options,
    )
    if marked is not None:
        assess_trigger(request, asked, evaluation, marked, rate, options)
    assess_further(request, asked, evaluation, checkpoint)
    return asked.results, evaluation


def _other(request: Request) -> nn.Module:
    """Load the network that images are made against, on the images of the first."""
    assert request.transfer_from is not None
    asked = replace(request, model=request.transfer_from, stage=None, checkpoint=None, output=None)
    if not asked.is_run and request.is_run and asked.data is None:
        asked = replace(asked, data=read_recipe(Path(request.model)).data.source)
    return resolve(asked).model


def assess_routes(
    request: Request,
    progress: Callable[[str], EvaluationProgress] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Path, dict[str, Any]]:
    """Evaluate the routes of tied heads.

    Args:
        request: the options; `routes` says what is asked.
        progress: gives, for the name of a classifier, who is told how far its evaluation is.
        stop: as in `evaluate`.

    Returns:
        The folder with the results, and the content of `routes.json`.

    Raises:
        UserError: for a model without tied heads, and as `assess`.
    """
    kinds = parse_kinds(request.routes or "all")
    lacking = f"--routes: {request.model} has no tied heads (model.second_head: tied)"
    asked, test, options = _of_parts(request, "--routes", "evaluate one head with --output-of", lacking)
    classifier = asked.model
    if not isinstance(classifier, DualHeadClassifier) or not classifier.tied:
        raise UserError(lacking)
    clean, robust = _roles(request, classifier)
    setting = RouteSetting(
        threat=asked.threat, attacks=asked.attacks, clean=clean, robust=robust, kinds=kinds,
        batch_size=request.batch_size, seed=request.seed, options=options,
    )  # fmt: skip
    found = evaluate_routes(
        classifier,
        torch.as_tensor(test.images[:]),
        test.labels,
        setting,
        output_dir=asked.results,
        estimate_on=_training_images(request) if request.is_run else None,
        progress=progress,
        stop=stop,
    )
    return asked.results, found


def assess_routers(
    request: Request,
    progress: Callable[[str], EvaluationProgress] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Path, dict[str, Any]]:
    """Evaluate what weighs the routers of an aggregator, each router, and the controls.

    Args:
        request: the options.
        progress: gives, for the name of a classifier, who is told how far its evaluation is.
        stop: as in `evaluate`.

    Returns:
        The folder with the results, and the content of `routers.json`.

    Raises:
        UserError: for a model without routers or no run, and as `assess`.
    """
    if not request.is_run:
        raise UserError("--routers: the best router is chosen on images that a run held out; name a run")
    lacking = f"--routers: {request.model} has no routers (model.aggregator: after_dder)"
    asked, test, options = _of_parts(request, "--routers", "evaluate one router with --output-of router1", lacking)
    classifier = asked.model
    if not isinstance(classifier, DualHeadClassifier) or not classifier.routers:
        raise UserError(lacking)
    setting = RouterSetting(
        threats=asked.threats or (asked.threat,), attacks=asked.attacks, batch_size=request.batch_size,
        seed=request.seed, options=options,
    )  # fmt: skip
    found = evaluate_routers(
        classifier,
        torch.as_tensor(test.images[:]),
        test.labels,
        setting,
        held_out=_held_out(request, len(test)),
        output_dir=asked.results,
        progress=progress,
        stop=stop,
    )
    return asked.results, found


def _of_parts(request: Request, option: str, instead: str, lacking: str) -> tuple[Resolved, Split, dict[str, Any]]:
    """Resolve what is asked for a network whose parts are measured one by one.

    Args:
        request: the options.
        option: that asks for it.
        instead: says how one part is measured, with any option.
        lacking: says that the model has no such parts.

    Returns:
        The aggregate and what else was found, the images that are measured, and options of each evaluation.

    Raises:
        UserError: for options that such a measurement does not take, and as `assess`.
    """
    if request.output is not None:
        raise UserError(f"{option} measures one part after another; leave --output-of out")
    given = {
        "--transfer-from": request.transfer_from, "--poison": request.poison,
        "--save-adversarial": request.save_adversarial, "--generation": request.generation, "--ood": request.ood,
    }  # fmt: skip
    for refused, value in given.items():
        if value:
            raise UserError(f"{refused}: not with {option}; {instead}")
    if request.precision not in get_args(Precision):
        raise UserError(f"--precision {request.precision}: use {', '.join(get_args(Precision))}")
    try:
        asked = resolve(replace(request, output="aggregate"))
    except OneHeadError:
        raise UserError(lacking) from None
    if asked.radii:
        raise UserError(f"--eps: {option} measures at one radius")
    test = asked.images.first(asked.images.count(request.limit))
    if group().first:
        asked.images.warn_if_sorted(len(test), "--limit")
    check_folder(asked.results, "--output")
    options = {
        "precision": request.precision, "class_names": list(test.class_names), "skipped": len(test.skipped),
        "resume": not request.overwrite, "command": request.command, "checks": _duplicates(request, test),
    }  # fmt: skip
    return asked, test, options


def _held_out(request: Request, most: int) -> tuple[Tensor, Tensor]:
    """Load the training images that a run held out, at most as many as are measured.

    Raises:
        UserError: if it held none out.
    """
    recipe = read_recipe(Path(request.model))
    if not recipe.data.validation:
        raise UserError("--routers: the best router is chosen on held-out images, and data.validation of the run is 0")
    _, held = parted(Path(request.model), recipe, recipe.data.load("train"))
    if recipe.data.image_size:  # larger ones are for augmentations to cut from
        held = held.show_middle(*recipe.data.image_size)
    return torch.as_tensor(held.images[:most]), held.labels[:most]


def _roles(request: Request, classifier: DualHeadClassifier) -> tuple[str, str]:
    """Return the heads that saw clean and attacked images in training; the first and the last where nothing tells."""
    stages = read_recipe(Path(request.model)).stages if request.is_run else ()
    for stage in reversed(stages):
        logits = [need for need in stage.objective.needs().values() if isinstance(need, Logits)]
        seen = {
            on: {n.output for n in logits if n.on == on and n.output in classifier.heads} for on in (CLEAN, ATTACKED)
        }
        clean, robust = seen[CLEAN] - seen[ATTACKED], seen[ATTACKED] - seen[CLEAN]
        if clean and robust:
            return min(clean), min(robust)
    return classifier.heads[0], classifier.heads[-1]


def _training_images(request: Request) -> Callable[[], Tensor]:
    """Give the first training images of a run, as the network sees them without augmentation."""

    def read() -> Tensor:
        recipe = read_recipe(Path(request.model))
        limit = min(recipe.data.train_limit or ESTIMATE, ESTIMATE)
        split = recipe.data.model_copy(update={"train_limit": limit, "train_size": None}).load("train")
        return torch.as_tensor(split.images[:ESTIMATE])

    return read


def _duplicates(request: Request, test: Split) -> list[Finding]:
    """Look for images that a run learnt from among those that it is measured on; nothing tells of other models."""
    learnt = read_digests(RunFolder(Path(request.model))) if request.is_run else {}
    return [check_duplicates({**learnt, "test": digests(test)})] if learnt and not test.is_stored else []


def exhibit(request: Request, landscapes: Sequence[int] | None = None) -> tuple[Path, Gallery]:
    """Make a gallery of the first `limit` test images, and put it where the report looks for it.

    Args:
        request: what is asked for; attacks and precision are not.
        landscapes: positions of the samples whose surroundings are mapped; None for some that are worth it.

    Returns:
        The file, and what is in it.

    Raises:
        UserError: for a model, data or values that do not exist or do not fit one another.
    """
    asked = resolve(request)
    count = asked.images.count(request.limit)
    check_folder(asked.gallery, "--output")
    gallery = make_gallery(
        asked.model, asked.images.images[:count], asked.images.labels[:count], threat=asked.threat,
        landscapes=landscapes, seed=request.seed, batch_size=request.batch_size,
    )  # fmt: skip
    gallery.save(asked.gallery / GALLERY)
    return asked.gallery / GALLERY, gallery


def list_layers(name: str, image_shape: str, classes: int) -> list[LayerInfo]:
    """List the layers of a model at which a second head can start.

    Args:
        name: a backbone, `package.module:factory`, a run, an exported model or a Hub name.
        image_shape: `CHANNELSxHEIGHTxWIDTH`, for a backbone or a factory.
        classes: for a backbone or a factory.

    Raises:
        UserError: if there is no such model or shape.
    """
    if Path(name).is_dir() or ("/" in name and ":" not in name):
        folder = find_model(name)
        architecture = Architecture.parse(read_config(folder)["architecture"], str(folder))
        architecture = architecture.model_copy(update={"attach_at": None, "aggregator": None})
        model, shape = architecture.create(), architecture.image_shape
    else:
        parts = image_shape.lower().split("x")
        if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise UserError(f"--image-shape {image_shape}: write CHANNELSxHEIGHTxWIDTH, e.g. 3x32x32")
        shape = (int(parts[0]), int(parts[1]), int(parts[2]))
        model = backbones.build(name, where="model").create(classes, shape, Normalize.identity(shape[0]))
    return layers(model, torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)))
