"""Make poisons that need a surrogate: train it in the run's folder, search with it, and keep what was found."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dualhead.attacks import Maximiser, attacks, maximise_within, predictions, slope
from dualhead.data import Aligning, Alternating, Search, Seen, Split, Surrogate
from dualhead.errors import Interrupted, RunError, UserError
from dualhead.evaluation import last_linear
from dualhead.names import AGGREGATE, MEAN
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
from dualhead.training import Silent, Stage, TrainingProgress

_log = logging.getLogger(__name__)

BATCH: Final = 256
CLIP: Final = 5.0
"""Norm of the gradient at which the training between two searches is cut, as published."""


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
            if isinstance(search, Alternating):
                fresh = self._prepared(search.surrogate)
                processes.lead(lambda: self._alternate(key, clean, index, labels, search, fresh))
            else:
                prepared, model = self._trained(search.surrogate)
                refuse_without_features(search, prepared, model)
                make = self._align if isinstance(search, Aligning) else self._search
                processes.lead(lambda: make(key, clean, index, labels, search, prepared, model))
        return super().find(clean, index, labels, search)

    def _prepared(self, setting: Surrogate) -> Prepared:
        """Return the run of a surrogate, in a folder of its own."""
        recipe = surrogate_recipe(self.recipe, setting)
        digest = hashlib.sha256(json.dumps(without_how(recipe.resolved()), sort_keys=True).encode()).hexdigest()[:12]
        return prepare(recipe, self.folder / f"surrogate-{digest}")

    def _trained(self, setting: Surrogate) -> tuple[Prepared, nn.Module]:
        """Train a surrogate, or load it where that is done."""
        prepared = self._prepared(setting)
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
        made = []
        with in_eval_mode(model), Watched(model) as watched:
            centres = watched.centres(clean, prepared.device) if search.needs_features else None
            for rows in torch.split(torch.arange(len(index)), BATCH):
                x = clean.images[index[rows]].to(prepared.device).float() / 255
                y = labels[rows].to(prepared.device)

                def climb(z: Tensor, y: Tensor = y) -> Tensor:
                    return search.climbed(watched.see(z, centres), y)

                streams = Streams.of(search.seed, index[rows].to(prepared.device)).fork("poison search")
                made.append(maximise_within(attack, climb, x, search.threat, streams).cpu())
        passes = search.steps * len(index)
        facts = {
            "surrogate": {**asdict(search.surrogate), **_cost(prepared)},
            "search": {
                "seconds": round(time.perf_counter() - begun, 1), "forward_passes": passes, "backward_passes": passes,
            },
        }  # fmt: skip
        self._keep(key, torch.cat(made), facts)

    @float32_products()
    def _align(
        self, key: str, clean: Split, index: Tensor, labels: Tensor, search: Search, prepared: Prepared,
        model: nn.Module,
    ) -> None:  # fmt: skip
        """Change images until their gradient is aligned, and keep what is found with what it cost."""
        assert isinstance(search, Aligning)
        begun, device = time.perf_counter(), prepared.device
        x, y = clean.images[index].to(device).float() / 255, labels.to(device)
        wanted = torch.tensor([search.wanted], device=device)
        with in_eval_mode(model):
            parameters = [parameter.requires_grad_() for parameter in model.parameters()]
            goal = gradient(model, parameters, self.aimed(search).to(device).float() / 255, wanted)
            streams = Streams.of(search.seed, index.to(device)).fork("gradient matching")
            ends = [
                aligned(model, parameters, goal, x, y, search, streams.fork(f"start {number}"))
                for number in range(search.restarts)
            ]
        best, value = min(ends, key=lambda end: end[1])
        passes = search.restarts * search.steps * len(index)
        facts = {
            "surrogate": {**asdict(search.surrogate), **_cost(prepared)},
            "search": {
                "seconds": round(time.perf_counter() - begun, 1), "forward_passes": passes,
                "backward_passes": 3 * passes, "misalignment": value,
            },
        }  # fmt: skip
        self._keep(key, best, facts)

    @float32_products()
    def _alternate(
        self, key: str, clean: Split, index: Tensor, labels: Tensor, search: Alternating, prepared: Prepared
    ) -> None:
        """Search and train in turns, and keep what is found. A search that is stopped begins anew."""
        begun, (stage,) = time.perf_counter(), prepared.recipe.stages
        made = Turns(prepared, clean, index, labels, search, stage)
        error = 1.0
        rounds = 0
        while rounds < search.rounds and error > search.error:
            if self.stop():
                raise Interrupted("stopped while noise was made; the same command begins it anew")
            made.train(rounds)
            made.search()
            error = made.error()
            rounds += 1
        if error > search.error:
            _log.warning(
                "data.poison: after %d rounds the surrogate still errs on %.1f %% of training images (wanted: %g %%)",
                rounds, 100 * error, 100 * search.error,
            )  # fmt: skip
        passes = rounds * search.steps * len(index)
        trained = rounds * search.batches * stage.batch_size
        facts = {
            "surrogate": {"seed": search.surrogate.seed, "rounds": rounds, "training_error": error},
            "search": {
                "seconds": round(time.perf_counter() - begun, 1), "forward_passes": passes + trained,
                "backward_passes": passes + trained,
            },
        }  # fmt: skip
        self._keep(key, made.images, facts)

    def _keep(self, key: str, images: Tensor, facts: Mapping[str, Any]) -> None:
        """Write what was found, and what it cost."""
        found = {"images": images.cpu().contiguous()}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._place(key), lambda aside: save_file(found, aside, {"facts": json.dumps(facts)}))


def gradient(
    model: nn.Module, parameters: Sequence[Tensor], x: Tensor, y: Tensor, *, graph: bool = False
) -> list[Tensor]:
    """Return the gradient of the mean cross-entropy of some images by the parameters.

    Args:
        model: images float32 [B, C, H, W] in [0, 1] to logits.
        parameters: of it.
        x: images.
        y: labels, int64 [B].
        graph: keep the graph, so that the gradient can be derived by the images.
    """
    loss = nn.functional.cross_entropy(model(x), y)
    found = torch.autograd.grad(loss, list(parameters), create_graph=graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def misalignment(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Return 1 - cos of the angle between two gradients, in [0, 2] (Geiping et al. 2021)."""
    inner = torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()
    lengths = [torch.stack([each.square().sum() for each in of]).sum().sqrt() for of in (first, second)]
    return 1 - inner / (lengths[0] * lengths[1]).clamp_min(1e-12)


def aligned(
    model: nn.Module, parameters: Sequence[Tensor], goal: Sequence[Tensor], x: Tensor, y: Tensor, search: Aligning,
    streams: Streams,
) -> tuple[Tensor, float]:  # fmt: skip
    """Return images, float32 [M, C, H, W], whose gradient is aligned with a goal, and how far it is from it.

    Args:
        model: in eval mode.
        parameters: of it.
        goal: the gradient to be met.
        x: the images as they were, in [0, 1].
        y: their labels.
        search: how.
        streams: randomness of the start.
    """
    assert search.step_size is not None
    threat = search.threat.for_images(x.shape[1:])
    now = threat.start(x, streams, "ball").clone().requires_grad_()
    adam = torch.optim.Adam([now], lr=search.step_size)
    falls = sorted({max(search.steps * eighths // 8, 1) for eighths in (3, 5, 7)})
    schedule = torch.optim.lr_scheduler.MultiStepLR(adam, falls, gamma=0.1)
    for _ in range(search.steps):
        value = misalignment(goal, gradient(model, parameters, now, y, graph=True))
        now.grad = torch.autograd.grad(value, now)[0].sign()
        adam.step()
        schedule.step()
        with torch.no_grad():
            now.copy_(threat.project(now, x))
    found = now.detach()
    return found, float(misalignment(goal, gradient(model, parameters, found, y)))


class Watched:
    """Shows, beside a model's logits, what its last linear layer is given. Use as a context.

    Args:
        model: images [B, C, H, W] to logits.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._given: Tensor | None = None

    def __enter__(self) -> Watched:
        linear = last_linear(self._model)
        self._hook = None if linear is None else linear.register_forward_pre_hook(self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _remember(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        self._given = given[0]

    def see(self, x: Tensor, centres: Tensor | None) -> Seen:
        """Return what the model makes of images, float32 [B, C, H, W] in [0, 1]; features where centres are given."""
        logits = self._model(x)
        given, self._given = self._given, None
        return Seen(logits) if centres is None or given is None else Seen(logits, given.flatten(1), centres)

    def centres(self, clean: Split, device: torch.device) -> Tensor:
        """Return the mean of the features of each class, [K, D]; of a class without images it is infinitely far."""
        found: list[Tensor] = []
        with torch.no_grad():
            for rows in torch.split(torch.arange(len(clean)), BATCH):
                self._model(clean.images[rows].to(device).float() / 255)
                assert self._given is not None
                found.append(self._given.flatten(1))
        seen, labels = torch.cat(found), clean.labels.to(device)
        return torch.stack(
            [
                seen[labels == label].mean(0) if bool((labels == label).any()) else torch.full_like(seen[0], torch.inf)
                for label in range(clean.num_classes)
            ]
        )


class Turns:
    """A network that learns from changed images, and changes that follow it.

    Args:
        prepared: the network, untrained.
        clean: all images.
        index: positions of those that are changed, int64 [M].
        labels: that the search uses, int64 [M].
        search: how.
        stage: says the optimiser, whose rate stays as it is, and how many images a batch has.
    """

    def __init__(
        self, prepared: Prepared, clean: Split, index: Tensor, labels: Tensor, search: Alternating, stage: Stage
    ) -> None:
        self._model, self._search, device = prepared.model, search, prepared.device
        self._optimiser = stage.optimiser.create([p for p in self._model.parameters() if p.requires_grad])
        self._pixels, self._labels = clean.images[:], clean.labels
        self._index, self._wanted, self._device, self._size = index, labels, device, stage.batch_size
        self._place = torch.full((len(clean),), -1, dtype=torch.int64)
        self._place[index] = torch.arange(len(index))
        self._threat = search.threat.for_images(clean.image_shape)
        self.images = self._pixels[index].float() / 255
        self._order = torch.zeros(0, dtype=torch.int64)
        self._epoch = 0

    def _shown(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return images as they are now, and their labels."""
        x, places = self._pixels[rows].float() / 255, self._place[rows]
        x[places >= 0] = self.images[places[places >= 0]]
        return x.to(self._device), self._labels[rows].to(self._device)

    def _next_rows(self) -> Tensor:
        if not len(self._order):
            every = torch.arange(len(self._labels))
            lot = Streams.of(self._search.seed, every).fork(f"order {self._epoch}").bits(1)[:, 0]
            self._order, self._epoch = lot.argsort(stable=True), self._epoch + 1
        rows, self._order = self._order[: self._size], self._order[self._size :]
        return rows

    def train(self, number: int) -> None:
        """Train on some batches; `number` of the round is for messages.

        Raises:
            RunError: if the loss is not finite.
        """
        self._model.train()
        for _ in range(self._search.batches):
            x, y = self._shown(self._next_rows())
            self._optimiser.zero_grad()
            loss = nn.functional.cross_entropy(self._model(x), y)
            if not bool(loss.isfinite()):
                raise RunError(f"data.poison: the surrogate's loss is not finite in round {number}; lower the rate")
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(self._model.parameters(), CLIP)
            self._optimiser.step()
        self._optimiser.zero_grad()

    def search(self) -> None:
        """Go on with the change of every image, by the network as it is now."""
        search, threat = self._search, self._threat
        length = 2.5 * search.threat.eps / search.steps if search.step_size is None else search.step_size
        with in_eval_mode(self._model):
            for places in torch.split(torch.arange(len(self._index)), BATCH):
                x = (self._pixels[self._index[places]].float() / 255).to(self._device)
                y, now = self._wanted[places].to(self._device), self.images[places].to(self._device)

                def climb(z: Tensor, y: Tensor = y) -> Tensor:
                    return search.climbed(Seen(self._model(z)), y)

                for _ in range(search.steps):
                    now = threat.project(threat.ascend(now, slope(climb, now), length), x)
                self.images[places] = now.cpu()

    def error(self) -> float:
        """Return the share of the training images that the network gets wrong as they are now."""
        wrong = 0
        with torch.no_grad(), in_eval_mode(self._model):
            for rows in torch.split(torch.arange(len(self._labels)), BATCH):
                x, y = self._shown(rows)
                wrong += int((predictions(self._model(x).float()) != y).sum())
        return wrong / len(self._labels)


def refuse_without_features(search: Search, prepared: Prepared, model: nn.Module) -> None:
    """Refuse a search for features on a surrogate that has none of its own.

    Raises:
        UserError: if its output merges heads, or it has no linear layer.
    """
    if not search.needs_features:
        return
    if prepared.output in (MEAN, AGGREGATE):
        raise UserError(
            f"surrogate.objective: its output is the {prepared.output} of several heads, which has no features of its "
            "own; name an objective, as sat"
        )
    if last_linear(model) is None:
        raise UserError("needs the features that a last linear layer is given, and the surrogate has no linear layer")


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
