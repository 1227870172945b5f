"""Make poisons that need a surrogate: train it in the run's folder, search with it, and keep what was found."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dualhead.attacks import Maximiser, attacks, maximise_within
from dualhead.data import Search, Split, Surrogate
from dualhead.noise import Streams
from dualhead.recipe import Recipe
from dualhead.runs.crafted import Crafted, surrogate_recipe, without_poison
from dualhead.runs.folder import RunFolder, taken, without_how
from dualhead.runs.prepare import Prepared, load_images, prepare, under
from dualhead.runs.stages import train_stages
from dualhead.saving import view
from dualhead.system.devices import float32_products
from dualhead.system.files import write_atomically
from dualhead.system.modes import in_eval_mode
from dualhead.system.processes import group
from dualhead.training import Silent, TrainingProgress

BATCH: Final = 256


@dataclass(frozen=True)
class Crafting(Crafted):
    """Makes what was not found before.

    In a group of processes each calls `find` with the same arguments; they train the surrogate together, and the first
    one searches.

    Args:
        progress: told of the surrogate's training.
        stop: asked after every step of it; when true it saves itself and raises `Interrupted`.
    """

    progress: TrainingProgress = field(default_factory=Silent)
    stop: Callable[[], bool] = lambda: False

    def find(self, clean: Split, index: Tensor, labels: Tensor, search: Search) -> Tensor:
        """See `Craft.find`."""
        key, processes = self.key(clean, index, labels, search), group()
        if not processes.lead(self._place(key).is_file):
            prepared, model = self._trained(search.surrogate)
            processes.lead(lambda: self._search(key, clean, index, labels, search, prepared, model))
        return super().find(clean, index, labels, search)

    def _trained(self, setting: Surrogate) -> tuple[Prepared, nn.Module]:
        """Train a surrogate, or load it where that is done."""
        recipe = surrogate_recipe(self.recipe, setting)
        digest = hashlib.sha256(json.dumps(without_how(recipe.resolved()), sort_keys=True).encode()).hexdigest()[:12]
        prepared = prepare(recipe, self.folder / f"surrogate-{digest}")
        with taken(prepared.folder):
            model = train_stages(prepared, self.progress, self.stop)
        return prepared, view(model, prepared.output)

    @float32_products()
    def _search(
        self, key: str, clean: Split, index: Tensor, labels: Tensor, search: Search, prepared: Prepared,
        model: nn.Module,
    ) -> None:  # fmt: skip
        """Search, and keep what is found with what it cost."""
        begun = time.perf_counter()
        attack = attacks.build({"name": "pgd", "steps": search.steps, "step_size": search.step_size})
        assert isinstance(attack, Maximiser)
        sign, made = -1.0 if search.towards else 1.0, []
        with in_eval_mode(model):
            for rows in torch.split(torch.arange(len(index)), BATCH):
                x = clean.images[index[rows]].to(prepared.device).float() / 255
                y = labels[rows].to(prepared.device)

                def climb(z: Tensor, y: Tensor = y) -> Tensor:
                    return sign * nn.functional.cross_entropy(model(z), y, reduction="none")

                streams = Streams.of(search.seed, index[rows].to(prepared.device)).fork("poison search")
                made.append(maximise_within(attack, climb, x, search.threat, streams).cpu())
        facts = {
            "surrogate": {**asdict(search.surrogate), **_cost(prepared)},
            "search": {
                "seconds": round(time.perf_counter() - begun, 1), "forward_passes": search.steps * len(index),
                "backward_passes": search.steps * len(index),
            },
        }  # fmt: skip
        images = {"images": torch.cat(made).contiguous()}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._place(key), lambda aside: save_file(images, aside, {"facts": json.dumps(facts)}))


def _cost(prepared: Prepared) -> dict[str, Any]:
    """Return what training a surrogate has cost."""
    summaries: list[Mapping[str, Any]] = [
        json.loads(prepared.folder.summary(stage.name).read_text(encoding="utf-8")) for stage in prepared.recipe.stages
    ]
    return {key: sum(summary[key] for summary in summaries) for key in ("flops", "seconds")}


def craft(recipe: Recipe, path: Path, progress: TrainingProgress, stop: Callable[[], bool]) -> None:
    """Make a run's poison before the run, where that needs a surrogate; nothing where it does not, or it is made.

    Args:
        recipe: the victim's.
        path: the victim's folder.
        progress: told of the surrogate's training.
        stop: asked after every step of it.

    Raises:
        UserError: for a recipe that could not be trained on clean data either, or a surrogate that cannot be trained.
        Interrupted: when stopped; the same call goes on.
    """
    poison = recipe.data.poison
    if poison is None or not poison.needs_surrogate:
        return
    if not group().lead(lambda: RunFolder(path).begun):
        prepare(without_poison(recipe), path)  # refuses what does not fit before hours go into a surrogate
    images = load_images(without_poison(recipe), path)
    with under(f"data.poison: {poison.registered_name}"):
        poison.apply(images.training, Crafting(recipe, path, progress=progress, stop=stop))
