"""Read what was found with a surrogate for a poison, and say how the surrogate is trained."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dualhead.data import Aligning, Craft, Search, Split, Surrogate
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
        test: test images, one of which a search may aim at.
    """

    recipe: Recipe
    path: Path
    test: Split
    _told: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Return the folder of surrogates and of what was found with them."""
        return RunFolder(self.path).crafted

    def find(self, clean: Split, index: Tensor, labels: Tensor, search: Search) -> Tensor:
        """See `Craft.find`."""
        key = self.key(clean, index, labels, search)
        found = self._read(key)
        if found is None:
            raise UserError(
                f"was not made yet; `dualhead train` makes it, in {self.folder}, before anything else of the run"
            )
        return found

    def facts(self) -> dict[str, Any]:
        """See `Craft.facts`."""
        return dict(self._told)

    def key(self, clean: Split, index: Tensor, labels: Tensor, search: Search) -> str:
        """Return a name that changes with anything that decides what is found."""
        described = {
            "search": {
                **asdict(replace(search, threat=None)),  # type: ignore[arg-type]
                "threat": search.threat.describe(),
                **({} if type(search) is Search else {"kind": type(search).__name__}),
            },
            "surrogate": without_how(surrogate_recipe(self.recipe, search.surrogate).resolved()),
            "images": data_facts(clean),
        }
        known = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
        if isinstance(search, Aligning):
            known.update(self.aimed(search).numpy().tobytes())
        known.update(clean.images[:].numpy().tobytes() + index.numpy().tobytes() + labels.numpy().tobytes())
        return known.hexdigest()[:24]

    def aimed(self, search: Aligning) -> Tensor:
        """Return the test image that a search aims at, uint8 [1, C, H, W].

        Raises:
            UserError: if there is none, or it is of the wanted class.
        """
        if search.image >= len(self.test):
            raise UserError(f"image: there is no test image {search.image}; they are 0 to {len(self.test) - 1}")
        if int(self.test.labels[search.image]) == search.wanted:
            name = self.test.class_names[search.wanted]
            raise UserError(f"image: test image {search.image} is of class {name!r}; choose another image or target")
        return self.test.take(torch.tensor([search.image])).images[:]

    def _place(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _read(self, key: str) -> Tensor | None:
        path = self._place(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                self._told.update(json.loads(file.metadata()["facts"]))
                found: Tensor = file.get_tensor("images")
                return found
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error}); remove it, and it is made again") from None
