"""Do what `dualhead evaluate`, `gallery` and `layers` are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch

from dualhead.commands.resolve import Request, resolve
from dualhead.data import Split, digests
from dualhead.errors import UserError
from dualhead.evaluation import (
    Evaluation,
    EvaluationProgress,
    Finding,
    Gallery,
    check_duplicates,
    evaluate,
    make_gallery,
)
from dualhead.heads import LayerInfo, layers
from dualhead.models import Normalize, backbones
from dualhead.runs import GALLERY, RunFolder, read_digests
from dualhead.saving import Architecture, find_model, read_config
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
    asked = resolve(request)
    test, count = asked.images, min(request.limit or len(asked.images), len(asked.images))
    if group().first:
        test.warn_if_sorted(count, "--limit")
    check_folder(asked.results, "--output")
    evaluation = evaluate(
        asked.model,
        test.images[:count],
        test.labels[:count],
        threat=asked.threats or asked.threat,
        attacks=asked.attacks,
        eps=asked.radii,
        batch_size=request.batch_size,
        seed=request.seed,
        precision=cast("Precision", request.precision),
        class_names=list(test.class_names),
        skipped=len(test.skipped),
        checks=_duplicates(request, test.first(count)),
        save_adversarial=request.save_adversarial,
        output_dir=asked.results,
        resume=not request.overwrite,
        progress=progress,
        command=request.command,
        subject={"stage": request.stage, "checkpoint": request.checkpoint, "output": request.output},
        stop=stop,
    )
    return asked.results, evaluation


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
    count = min(request.limit or len(asked.images), len(asked.images))
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
