"""Read what was found with a surrogate for a poison, and say how the surrogate is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dualhead.components.plugins import code_of
from dualhead.data import Craft, Search, Split, Surrogate
from dualhead.errors import UserError
from dualhead.recipe import Recipe, parse_recipe
from dualhead.runs.folder import RunFolder, data_facts, without_how

STAGE_KEYS: Final = ("attack", "batch_size", "optimiser", "schedule", "average")
"""Settings of the victim's first stage that a surrogate shares."""


def without_poison(recipe: Recipe) -> Recipe:
    """Return a recipe on clean data."""
    data = recipe.data.model_copy(update={"poison": None, "clean_validation": False})
    evaluate = recipe.evaluate.model_copy(update={"clean_model": None})
    return recipe.model_copy(update={"data": data, "evaluate": evaluate})


def surrogate_recipe(recipe: Recipe, setting: Surrogate) -> Recipe:
    """Return the recipe by which a surrogate is trained on clean data.

    Args:
        recipe: the victim's: of the same backbone, images, batches and optimiser.
        setting: what is different.

    Raises:
        UserError: if the objective cannot train a network with one head.
    """
    plain = without_poison(recipe).resolved()
    plain["runtime"] |= {"seed": setting.seed, "tensorboard": False}
    if setting.eps is not None:
        for stage in plain["stages"]:  # a step that is written out belongs to the victim's eps
            if stage["attack"] is not None and stage["attack"].get("step_size") and stage["threat"] is None:
                share = setting.eps / plain["threat"]["eps"]
                stage["attack"] = {**stage["attack"], "step_size": share * stage["attack"]["step_size"]}
        plain["threat"]["eps"] = setting.eps
    if setting.objective != "self":
        first = next((stage for stage in plain["stages"] if stage["fit"] is None), plain["stages"][0])
        plain["model"] |= {
            "attach_at": None, "aggregator": None, "heads": 2, "second_head": "reset", "own": None,
        }  # fmt: skip
        plain["stages"] = [
            {
                "name": "surrogate", "train": ["model"], "objective": setting.objective, "epochs": setting.epochs,
                "keep": "last", **{key: first[key] for key in STAGE_KEYS},
            }
        ]  # fmt: skip
    return parse_recipe(plain, "data.poison.surrogate")


@dataclass(frozen=True)
class Crafted(Craft):
    """Reads what was found before.

    Args:
        recipe: the victim's.
        path: the victim's folder.
        test: test images, at some of which a search may aim.
    """

    recipe: Recipe
    path: Path
    test: Split

    @property
    def folder(self) -> Path:
        """Return the folder of surrogates and of what was found with them."""
        return RunFolder(self.path).crafted

    def find(self, clean: Split, index: Tensor, labels: Tensor, search: Search) -> tuple[Tensor, Mapping[str, Any]]:
        """See `Craft.find`."""
        found = self._read(self.key(clean, index, labels, search))
        if found is None:
            raise UserError(
                f"was not made yet; `dualhead train` makes it, in {self.folder}, before anything else of the run"
            )
        return found

    def key(self, clean: Split, index: Tensor, labels: Tensor, search: Search) -> str:
        """Return a name that changes with anything that decides what is found."""
        described: dict[str, Any] = {
            "search": search.described(),
            "surrogate": without_how(surrogate_recipe(self.recipe, search.surrogate).resolved()),
            "images": data_facts(clean),
        }
        code = code_of(type(search))
        if code is not None:
            described["code"] = code
        known = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
        known.update(search.aimed(self.test).numpy().tobytes())
        known.update(clean.images[:].numpy().tobytes() + index.numpy().tobytes() + labels.numpy().tobytes())
        return known.hexdigest()[:24]

    def _place(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _read(self, key: str) -> tuple[Tensor, Mapping[str, Any]] | None:
        """Return the images that were kept by a key, and what they cost; None if there are none."""
        path = self._place(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor("images"), dict(json.loads(file.metadata()["facts"]))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error}); remove it, and it is made again") from None
