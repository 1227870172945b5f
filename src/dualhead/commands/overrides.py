"""Options of `train` that stand for keys of a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dualhead.errors import UserError
from dualhead.recipe import Recipe, load_recipe, stages_as_named


@dataclass(frozen=True)
class Shortcuts:
    """Values of the options; None: the recipe's."""

    epochs: int | None = None
    seed: int | None = None
    device: str | None = None
    lr: str | None = None
    batch_size: int | None = None
    data: str | None = None
    eps: str | None = None


_OF_STAGES: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "epochs": ("--epochs", "epochs", lambda stage: stage.epochs),
    "lr": ("--lr", "optimiser.lr", lambda stage: stage.optimiser.lr),
    "batch_size": ("--batch-size", "batch_size", lambda stage: stage.batch_size),
}
_OF_RECIPE = {"data": "data.source", "eps": "threat.eps", "seed": "runtime.seed", "device": "runtime.device"}


def with_shortcuts(
    name: str, overrides: Sequence[str], plugins: Sequence[str], shortcuts: Shortcuts
) -> tuple[Recipe, list[str]]:
    """Load a recipe with overrides and options.

    Args:
        name: of a shipped recipe, or path.
        overrides: `KEY=VALUE`.
        plugins: as for `load_recipe`.
        shortcuts: the options.

    Returns:
        The recipe, and a line for each option that changes several stages which differ in it.

    Raises:
        UserError: as `load_recipe`; or if an option and an override say the same key.
    """
    if shortcuts == Shortcuts():
        return load_recipe(name, overrides, plugins), []
    added, notes = written_out(load_recipe(name, overrides, plugins), overrides, shortcuts)
    return load_recipe(name, [*overrides, *added], plugins), notes


def settings_with_shortcuts(
    name: str, settings: Sequence[str], plugins: Sequence[str], shortcuts: Shortcuts
) -> tuple[list[str], list[str]]:
    """Return the settings of a sweep with those that options stand for, and notes as `with_shortcuts` gives them.

    Raises:
        UserError: as `with_shortcuts`; or if an option has several values.
    """
    if shortcuts == Shortcuts():
        return list(settings), []
    for option, key, value in (
        ("--lr", "stages.*.optimiser.lr", shortcuts.lr), ("--device", "runtime.device", shortcuts.device),
        ("--eps", "threat.eps", shortcuts.eps),
    ):  # fmt: skip
        if value is not None and "," in value:
            raise UserError(f"{option} {value}: is one value for all runs; for an axis write {key}={value}")
    added, notes = written_out(load_recipe(name, (), plugins), settings, shortcuts)
    return [*settings, *added], notes


def written_out(recipe: Recipe, overrides: Sequence[str], shortcuts: Shortcuts) -> tuple[list[str], list[str]]:
    """Return the overrides that options stand for, and a line for each that changes stages which differ in it.

    Args:
        recipe: with the stages that the options are for.
        overrides: `KEY=VALUE`, which must not say the same.
        shortcuts: the options.

    Raises:
        UserError: if an option and an override say the same key.
    """
    keys = [override.partition("=")[0] for override in overrides]
    added: list[str] = []
    notes: list[str] = []
    for field, key in _OF_RECIPE.items():
        value = getattr(shortcuts, field)
        if value is not None:
            _refuse_twice(f"--{field}", key, keys)
            # A path may hold what YAML, or the commas of an axis, would take for something else.
            added.append(f"{key}={json.dumps(value, ensure_ascii=False) if field == 'data' else value}")
    if any(getattr(shortcuts, field) is not None for field in _OF_STAGES):
        stages = [stage for stage in recipe.stages if stage.trains and stage.epochs]
        for field, (option, key, of) in _OF_STAGES.items():
            value = getattr(shortcuts, field)
            if value is None:
                continue
            for stage in stages:
                _refuse_twice(option, f"stages.{stage.name}.{key}", keys)
                added.append(f"stages.{stage.name}.{key}={value}")
            if len({of(stage) for stage in stages}) > 1:
                had = ", ".join(f"{stage.name} {of(stage)}" for stage in stages)
                notes.append(
                    f"{option} {value} holds for each of {len(stages)} stages, which had {had}; for one of them write "
                    f"stages.{stages[0].name}.{key}={value}"
                )
    return added, notes


def _refuse_twice(option: str, key: str, given: Sequence[str]) -> None:
    words = key.split(".")
    if words[0] == "stages":
        same = [
            g
            for g in given
            if g.startswith("stages.") and g.replace("optimizer", "optimiser").endswith(f".{'.'.join(words[2:])}")
        ]
    else:
        same = [g for g in given if g == key]
    if same:
        raise UserError(f"{option} and {same[0]} say the same; leave one of them out")


@contextmanager
def naming_stages(names: Sequence[object], overrides: Sequence[str]) -> Iterator[None]:
    """Call stages in a `UserError` by the names that overrides use."""
    try:
        yield
    except UserError as error:
        raise UserError(stages_as_named(str(error), overrides, names)) from None
