"""Images out of a classifier, and its energy: samples, counterfactuals, and scores of what is out of distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

import torch
from torch import Tensor, nn

from dualhead.attacks import slope
from dualhead.data import Batch, Split, StreamSetting, streams
from dualhead.errors import UserError
from dualhead.evaluation.model import read_logits
from dualhead.system.modes import in_eval_mode
from dualhead.threats import ThreatModel

Score = Literal["lse", "msp", "max_logit"]
SCORES: Final[tuple[Score, ...]] = ("lse", "msp", "max_logit")
MOST_VALUES: Final = 3_072
"""Most values of an image whose covariance seeds are given: those of 32x32 pixels in colour."""
BATCH: Final = 64
"""Images in a pass. It never changes: the last pass is filled up, so that rounding is that of a full one."""


@dataclass(frozen=True)
class Counterfactual:
    """Images moved towards other classes.

    Args:
        image: float32 [B, C, H, W] in [0, 1].
        path: the iterates, float32 [steps + 1, B, C, H, W]; the first are the originals.
        distance: L2 distance to the original [B], in units of pixels in [0, 1].
        probabilities: softmax of the model on `image`, float32 [B, K].
    """

    image: Tensor
    path: Tensor
    distance: Tensor
    probabilities: Tensor


def energy(model: nn.Module, x: Tensor, y: Tensor | None = None) -> Tensor:
    """Compute the energy of images under a classifier (Grathwohl et al. 2020, arXiv 1912.03263, eqs. 3 to 5).

    It is no likelihood: what a classifier was not trained to say of its logits' common level, it does not know.

    Args:
        model: images to logits [B, K].
        x: images, float32 [B, C, H, W] in [0, 1].
        y: labels int64 [B] for the joint energy -f(x)[y]; None for the marginal one, -log sum_y exp f(x)[y].

    Returns:
        float32 [B].

    Raises:
        UserError: for images that are no floating numbers.
    """
    logits = _answers(model, x)
    return -logits.logsumexp(1) if y is None else -logits.gather(1, y[:, None])[:, 0]


def ood_score(model: nn.Module, x: Tensor, kind: Score = "lse") -> Tensor:
    """Score how far images are from what a classifier was trained on: higher is further out.

    Args:
        model: images to logits [B, K].
        x: images, float32 [B, C, H, W] in [0, 1].
        kind: `lse`, the marginal energy (Liu et al. 2020, arXiv 2010.03759); `msp`, minus the largest softmax
            probability (Hendrycks and Gimpel 2017, arXiv 1610.02136); `max_logit`, minus the largest logit.

    Returns:
        float32 [B].

    Raises:
        UserError: for another kind, or images that are no floating numbers.
    """
    if kind not in SCORES:
        raise UserError(f"kind must be one of {', '.join(SCORES)}, got {kind!r}")
    logits = _answers(model, x)
    if kind == "lse":
        return -logits.logsumexp(1)
    return -(logits.softmax(1) if kind == "msp" else logits).amax(1)


def noise_seeds(training: Split, samples: Tensor, kind: str = "gaussian", *, seed: int = 0) -> Tensor:
    """Draw where samples start, as a stream of the data draws it for training.

    Args:
        training: images whose shape the seeds have, and to which `gaussian` is fitted: with a full covariance where
            its matrix is of a moderate size, else by channel.
        samples: numbers of the samples, int64 [B]; the same number gives the same seed, whatever the batch.
        kind: `gaussian` or `uniform`.
        seed: of the noise.

    Returns:
        float32 [B, C, H, W] in [0, 1].

    Raises:
        UserError: for another kind.
    """
    if kind not in ("gaussian", "uniform"):
        raise UserError(f"seeds must be gaussian or uniform, got {kind!r}")
    setting = StreamSetting(training, steps=1, batch_size=1, seed=seed, device=samples.device)
    spec = {"name": "gaussian", "covariance": _covariance(training)} if kind == "gaussian" else kind
    draw = next(streams.build(spec).open(setting).epoch(0, 0))
    return draw(Batch(samples, torch.empty(len(samples), *training.image_shape), torch.zeros_like(samples))).x


def sample(
    model: nn.Module,
    labels: Tensor,
    seeds: Tensor,
    *,
    steps: int = 16,
    step_size: float = 0.2,
    trajectory: bool = False,
) -> Tensor:
    """Let seeds climb the logit of a class by normalised steps within [0, 1] (arXiv 2510.13872, section on sampling).

    Works for any classifier; one without robustness gives noise. It takes one forward and one backward pass per step.
    What differs between samples comes from the seeds alone.

    Args:
        model: images to logits [B, K]; asked in eval mode.
        labels: classes to climb, int64 [B].
        seeds: where samples start, float32 [B, C, H, W] in [0, 1]; see `noise_seeds`.
        steps: at least 0; with 0 the samples are the seeds.
        step_size: L2 length of a step, greater than 0.
        trajectory: return all iterates.

    Returns:
        float32 [B, C, H, W]; with `trajectory` [steps + 1, B, C, H, W], the seeds first.

    Raises:
        UserError: for steps, a step size or numbers of labels that do not fit.
    """
    path = _ascend(model, labels, seeds, _everywhere(seeds), range(steps + 1) if trajectory else [steps], step_size)
    return path if trajectory else path[0]


def sample_at(
    model: nn.Module, labels: Tensor, seeds: Tensor, steps: Sequence[int], *, step_size: float = 0.2
) -> Tensor:
    """Return samples after several numbers of steps, at the cost of the most: each as `sample` gives it.

    Args:
        model: as for `sample`.
        labels: as for `sample`.
        seeds: as for `sample`.
        steps: ascending numbers, each at least 0.
        step_size: L2 length of a step, greater than 0.

    Returns:
        float32 [S, B, C, H, W].

    Raises:
        UserError: as `sample`, or for numbers that do not ascend.
    """
    if not steps or any(a >= b for a, b in pairwise(steps)):
        raise UserError(f"steps must be ascending numbers, got {', '.join(map(str, steps)) or 'none'}")
    return _ascend(model, labels, seeds, _everywhere(seeds), steps, step_size)


def counterfactual(
    model: nn.Module,
    x: Tensor,
    target: Tensor | int,
    threat: ThreatModel | None = None,
    *,
    steps: int = 40,
    step_size: float | None = None,
) -> Counterfactual:
    """Turn images into ones of other classes, within a ball (Augustin et al. 2020, arXiv 2003.09461, section 5).

    Args:
        model: images to logits [B, K]; asked in eval mode.
        x: images, float32 [B, C, H, W] in [0, 1].
        target: the classes, int64 [B], or one for all.
        threat: the ball; None for L2 with a radius of 4, as published for CIFAR-10.
        steps: at least 1.
        step_size: in units of the ball; None for 2.5 times the radius over the steps.

    Raises:
        UserError: for steps, a step size or numbers of targets that do not fit.
    """
    threat = threat or ThreatModel("L2", 4.0)
    if isinstance(target, int):
        target = torch.full((len(x),), target, device=x.device)
    length = 2.5 * threat.eps / steps if step_size is None and steps > 0 else (step_size or 0.0)
    path = _ascend(model, target, x, threat, range(steps + 1), length)
    distance = (path[-1] - x).flatten(1).norm(dim=1)
    return Counterfactual(path[-1], path, distance, _answers(model, path[-1]).softmax(1))


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Compute how often an image from outside scores higher than one from inside; ties count half.

    Args:
        inside: scores [N] of images in distribution, as `ood_score` gives.
        outside: scores [M] of others.

    Returns:
        In [0, 1]; 0.5 is chance.

    Raises:
        UserError: if either is empty or holds a NaN.
    """
    inside, outside = inside.double().cpu(), outside.double().cpu()
    if not len(inside) or not len(outside):
        raise UserError("auroc needs scores of images in and out of distribution, and one of them is empty")
    if bool(inside.isnan().any() or outside.isnan().any()):
        raise UserError("auroc: a score is NaN; the model's logits are not finite")
    ordered = inside.sort().values
    below = torch.searchsorted(ordered, outside, right=False) + torch.searchsorted(ordered, outside, right=True)
    return float(below.double().mean() / (2 * len(inside)))


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """Compute the Frechet distance of two normal distributions fitted to features (Heusel et al. 2017, eq. 6).

    A small sample has a large distance from any other, so a number wants the floor beside it: that of real test images
    from the same training images.

    Args:
        features: [N, D]; N should be ten times D.
        others: [M, D].

    Returns:
        At least 0, in squared units of the features.

    Raises:
        UserError: for fewer than two rows.
    """
    if min(len(features), len(others)) < 2:
        raise UserError("the Frechet distance needs at least two images on either side")
    a, b = features.double(), others.double()
    first, second = a.T.cov(), b.T.cov()
    # tr sqrt(A B) is that of the symmetric sqrt(sqrt(A) B sqrt(A)).
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * shared
    return max(float(apart), 0.0)


def precision_recall(real: Tensor, made: Tensor, k: int = 5) -> dict[str, float]:
    """Compute precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Args:
        real: features [N, D] of real images.
        made: features [N, D] of samples, as many.
        k: neighbours that make a ball, at least 1.

    Returns:
        `precision`, `recall` and `coverage` in [0, 1], and `density`, at least 0.

    Raises:
        UserError: for unequal numbers, or k that is not below them.
    """
    if len(real) != len(made) or not 1 <= k < len(real):
        raise UserError(
            f"precision needs as many samples as real images and more than k, got {len(made)} and {len(real)}"
        )
    real, made = real.double(), made.double()
    radius, other = (torch.cdist(f, f).kthvalue(k + 1, dim=1).values for f in (real, made))
    apart = torch.cdist(real, made)
    inside = apart <= radius[:, None]
    return {
        "precision": float(inside.any(0).double().mean()),
        "recall": float((apart <= other).any(1).double().mean()),
        "density": float(inside.double().sum(0).mean() / k),
        "coverage": float((apart.amin(1) <= radius).double().mean()),
    }


def nearest_distance(images: Tensor, training: Tensor) -> Tensor:
    """Compute the L2 distance of each image [B] to the nearest training image, over pixels in [0, 1].

    Where those of samples are below those of test images, samples are copies.
    """
    rows, of = images.flatten(1).float(), training.flatten(1).float()
    nearest = torch.cat([torch.cdist(part, of).argmin(1) for part in torch.split(rows, 256)])
    # Distances of many are differences of large squares, by which a copy is not at 0.
    distance: Tensor = torch.linalg.vector_norm(rows - of[nearest], dim=1)
    return distance


def _covariance(training: Split) -> str:
    return "full" if math.prod(training.image_shape) <= MOST_VALUES else "channel"


def _answers(model: nn.Module, x: Tensor) -> Tensor:
    """Logits float32 [B, K] in eval mode, without a graph."""
    _refuse_integers(x)
    with torch.no_grad(), in_eval_mode(model):
        return torch.cat([read_logits(model, part).float() for part in torch.split(x, 256)])


def _refuse_integers(x: Tensor) -> None:
    """Refuse what would be taken for values in [0, 1] and answered without a word."""
    if not x.is_floating_point():
        raise UserError(f"images must be floating in [0, 1], got {x.dtype}; divide bytes by 255")


def _everywhere(seeds: Tensor) -> ThreatModel:
    """Return a ball that holds the whole box [0, 1]."""
    return ThreatModel("L2", 1.0 + math.sqrt(math.prod(seeds.shape[1:])))


def _ascend(
    model: nn.Module, y: Tensor, x: Tensor, threat: ThreatModel, kept: Sequence[int], step_size: float
) -> Tensor:
    """Climb f(x)[y] within a ball and the box; the iterates after `kept` steps, ascending, [S, B, ...]."""
    if not kept or kept[0] < 0:
        raise UserError(f"steps must be at least 0, got {kept[0] if kept else -1}")
    _refuse_integers(x)
    steps = kept[-1]
    if steps and not (step_size > 0 and math.isfinite(step_size)):
        raise UserError(f"step_size must be greater than 0, got {step_size:g}")
    if y.shape != x.shape[:1]:
        raise UserError(f"got {len(x)} images and labels of shape {list(y.shape)}; give one label for each image")
    found = []
    with in_eval_mode(model):
        for first in range(0, len(x), BATCH):
            rows = torch.arange(first, first + BATCH, device=x.device).clamp_max(len(x) - 1)
            at, label = x[rows], y[rows, None]
            start, path = at, [at] if kept[0] == 0 else []

            def climb(images: Tensor, label: Tensor = label) -> Tensor:
                return read_logits(model, images).float().gather(1, label)[:, 0]

            for step in range(1, steps + 1):
                at = threat.project(threat.ascend(at, slope(climb, at), step_size), start).detach()
                if step in kept:
                    path.append(at)
            found.append(torch.stack(path)[:, : len(x) - first])
    return torch.cat(found, 1) if found else x.new_empty((len(kept), *x.shape))
