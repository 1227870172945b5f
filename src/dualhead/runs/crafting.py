"""Make poisons that need a surrogate: train it in the run's folder, lend it to the search, and keep what was found."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dualhead.attacks import Maximiser, attacks, maximise_within
from dualhead.data import Found, Search, Split, Surrogate, Workbench
from dualhead.errors import UserError, under
from dualhead.evaluation import last_linear
from dualhead.names import AGGREGATE, MEAN
from dualhead.noise import Streams
from dualhead.recipe import Recipe
from dualhead.runs.crafted import Crafted, surrogate_recipe, without_poison
from dualhead.runs.folder import RunFolder, taken, without_how
from dualhead.runs.images import load_images
from dualhead.runs.prepare import Prepared, prepare
from dualhead.runs.stages import train_stages
from dualhead.saving import view
from dualhead.system.devices import float32_products
from dualhead.system.files import write_atomically
from dualhead.system.modes import in_eval_mode
from dualhead.system.processes import group
from dualhead.threats import Threat
from dualhead.training import Silent, TrainingProgress


class Bench(Workbench):
    """The run of a surrogate, as a search uses it.

    Args:
        prepared: the surrogate's run.
        model: the surrogate, with all its outputs.
        aimed: the test images that the search asked for, uint8 [A, C, H, W].
        stop: tells whether the victim's run was asked to stop.
    """

    def __init__(self, prepared: Prepared, model: nn.Module, aimed: Tensor, stop: Callable[[], bool]) -> None:
        self.prepared = prepared
        self.device = prepared.device
        self.model = view(model, prepared.output)
        self.batch_size = prepared.recipe.stages[0].batch_size
        self.aimed = aimed
        self._stop = stop

    def features(self, x: Tensor) -> Tensor:
        """See `Workbench.features`."""
        output, linear = self.prepared.output, last_linear(self.model)
        if output in (MEAN, AGGREGATE):
            raise UserError(
                f"surrogate.objective: its output is the {output} of several heads, which has no features of its own; "
                "name an objective, as sat"
            )
        if linear is None:
            raise UserError(
                "needs the features that a last linear layer is given, and the surrogate has no linear layer"
            )
        given: list[Tensor] = []
        hook = linear.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
        try:
            self.model(x)
        finally:
            hook.remove()
        return given[-1].flatten(1)

    def optimiser(self) -> torch.optim.Optimizer:
        """See `Workbench.optimiser`."""
        learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return self.prepared.recipe.stages[0].optimiser.create(learning)

    def attacked(
        self, attack: Mapping[str, Any], climb: Callable[[Tensor], Tensor], x: Tensor, threat: Threat, streams: Streams
    ) -> Tensor:
        """See `Workbench.attacked`."""
        built = attacks.build(attack)
        if not isinstance(built, Maximiser):
            raise UserError(f"attack {attack['name']!r} climbs only losses of its own; use pgd or fgsm")
        return maximise_within(built, climb, x, threat, streams)

    def stopped(self) -> bool:
        """See `Workbench.stopped`."""
        return self._stop()


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

    def find(self, clean: Split, index: Tensor, labels: Tensor, search: Search) -> tuple[Tensor, Mapping[str, Any]]:
        """See `Craft.find`."""
        key, processes = self.key(clean, index, labels, search), group()
        if not processes.lead(self._place(key).is_file):
            bench = self._bench(search)
            processes.lead(lambda: self._make(key, clean, index, labels, search, bench))
        return super().find(clean, index, labels, search)

    def _bench(self, search: Search) -> Bench:
        """Return a surrogate that is trained, or loaded where that is done, or as it is initialised."""
        prepared = self._prepared(search.surrogate)
        model = prepared.model
        if search.trained:
            with taken(prepared.folder):
                model = train_stages(prepared, self.progress, self.stop)
        return Bench(prepared, model, search.aimed(self.test), self.stop)

    def _prepared(self, setting: Surrogate) -> Prepared:
        """Return the run of a surrogate, in a folder of its own."""
        recipe = surrogate_recipe(self.recipe, setting)
        digest = hashlib.sha256(json.dumps(without_how(recipe.resolved()), sort_keys=True).encode()).hexdigest()[:12]
        return prepare(recipe, self.folder / f"surrogate-{digest}")

    @float32_products()
    def _make(self, key: str, clean: Split, index: Tensor, labels: Tensor, search: Search, bench: Bench) -> None:
        """Search, and keep what is found with what it cost."""
        begun, setting = time.perf_counter(), search.surrogate
        with in_eval_mode(bench.model):
            found = search.find(clean, index, labels, bench)
        _refuse_unfit(found, (len(index), *clean.image_shape), search)
        learnt = {**asdict(setting), **_cost(bench.prepared)} if search.trained else {"seed": setting.seed}
        facts = {
            "surrogate": {**learnt, **found.surrogate},
            "search": {
                "seconds": round(time.perf_counter() - begun, 1), "forward_passes": found.forward_passes,
                "backward_passes": found.backward_passes, **found.search,
            },
        }  # fmt: skip
        kept = {"images": found.images.cpu().contiguous()}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._place(key), lambda aside: save_file(kept, aside, {"facts": json.dumps(facts)}))


def _refuse_unfit(found: Found, shape: tuple[int, ...], search: Search) -> None:
    """Refuse what is not an image of values in [0, 1] for each that is changed.

    Raises:
        UserError: saying what the search gave.
    """
    images, begin = found.images, f"{type(search).__name__}.find"
    if images.shape != shape or images.dtype != torch.float32:
        raise UserError(
            f"{begin} gave {images.dtype} images of shape {list(images.shape)}; they must be float32 of {list(shape)}"
        )
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise UserError(f"{begin} gave images with values outside of [0, 1]")


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
        poison.apply(images.training, Crafting(recipe, path, images.test, progress=progress, stop=stop))
