"""Measure what a poison made of a trained run, output by output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualhead.data import HELD_OUT, REMOVED, Poison, Split, held_rows, triggered
from dualhead.errors import UserError, under
from dualhead.evaluation import (
    TRIGGERED,
    Evaluation,
    TriggeredImages,
    answers,
    confused,
    finders,
    learnt_by_heart,
    measure_triggered,
)
from dualhead.models import load_state, read_state
from dualhead.names import AGGREGATE, MEAN, router_number
from dualhead.recipe import Recipe
from dualhead.runs.clean import CleanModel
from dualhead.runs.folder import RunFolder
from dualhead.runs.images import count_measured
from dualhead.runs.prepare import Prepared
from dualhead.saving import view
from dualhead.system.processes import group


def parted(run: Path, recipe: Recipe, clean: Split) -> tuple[Split, Split]:
    """Part training images as a run did, which held images out by the labels that its poison gave.

    Args:
        run: its folder.
        recipe: of the run; it holds images out.
        clean: the training images as they are read, without the poison.

    Returns:
        What the run learnt from, and what it held out, both without the poison's changes and what it removed.

    Raises:
        UserError: if the record of the run's poison is gone.
    """
    labels, rows, record = clean.labels.cpu().clone(), torch.arange(len(clean)), RunFolder(run).poison
    if recipe.data.poison is not None:
        if not record.is_file():
            raise UserError(f"{record}: the record of the run's poison is gone, and with it which images it held out")
        with np.load(record) as made:
            labels[torch.from_numpy(made["index"])] = torch.from_numpy(made["new_label"])
        rows = (labels != REMOVED).nonzero()[:, 0]
    chosen = held_rows(labels[rows], clean.class_names, recipe.data.validation, recipe.runtime.seed, HELD_OUT)
    return clean.take(rows[~chosen]), clean.take(rows[chosen])


def triggered_images(poison: Poison, test: Split, count: int) -> TriggeredImages | None:
    """Return those of the first `count` test images that are not of the target's class, with the trigger.

    Args:
        poison: it.
        test: test images.
        count: how many of them are measured.

    Returns:
        None for a poison without a trigger.

    Raises:
        UserError: if there is no image of another class.
    """
    shown = test.first(count)
    target = poison.target_of(test.class_names)
    if target is None:
        return None
    if bool((shown.labels == target).all()):
        raise UserError("all test images that are measured are of the target's class; measure more of them")
    found = triggered(poison, shown)
    assert found is not None, "a poison with a target has a trigger"
    rows, marked = found
    return TriggeredImages(marked.images[:], marked.labels, rows, target, test.class_names)


@dataclass(frozen=True)
class Measures:
    """Measures of every output of a run on poisoned data, with what all outputs share.

    Args:
        prepared: the run.
    """

    prepared: Prepared

    @property
    def _poison(self) -> Poison:
        poison = self.prepared.recipe.data.poison
        assert poison is not None
        return poison

    @cached_property
    def _triggered(self) -> TriggeredImages | None:
        test = self.prepared.images.test
        with under("data.poison"):
            return triggered_images(self._poison, test, count_measured(self.prepared.recipe, test))

    @cached_property
    def _clean_rate(self) -> NDArray[np.bool_] | None:
        where, found = self.prepared.recipe.evaluate.clean_model, self._triggered
        if where is None or found is None:
            return None
        model, size = CleanModel.of(where, self.prepared.images.test), self.prepared.recipe.evaluate.batch_size
        return model.taken_for(found.target, found.images, size, self.prepared.device)

    @cached_property
    def _learnt(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Poisoned images that were trained on, their given and their true labels; None where none is left."""
        poisoning = self.prepared.images.poisoning
        assert poisoning is not None
        rows = poisoning.trained[torch.isin(poisoning.trained, poisoning.made.index)]
        if not len(rows):
            return None
        chosen = poisoning.made.split.take(torch.searchsorted(poisoning.made.rows, rows))
        size = self.prepared.recipe.data.image_size
        if size is not None:
            chosen = chosen.show_middle(*size)
        return chosen.images[:].cpu(), chosen.labels.cpu(), poisoning.clean.labels[rows].cpu()

    def of(
        self, model: nn.Module, evaluation: Evaluation, folder: Path, *, output: str, deployed: bool, **options: Any
    ) -> dict[str, Any]:
        """Return what `results.json` says under `poison`.

        Args:
            model: an output of the run.
            evaluation: of it, on the test images as they are.
            folder: where that lies.
            output: its id.
            deployed: it is the run's result; its best and last epochs are compared too.
            options: for `evaluate`.
        """
        recipe, found = self.prepared.recipe, self._triggered
        told: dict[str, Any] = {"name": self._poison.registered_name}
        poisoning = self.prepared.images.poisoning
        if poisoning is not None and poisoning.made.facts:
            told["crafting"] = dict(poisoning.made.facts)
        if found is not None:
            told |= measure_triggered(
                model, found, output_dir=folder / TRIGGERED, clean_rate=self._clean_rate, **options
            )
            if recipe.evaluate.clean_model is not None:
                told["clean_model"]["where"] = recipe.evaluate.clean_model
        if self._learnt is not None:
            told["training"] = learnt_by_heart(model, *self._learnt, recipe.evaluate.batch_size)
        if output_has_features(output):
            told |= self._finders(model)
        names = self.prepared.images.test.class_names
        if pairs := self._poison.pairs_of(names):
            told["pairs"] = confused(evaluation.clean_prediction, evaluation.labels, pairs, names)
        if (aim := self._poison.aims_at(names)) is not None:
            told["aimed"] = self._aimed(model, *aim)
        epochs = self._epochs() if deployed else {}
        return told | ({"epochs": epochs} if epochs else {})

    def _aimed(self, model: nn.Module, image: int, wanted: int) -> dict[str, Any]:
        """Tell what a model takes the test image for that a poison aims at."""
        chosen = self.prepared.images.test.take(torch.tensor([image]))
        (said,) = answers(model, chosen.images[:].cpu(), 1).tolist()
        names = chosen.class_names
        return {
            "image": image, "class": names[int(chosen.labels[0])], "wanted": names[wanted],
            "taken_for": names[said] if said >= 0 else None, "success": said == wanted,
        }  # fmt: skip

    def _finders(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """Tell whether features give poisoned images away; where images are on disk, this is left out."""
        poisoning, training = self.prepared.images.poisoning, self.prepared.images.training
        assert poisoning is not None
        recipe = self.prepared.recipe
        if training.is_stored or recipe.data.train_size is not None:
            return {}
        poisoned = torch.isin(poisoning.trained, poisoning.made.index)
        images, labels = training.images[:].cpu(), training.labels.cpu()
        return finders(model, images, labels, poisoned, recipe.evaluate.batch_size)

    def _epochs(self) -> dict[str, dict[str, Any]]:
        """Tell best and last epoch of the last stage apart: the best may end before a poison is learnt."""
        prepared, stage = self.prepared, self.prepared.recipe.stages[-1]
        paths = {which: prepared.folder.weights(stage.name, which) for which in ("best", "last")}
        if prepared.images.held_out is None or not all(path.is_file() for path in paths.values()):
            return {}
        summary = json.loads(prepared.folder.summary(stage.name).read_text(encoding="utf-8"))
        best, found, size = summary.get("best", {}), self._triggered, prepared.recipe.evaluate.batch_size
        test, count = prepared.images.test, count_measured(prepared.recipe, prepared.images.test)
        told: dict[str, dict[str, Any]] = {}
        for which, path in paths.items():
            network = prepared.architecture.create()
            load_state(network, group().lead(lambda path=path: read_state(path)), str(path))  # type: ignore[misc]
            model = view(network.to(prepared.device), prepared.output)
            right = answers(model, torch.as_tensor(test.images[:count]), size) == test.labels[:count].cpu().numpy()
            told[which] = {"epoch": best.get("epoch") if which == "best" else stage.epochs}
            told[which]["clean_accuracy"] = float(right.mean())
            if found is not None:
                told[which]["attack_success_rate"] = float((answers(model, found.images, size) == found.target).mean())
        return told


def output_has_features(output: str) -> bool:
    """Tell whether an output is one network, whose last linear layer sees the features of images."""
    return output not in (MEAN, AGGREGATE) and router_number(output) is None


def summary_of(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row of `comparison.json` holds of the measures: all but the classes."""
    return {key: value for key, value in told.items() if key != "per_class"}
