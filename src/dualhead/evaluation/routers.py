"""Routers of an aggregator: what weighs them, under adaptive attacks, beside the controls that it must beat.

A sentinel that weighs routers is worth its name if it beats weights that ignore the image (`uniform`) and the single
best router (`best_fixed`, chosen on held-out images). The `oracle` knows which threat attacks and takes the router
that is best under it: a bound, and no defence.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from dualhead.errors import UserError
from dualhead.evaluation.asked import Asked, Spec
from dualhead.evaluation.harness import evaluate
from dualhead.evaluation.journal import finite, weights_fingerprint
from dualhead.evaluation.paired import compare
from dualhead.evaluation.progress import EvaluationProgress
from dualhead.evaluation.results import Evaluation, interval, share
from dualhead.evaluation.sequence import robust_under
from dualhead.evaluation.union import threat_labels
from dualhead.heads import DualHeadClassifier, SeesFeatures
from dualhead.system.files import write_json
from dualhead.system.processes import group
from dualhead.threats import Threat

FILE: Final = "routers.json"
DEPLOYED: Final = "deployed"
UNIFORM: Final = "uniform"
ADAPTIVE: Final = ("multihead-20", "steered-20")
"""Attacks on what merges heads, where none that knows of heads is asked for: through every head and router, and on what
weighs the routers."""


@dataclass(frozen=True)
class RouterSetting:
    """How routers are measured.

    Args:
        threats: what the adversary may do, one or several.
        attacks: on each classifier; with one that knows of heads if none is among them. An image counts as robust if it
            stands all of them.
        batch_size: images at once.
        seed: of all random numbers.
        options: further arguments of `evaluate`.
    """

    threats: Sequence[Threat]
    attacks: Sequence[Spec]
    batch_size: int = 256
    seed: int = 0
    options: Mapping[str, Any] | None = None


def evaluate_routers(
    classifier: DualHeadClassifier,
    images: Tensor,
    labels: Tensor,
    setting: RouterSetting,
    *,
    held_out: tuple[Tensor, Tensor],
    output_dir: str | Path,
    progress: Callable[[str], EvaluationProgress] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Measure what is deployed, routers weighed alike, and each router, attacked through that very classifier.

    Each has a folder of its own in `output_dir`, as `evaluate` leaves it, and what is there is not computed again. All
    of it is told in `routers.json`.

    Args:
        classifier: its aggregator has routers; left as it is.
        images: uint8 or floating in [0, 1], [N, C, H, W].
        labels: int64 [N].
        setting: what is measured, and how.
        held_out: images and labels that choose the best router; they are attacked by those attacks that do not need
            heads.
        output_dir: where results go.
        progress: gives, for the name of a classifier, who is told of its evaluation.
        stop: as in `evaluate`.

    Returns:
        The content of `routers.json`: `deployed`, `uniform` and `routers` (by name) with `clean_accuracy`, `threats`,
        `union` and `intervals`; `best_fixed`, the router of the highest union on held-out images; `oracle`, under each
        threat the router that is best under it there; and `gain`, the deployed union less that of `uniform` and of
        `best_fixed`, with McNemar's test.

    Raises:
        UserError: if the aggregator has no routers, or every attack needs heads.
        Interrupted: when stopped.
    """
    if not classifier.routers:
        raise UserError("routers: the aggregator of this model has none; after_dder has")
    folder, names = Path(output_dir), threat_labels(setting.threats)
    models: dict[str, nn.Module] = {DEPLOYED: classifier, UNIFORM: evenly(classifier)}
    models |= {router: classifier.view(router) for router in classifier.routers}

    within = list(setting.threats) if len(names) > 1 else setting.threats[0]

    def measured(model: nn.Module, name: str, of: tuple[Tensor, Tensor], attacks: Sequence[Spec]) -> Evaluation:
        return evaluate(
            model.eval(), *of, threat=within, attacks=attacks, batch_size=setting.batch_size,
            seed=setting.seed, output_dir=folder / name, progress=progress(name) if progress else None, stop=stop,
            **(setting.options or {}),
        )  # fmt: skip

    asked = Asked.of(setting.attacks)
    attacks = asked.for_model(classifier, ADAPTIVE).each
    plain = [attack for attack in asked.attacks.values() if not attack.needs_heads]
    if not plain:
        raise UserError("routers: the best one is chosen by an attack that needs no heads; add one, such as autoattack")
    chosen = {router: measured(models[router], f"held_out/{router}", held_out, plain) for router in classifier.routers}
    found = {name: measured(model, name, (images, labels), attacks) for name, model in models.items()}
    right = {name: _right(each, names) for name, each in found.items()}
    by_union = {router: share(_union(_right(each, names))) for router, each in chosen.items()}
    best = max(by_union, key=by_union.__getitem__)
    told = {
        "num_samples": len(labels),
        "held_out": len(held_out[1]),
        "weights": weights_fingerprint(classifier),
        "threats": [threat.describe() for threat in setting.threats],
        "attacks": list(found[DEPLOYED].results["attacks"]),
        DEPLOYED: _told(found[DEPLOYED], right[DEPLOYED]),
        UNIFORM: _told(found[UNIFORM], right[UNIFORM]),
        "routers": {router: _told(found[router], right[router]) for router in classifier.routers},
        "best_fixed": {"router": best, "held_out": by_union, **_told(found[best], right[best])},
        "oracle": _oracle(names, right, {router: _right(each, names) for router, each in chosen.items()}),
        "gain": {
            "over_uniform": _gain(found[UNIFORM], found[DEPLOYED]),
            "over_best_fixed": _gain(found[best], found[DEPLOYED]),
        },
    }
    told = json.loads(json.dumps(finite(told)))
    group().lead(lambda: write_json(folder / FILE, told))
    return dict(told)


def evenly(classifier: DualHeadClassifier) -> DualHeadClassifier:
    """Copy a classifier, and weigh its routers alike."""
    made = copy.deepcopy(classifier)
    assert isinstance(made.aggregator, SeesFeatures)
    made.aggregator = made.aggregator.evenly()
    return made


def _right(evaluation: Evaluation, names: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """Which images are right under all attacks within each threat, bool [N] in the order of their indices."""
    if len(names) == 1:
        return {names[0]: evaluation.correct["worst"][np.argsort(evaluation.index)]}
    return {name: robust_under(evaluation, name) for name in names}


def _union(right: Mapping[str, NDArray[np.bool_]]) -> NDArray[np.bool_]:
    return np.asarray(np.logical_and.reduce(list(right.values())))


def _accuracies(right: Mapping[str, NDArray[np.bool_]]) -> dict[str, Any]:
    union = _union(right)
    return {
        "threats": {name: share(column) for name, column in right.items()},
        "union": share(union),
        "intervals": {**{name: interval(column) for name, column in right.items()}, "union": interval(union)},
    }


def _told(evaluation: Evaluation, right: Mapping[str, NDArray[np.bool_]]) -> dict[str, Any]:
    made = {"clean_accuracy": evaluation.clean_accuracy, **_accuracies(right), "checks": evaluation.checks}
    made["intervals"]["clean_accuracy"] = list(evaluation.intervals["clean_accuracy"])
    return made


def _oracle(
    names: Sequence[str],
    right: Mapping[str, Mapping[str, NDArray[np.bool_]]],
    chosen: Mapping[str, Mapping[str, NDArray[np.bool_]]],
) -> dict[str, Any]:
    """Return what a router reaches that is chosen for each threat, on held-out images, by one who knows the threat."""
    best = {name: max(chosen, key=lambda router, of=name: share(chosen[router][of])) for name in names}  # type: ignore[misc]  # mypy takes the default for a parameter of the key
    return {"router": best, **_accuracies({name: right[router][name] for name, router in best.items()})}


def _gain(control: Evaluation, deployed: Evaluation) -> dict[str, Any]:
    found = compare(control, deployed)["worst"]
    return {
        "difference": found.difference,
        "interval": list(found.interval),
        "only_control": found.only_first,
        "only_deployed": found.only_second,
        "p_value": found.p_value,
        "verdict": found.verdict,
    }
