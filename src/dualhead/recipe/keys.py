"""Where a key of a recipe lives, for those who wrote it somewhere else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Final

from dualhead.components.sections import Section
from dualhead.recipe.schema import Recipe
from dualhead.training.stage import Stage

_ALSO_CALLED: Final = {
    "learning_rate": "lr", "bs": "batch_size", "batchsize": "batch_size", "batch": "batch_size", "epoch": "epochs",
    "epsilon": "eps", "dataset": "source", "data": "source", "wd": "weight_decay", "opt": "optimiser",
    "optimizer": "optimiser", "arch": "backbone", "architecture": "backbone", "loss": "objective",
    "method": "objective", "num_epochs": "epochs", "max_epochs": "epochs", "gpu": "device",
    "scheduler": "schedule", "augmentation": "augment", "augmentations": "augment",
}  # fmt: skip
"""Keys by the names that other programs give them."""


def places_of(key: str, recipe: Recipe) -> list[str]:
    """Return the dotted keys of a recipe whose last word is `key`, or what other programs call so.

    Args:
        key: one word, in any case and with - or _.
        recipe: whose components are looked into.
    """
    word = key.lower().replace("-", "_")
    word = word if any(place.rpartition(".")[2] == word for place in _all(recipe)) else _ALSO_CALLED.get(word, word)
    return list(dict.fromkeys(place for place in _all(recipe) if place.rpartition(".")[2] == word))


def _all(recipe: Recipe) -> Iterator[str]:
    for name in Recipe.model_fields:
        if name == "stages":
            for stage in recipe.stages:
                yield from _inside(stage, "stages.*")
            continue
        yield name
        yield from _inside(getattr(recipe, name), name)


def _inside(value: Any, place: str) -> Iterator[str]:
    if isinstance(value, Section):
        names: Mapping[str, Any] = {name: getattr(value, name) for name in type(value).model_fields}
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    else:
        return
    for name, inner in names.items():
        yield f"{place}.{name}"
        if not isinstance(inner, Stage):
            yield from _inside(inner, f"{place}.{name}")
