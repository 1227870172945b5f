"""Routes of tied heads, each judged as the classifier that it is, merged ones attacked as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from dualhead.attacks import Maximiser, maximise_within
from dualhead.attacks import attacks as registry
from dualhead.attacks.losses import cross_entropy
from dualhead.errors import UserError
from dualhead.evaluation.asked import Asked, Spec
from dualhead.evaluation.harness import evaluate
from dualhead.evaluation.journal import data_fingerprint, finite, weights_fingerprint
from dualhead.evaluation.model import device_of, frozen
from dualhead.evaluation.progress import EvaluationProgress
from dualhead.evaluation.results import Evaluation, interval, share
from dualhead.heads import (
    DualHeadClassifier,
    Gap,
    MergedRoutes,
    aggregators,
    between,
    image_gaps,
    routes_of,
    stored_gaps,
    through,
)
from dualhead.noise import Streams
from dualhead.report import ROUTES_WARNING
from dualhead.system.files import write_json
from dualhead.system.processes import group
from dualhead.threats import Threat

Kind = Literal["own", "crossed", "merged", "curve", "transfer", "gaps"]
"""Names of the questions about routes."""
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
FILE: Final = "routes.json"
SAME: Final = ("clean", "robust", "threat", "num_samples", "weights", "data", "seed")
"""Keys of the settings that must be equal for results of an earlier call to stand beside those of this one."""
T: Final = (0.25, 0.5, 0.75)
"""Points between two heads at which the curve is measured, beside its ends."""
TRANSFER: Final = "pgd-20"
ADAPTIVE: Final = ("multihead-20",)
"""Attacks on merged routes where none that knows of heads is asked for."""
ESTIMATE: Final = 1024
"""Training images of which statistics between two heads are estimated, at most."""


@dataclass(frozen=True)
class RouteSetting:
    """How routes are measured.

    Args:
        threat: what the adversary may do.
        attacks: on each route, and measurements; attacks that need several heads are for merged routes alone.
        clean: the head that was trained on clean images.
        robust: the head that was trained on attacked ones.
        kinds: what is asked.
        batch_size: images at once.
        seed: of all random numbers.
        options: further arguments of `evaluate`.
    """

    threat: Threat
    attacks: Sequence[Spec]
    clean: str
    robust: str
    kinds: Sequence[Kind] = KINDS
    batch_size: int = 256
    seed: int = 0
    options: Mapping[str, Any] | None = None


def parse_kinds(text: str) -> tuple[Kind, ...]:
    """Read a list with commas, or `all`.

    Raises:
        UserError: for an unknown word.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in words if word != "all" and word not in KINDS]
    if unknown or not words:
        raise UserError(f"--routes {text}: write all, or some of {', '.join(KINDS)} with commas")
    return KINDS if "all" in words else tuple(kind for kind in KINDS if kind in words)


def evaluate_routes(
    classifier: DualHeadClassifier,
    images: Tensor,
    labels: Tensor,
    setting: RouteSetting,
    *,
    output_dir: str | Path,
    estimate_on: Callable[[], Tensor] | None = None,
    progress: Callable[[str], EvaluationProgress] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Measure every route of tied heads, clean and under attacks through that very route, and what merges them.

    Each classifier has a folder of its own in `output_dir`, as `evaluate` leaves it, and what is there is not computed
    again. All of it is told in `routes.json`.

    Args:
        classifier: with tied heads; left as it is.
        images: uint8 or floating in [0, 1], [N, C, H, W].
        labels: int64 [N].
        setting: what is measured, and how.
        output_dir: where results go.
        estimate_on: gives training images [M, C, H, W], of which statistics between two heads are estimated; needed for
            the curve where heads have batch norm.
        progress: gives, for the name of a classifier, who is told of its evaluation.
        stop: as in `evaluate`.

    Returns:
        The content of `routes.json`: `routes` (id to statistics, affine and accuracies), `merged`, `curve`, `transfer`
        (accuracy of each route on images made against each route), `gaps`, and `warning`.

    Raises:
        UserError: if heads are not tied, or there is no such head.
        Interrupted: when stopped.
    """
    for head in (setting.clean, setting.robust):
        if head not in classifier.heads:
            raise UserError(f"routes: {head!r} is no head of this model; it has {', '.join(classifier.heads)}")
    if setting.clean == setting.robust:
        raise UserError("routes: clean and robust must be two heads")
    folder, kinds, by = Path(output_dir), setting.kinds, Asked.of(setting.attacks)
    found: dict[str, Any] = {
        "clean": setting.clean, "robust": setting.robust, "threat": setting.threat.describe(),
        "num_samples": len(labels), "weights": weights_fingerprint(classifier), "seed": setting.seed,
        "data": data_fingerprint(images, labels, torch.arange(len(labels))), "warning": ROUTES_WARNING,
    }  # fmt: skip

    def measured(name: str, model: nn.Module) -> dict[str, Any]:
        specs = by.for_model(model, ADAPTIVE).each
        evaluation = evaluate(
            model.eval(), images, labels, threat=setting.threat, attacks=specs, batch_size=setting.batch_size,
            seed=setting.seed, output_dir=folder / name, progress=progress(name) if progress else None, stop=stop,
            **(setting.options or {}),
        )  # fmt: skip
        return _told(evaluation)

    every = routes_of(classifier)
    asked = [route for route in every if ("own" if route.statistics == route.affine else "crossed") in kinds]
    if asked:
        found["routes"] = {
            route.name: {
                "statistics": route.statistics, "affine": route.affine,
                **measured(route.name, through(classifier, route)),
            }
            for route in asked
        }  # fmt: skip
    if "merged" in kinds:
        found["merged"] = {name: measured(name, model) for name, model in _merged(classifier, setting)}
    if "curve" in kinds:
        batches = _batches(classifier, setting, estimate_on)
        found["curve"] = [
            {"t": t, **measured(f"t={t:g}", between(classifier, setting.clean, setting.robust, t, batches))} for t in T
        ]
    if {"transfer", "gaps"} & set(kinds):
        models = {route.name: through(classifier, route) for route in every}
        made = {name: _attacked(model, images, labels, setting) for name, model in models.items()}
        if "transfer" in kinds:
            models["mean"] = classifier.view("mean").eval()
            found["transfer"] = {"attack": TRANSFER, "accuracy": _transfer(models, made, labels, setting)}
        if "gaps" in kinds:
            found["gaps"] = _gaps(classifier, models, images, made, setting)
    if group().first:
        found = _beside_earlier(folder / FILE, found)
        write_json(folder / FILE, found)
    return found


def _beside_earlier(file: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """Merge results with those of an earlier call on the same weights and images under the same threat."""
    now: dict[str, Any] = json.loads(json.dumps(finite(dict(found))))
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if any(before.get(key) != now[key] for key in SAME):
        return now
    routes = {**before.get("routes", {}), **now.get("routes", {})}
    return {**before, **now, **({"routes": routes} if routes else {})}


def _told(evaluation: Evaluation) -> dict[str, Any]:
    results = evaluation.results
    return {
        **{key: results[key] for key in ("clean_accuracy", "robust_accuracy", "intervals", *evaluation.measured)},
        "checks": evaluation.checks,
    }


def _merged(classifier: DualHeadClassifier, setting: RouteSetting) -> Iterator[tuple[str, nn.Module]]:
    yield "mean", classifier.view("mean")
    if len(classifier.heads) == 2 and classifier.num_classes > 2:
        mixed = aggregators.build("mixed_nuts").create(classifier.num_classes, 2).to(device_of(classifier))
        yield "mixed_nuts", MergedRoutes(classifier, (setting.robust, setting.clean), mixed)
    if not classifier.is_mean:
        yield "aggregate", classifier


def _batches(
    classifier: DualHeadClassifier, setting: RouteSetting, estimate_on: Callable[[], Tensor] | None
) -> list[Tensor]:
    """Batches of training images, if any head has running statistics."""
    if not any(name.rpartition(".")[2] == "running_mean" for name, _ in classifier.head1.named_buffers()):
        return []
    if estimate_on is None:
        raise UserError(
            "routes: the curve between two heads estimates statistics of batch norm on training images, and none are "
            "known for this model; name a run, or leave curve out"
        )
    return [_as_given(x, classifier) for x in torch.split(estimate_on()[:ESTIMATE], setting.batch_size) if len(x) > 1]


def _as_given(x: Tensor, model: nn.Module) -> Tensor:
    x = x.to(device_of(model))
    return x if x.is_floating_point() else x.float() / 255


def _in_batches(images: Tensor, model: nn.Module, setting: RouteSetting) -> Iterator[Tensor]:
    return (_as_given(x, model) for x in torch.split(images, setting.batch_size))


def _attacked(model: nn.Module, images: Tensor, labels: Tensor, setting: RouteSetting) -> Tensor:
    """All images, attacked through a classifier by `TRANSFER`, whether it is fooled or not: [N, C, H, W]."""
    attack = registry.build(TRANSFER)
    assert isinstance(attack, Maximiser)
    made = []
    with frozen(model):
        for rows in torch.split(torch.arange(len(labels)), setting.batch_size):
            x, y = _as_given(images[rows], model), labels[rows].to(device_of(model))
            streams = Streams.of(setting.seed, rows.to(x.device)).fork("transfer")
            climb = _climb(model, y)
            made.append(maximise_within(attack, climb, x, setting.threat, streams).cpu())
    return torch.cat(made)


def _climb(model: nn.Module, y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: cross_entropy(model(x), y)


def _transfer(
    models: Mapping[str, nn.Module], made: Mapping[str, Tensor], labels: Tensor, setting: RouteSetting
) -> dict[str, dict[str, Any]]:
    """Accuracy of each judge on images made against each route: `[made against][judged by]`."""
    table: dict[str, dict[str, Any]] = {}
    for against, attacked in made.items():
        for judge, model in models.items():
            with torch.no_grad(), frozen(model):
                said = torch.cat([model(x).argmax(1).cpu() for x in _in_batches(attacked, model, setting)])
            right = np.asarray(said == labels.cpu())
            table.setdefault(against, {})[judge] = {"accuracy": share(right), "interval": interval(right)}
    return table


def _gaps(
    classifier: DualHeadClassifier,
    models: Mapping[str, nn.Module],
    images: Tensor,
    made: Mapping[str, Tensor],
    setting: RouteSetting,
) -> dict[str, Any]:
    """Distances of stored tensors, and of clean from attacked images under the tensors of one head."""
    stored = stored_gaps(classifier, setting.clean, setting.robust)
    seen: dict[str, dict[str, Gap]] = {}
    for head in (setting.clean, setting.robust):
        of = image_gaps(models[head], *(_in_batches(each, models[head], setting) for each in (images, made[head])))
        seen[head] = {path.removeprefix("head."): gap for path, gap in of.items()}  # as stored ones are called
    return {
        "stored": {"summary": _summary(stored), "layers": stored},
        "images": {head: {"summary": _summary(gap), "layers": gap} for head, gap in seen.items()},
    }


def _summary(layers: Mapping[str, Gap]) -> dict[str, dict[str, float]]:
    """Median over the channels of each layer, by kind and layer."""
    found: dict[str, dict[str, float]] = {}
    for path, gap in layers.items():
        for kind, values in gap.items():
            found.setdefault(kind, {})[path] = float(np.median(values))
    return found
