"""Do what `dualhead evaluate --poison` is asked for: measure the trigger of a poison on any model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualhead.commands.resolve import Request, Resolved
from dualhead.data import Poison, poisons
from dualhead.errors import UserError, under
from dualhead.evaluation import TRIGGERED, Evaluation, TriggeredImages, measure_triggered
from dualhead.recipe import parse_yaml
from dualhead.runs import CleanModel, triggered_images
from dualhead.system.processes import group


def read_poison(text: str) -> Poison:
    """Return the poison that `--poison` names.

    Args:
        text: its name, `patch`, or its section of a recipe, `{name: patch, target: 3}`.

    Raises:
        UserError: if there is no such poison, or its settings are impossible.
    """
    spec = parse_yaml(text, f"--poison {text}")
    if not isinstance(spec, str | Mapping):
        raise UserError(f"--poison {text}: write a name, as patch, or its section of a recipe, '{{name: patch}}'")
    return poisons.build(spec, where="--poison")


def marked_images(request: Request, asked: Resolved, count: int) -> TriggeredImages | None:
    """Return the test images that carry the trigger of `--poison`; None where it is not asked for.

    Raises:
        UserError: for a poison without a trigger, a class that is not there, or `--clean-model` without `--poison`.
    """
    if request.poison is None:
        if request.clean_model is not None:
            raise UserError("--clean-model: is compared under a trigger; say which by --poison, or leave it out")
        return None
    poison = read_poison(request.poison)
    with under(f"--poison: {poison.registered_name}"):
        found = triggered_images(poison, asked.images, count)
    if found is None:
        raise UserError(
            f"--poison: {poison.registered_name} has no trigger, so that test images tell nothing of it; train on it "
            "with data.poison"
        )
    return found


def clean_rate(request: Request, asked: Resolved, marked: TriggeredImages | None) -> NDArray[np.bool_] | None:
    """Tell which triggered images the model of `--clean-model` takes for the target, bool [N]; None without one.

    Raises:
        UserError: if there is no such model, or it is for other images or classes.
    """
    if request.clean_model is None or marked is None:
        return None
    with under("--clean-model"):
        model = CleanModel.of(request.clean_model, asked.images)
    device = next(asked.model.parameters()).device
    return model.taken_for(marked.target, marked.images, request.batch_size, device)


def assess_trigger(
    request: Request,
    asked: Resolved,
    evaluation: Evaluation,
    marked: TriggeredImages,
    rate: NDArray[np.bool_] | None,
    options: Mapping[str, Any],
) -> None:
    """Add `poison` to an evaluation's results and save them; the triggered images' own evaluation lies beside.

    Args:
        request: what is asked for.
        asked: what that leads to.
        evaluation: of the same model on the images without the trigger.
        marked: the images with it.
        rate: of the clean model, as `clean_rate` gives it.
        options: threat, attacks and the like, for `evaluate`.
    """
    assert request.poison is not None
    told: dict[str, Any] = {"name": read_poison(request.poison).registered_name}
    told |= measure_triggered(asked.model, marked, output_dir=asked.results / TRIGGERED, clean_rate=rate, **options)
    if request.clean_model is not None:
        told["clean_model"]["where"] = request.clean_model
    evaluation.results["poison"] = told
    group().lead(lambda: evaluation.save(asked.results))
