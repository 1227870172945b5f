"""Measures of a model that learnt from poisoned data: does a trigger work, and was the poison learnt by heart?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualhead.evaluation.generation import auroc
from dualhead.evaluation.harness import evaluate
from dualhead.evaluation.model import answers
from dualhead.evaluation.ood import auroc_interval
from dualhead.evaluation.results import Evaluation, interval, share
from dualhead.statistics import mcnemar

TRIGGERED: Final = "triggered"
"""Folder, beside an evaluation, of that of triggered images."""


@dataclass(frozen=True, eq=False)
class TriggeredImages:
    """Test images of all classes but one, with a trigger that is to make a model take them for that one.

    Args:
        images: uint8 [N, C, H, W].
        labels: their true labels, int64 [N], none of them the target.
        index: names of the samples, int64 [N], as without the trigger.
        target: the class that they are to be taken for.
        class_names: in the order of the labels.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    target: int
    class_names: tuple[str, ...]


def measure_triggered(
    model: nn.Module,
    triggered: TriggeredImages,
    *,
    output_dir: Path | None = None,
    clean_rate: NDArray[np.bool_] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure whether a trigger works, and how robust a model is on triggered images.

    Args:
        model: as `evaluate` takes it.
        triggered: the images.
        output_dir: where the evaluation of triggered images goes, as `evaluate` leaves one.
        clean_rate: of a model that learnt from clean data, which of these images it takes for the target, bool [N].
        options: threat, attacks and the like, for `evaluate`.

    Returns:
        What `results.json` says under `poison`: `attack_success_rate` (the share of images of other classes that are
        taken for the target), `accuracy_on_triggered`, `robust_accuracy_on_triggered` by attack, both by true label,
        their `intervals`, the same `per_class`; with `clean_rate` also `clean_model` and the paired difference
        `above_clean_model`.
    """
    evaluation = evaluate(
        model, triggered.images, triggered.labels, index=triggered.index, diagnostics=False, output_dir=output_dir,
        class_names=list(triggered.class_names), **options,
    )  # fmt: skip
    success = successes(evaluation, triggered.target)
    results = evaluation.results
    told: dict[str, Any] = {
        "target": triggered.target,
        "class": triggered.class_names[triggered.target],
        "num_triggered": len(success),
        "attack_success_rate": share(success),
        "accuracy_on_triggered": results["clean_accuracy"],
        "robust_accuracy_on_triggered": results["robust_accuracy"],
        "intervals": {
            "attack_success_rate": interval(success),
            "accuracy_on_triggered": results["intervals"]["clean_accuracy"],
            **{name: results["intervals"][name] for name in results["robust_accuracy"]},
        },
        "per_class": [_of_class(entry, success[evaluation.labels == entry["label"]]) for entry in results["per_class"]],
    }
    if clean_rate is not None:
        paired = mcnemar(clean_rate, success)
        told["clean_model"] = {"attack_success_rate": share(clean_rate), "interval": interval(clean_rate)}
        told["above_clean_model"] = {"difference": paired.difference, "interval": list(paired.interval)}
    return told


def successes(evaluation: Evaluation, target: int) -> NDArray[np.bool_]:
    """Return which of the triggered images of an evaluation are taken for the target, bool [N]."""
    return np.asarray(evaluation.clean_prediction == target)


def _of_class(entry: Mapping[str, Any], success: NDArray[np.bool_]) -> dict[str, Any]:
    return {
        "label": entry["label"],
        "class": entry["class"],
        "num_samples": entry["num_samples"],
        "attack_success_rate": share(success),
        "accuracy_on_triggered": entry["clean_accuracy"],
        "robust_accuracy_on_triggered": entry["robust_accuracy"],
        "intervals": {"attack_success_rate": interval(success), **entry["intervals"]},
    }


def learnt_by_heart(
    model: nn.Module, images: Tensor, given: Tensor, true: Tensor, batch_size: int = 256
) -> dict[str, Any]:
    """Measure accuracy on poisoned training images, without augmentation, by both of their labels.

    Args:
        model: as `answers` takes it.
        images: uint8 [N, C, H, W], N at least 1.
        given: the labels that were trained on, int64 [N].
        true: the labels before the poison.
        batch_size: images at once.
    """
    said = answers(model, images, batch_size)
    by = {"by_given_label": said == given.numpy(), "by_true_label": said == true.numpy()}
    return {
        "num_samples": len(said),
        **{name: share(right) for name, right in by.items()},
        "intervals": {name: interval(right) for name, right in by.items()},
    }


def last_linear(model: nn.Module) -> nn.Linear | None:
    """Return the last linear layer of a model, which is given its features; None where there is none."""
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return linear[-1] if linear else None


def features(model: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor | None:
    """Return what a model's last linear layer is given, float32 [N, D] on the CPU; None for a model without one.

    Args:
        model: as `answers` takes it.
        images: uint8 [N, C, H, W].
        batch_size: images at once.
    """
    linear = last_linear(model)
    if linear is None:
        return None
    seen: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().float().cpu()))
    try:
        answers(model, images, batch_size)
    finally:
        hook.remove()
    return torch.cat([given.flatten(1) for given in seen])


def spectral_signatures(found: Tensor, labels: Tensor) -> Tensor:
    """Score images by how far they lie along the direction in which the features of their class vary most.

    Poisoned images of a class often lie apart from its others (Tran et al. 2018, Spectral signatures in backdoor
    attacks, arXiv 1811.00636).

    Args:
        found: features, [N, D].
        labels: that were trained on, int64 [N].

    Returns:
        Float64 [N], at least 0, each divided by the mean of its class; the higher, the more suspicious.
    """
    scores = torch.zeros(len(found), dtype=torch.float64)
    for label in torch.unique(labels):
        rows = labels == label
        centred = found[rows].double()
        centred = centred - centred.mean(0)
        direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
        along = (centred @ direction).square()
        scores[rows] = along / along.mean().clamp_min(1e-12)
    return scores


COMPONENTS: Final = 10
"""Directions of the features that clusters are sought in."""


def activation_clusters(found: Tensor, labels: Tensor, rounds: int = 100) -> Tensor:
    """Score images by how small the cluster is that their features lie in, of two in each class.

    Where some images of a class are there for another reason than the rest, they tend to form a cluster of their own,
    and it is the smaller one (Chen et al. 2018, Detecting backdoor attacks on deep neural networks by activation
    clustering, arXiv 1811.03728). The features are reduced to ten directions by principal components, where the paper
    has independent ones; 2-means begins at the two sides of the first.

    Args:
        found: features, [N, D].
        labels: that were trained on, int64 [N].
        rounds: of 2-means, at most.

    Returns:
        Float64 [N]: the share of its class that lies in the other cluster, in [0, 1); the higher, the more suspicious.
        0 for a class whose features do not differ.
    """
    scores = torch.zeros(len(found), dtype=torch.float64)
    for label in torch.unique(labels):
        rows = labels == label
        centred = found[rows].double()
        centred = centred - centred.mean(0)
        reduced = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:COMPONENTS].T
        side = reduced[:, 0] > 0
        for _ in range(rounds):
            if bool(side.all()) or not bool(side.any()):
                break
            near, far = (torch.norm(reduced - reduced[of].mean(0), dim=1) for of in (side, ~side))
            moved = near < far
            if torch.equal(moved, side):
                break
            side = moved
        share = side.double().mean()
        scores[rows] = torch.where(side, 1 - share, share) if 0 < float(share) < 1 else 0.0
    return scores


FINDERS: Final[Mapping[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "spectral_signatures": spectral_signatures,
    "activation_clustering": activation_clusters,
}
"""Scores of suspicion by features [N, D] and labels [N], by the names that results have for them."""


def finders(
    model: nn.Module, images: Tensor, labels: Tensor, poisoned: Tensor, batch_size: int = 256
) -> dict[str, dict[str, Any]]:
    """Tell how well each finder tells the poisoned among the training images.

    Args:
        model: as `answers` takes it.
        images: trained on, uint8 [N, C, H, W].
        labels: that were trained on, int64 [N].
        poisoned: which are, bool [N].
        batch_size: images at once.

    Returns:
        By finder `auroc`, how often a poisoned image is more suspicious than one that is not, and its 95 % interval;
        empty where all images are poisoned, or none, the model has no linear layer, or its features are no finite
        numbers.
    """
    if bool(poisoned.all()) or not bool(poisoned.any()):
        return {}
    seen = features(model, images, batch_size)
    if seen is None or not bool(seen.isfinite().all()):
        return {}
    told = {}
    for name, find in FINDERS.items():
        scores = find(seen, labels)
        apart = scores[~poisoned], scores[poisoned]
        told[name] = {"auroc": auroc(*apart), "interval": auroc_interval(*apart)}
    return told


def confused(
    said: NDArray[np.int64], labels: NDArray[np.int64], pairs: Sequence[tuple[int, int]], class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Tell, of test images of the first class of each pair, which are right and which are taken for the second.

    Args:
        said: predictions, int64 [N].
        labels: int64 [N].
        pairs: of classes.
        class_names: in the order of the labels.
    """
    found = []
    for first, second in pairs:
        of_class = said[labels == first]
        if len(of_class):
            entry: dict[str, Any] = {
                "from": class_names[first], "to": class_names[second], "num_samples": len(of_class),
                "recall": share(of_class == first), "taken_for_second": share(of_class == second),
                "intervals": {"recall": interval(of_class == first), "taken_for_second": interval(of_class == second)},
            }  # fmt: skip
            found.append(entry)
    return found
