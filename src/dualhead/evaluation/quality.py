"""How good a classifier's samples are, in the eyes of another network that knows nothing of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from numpy.typing import NDArray
from torch import Tensor, nn

from dualhead.components.fields import above
from dualhead.data import Memory, Split, to_bytes
from dualhead.errors import UserError
from dualhead.evaluation.diagnostics import Finding
from dualhead.evaluation.generation import auroc, frechet_distance, nearest_distance, precision_recall, sample_at
from dualhead.evaluation.journal import weights_fingerprint, write_arrays
from dualhead.evaluation.model import device_of, read_logits
from dualhead.models import last_layer
from dualhead.statistics import student, wilson
from dualhead.system.modes import in_eval_mode

FILE: Final = "generation.npz"
"""Pictures and energies that the report shows, and which test images are right after training on samples."""
SCORED: Final = "scored"
"""The array bool [N] of those test images."""
STEPS: Final = (0, 4, 8, 12, 16, 24, 32, 48)
"""Numbers of steps among which held-out images choose."""
NEIGHBOURS: Final = 5
BLOCKS: Final = 10
"""Parts of samples and images, each of which gives a kernel distance of its own."""
MOST_REFERENCES: Final = 5_000
"""Training images that are looked at, at most."""
SHOWN: Final = 10
"""Classes and samples of each that the report shows."""
BATCH: Final = 256
APART: Final = 0.75
"""AUC of residues from which on seeds differ in more than content."""


@dataclass(frozen=True)
class Judge:
    """A classifier that was trained apart, whose features measure samples.

    Args:
        network: images float32 [B, C, H, W] in [0, 1] to logits; in eval mode.
        layer: name of the layer that gives the logits; its input is the features.
        facts: JSON values that say what it is, kept with every result.
    """

    network: nn.Module
    layer: str
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, network: nn.Module, images: Split, facts: Mapping[str, Any]) -> Judge:
        """Make a judge of a classifier of such images; its digest joins the facts.

        Raises:
            UserError: if no layer gives the logits.
        """
        layer = last_layer(network, images.num_classes, images.image_shape)
        return cls(network, layer, {**facts, "digest": weights_fingerprint(network)[:16]})

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Read features float64 [N, D] and predicted classes int64 [N] of images uint8 [N, C, H, W], on the CPU."""
        seen: list[Tensor] = []
        device = device_of(self.network)

        def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            del module
            seen.append(given[0].detach())

        hook = self.network.get_submodule(self.layer).register_forward_pre_hook(note)
        features, classes = [], []
        try:
            with torch.no_grad(), in_eval_mode(self.network):
                for part in torch.split(images, BATCH):
                    seen.clear()
                    logits = read_logits(self.network, part.to(device).float().div(255.0))
                    classes.append(logits.argmax(1).cpu())
                    found = seen[-1].flatten(2).mean(2) if seen[-1].ndim > 2 else seen[-1]
                    features.append(found.double().cpu())
        finally:
            hook.remove()
        return torch.cat(features), torch.cat(classes)


@dataclass(frozen=True)
class Sets:
    """The images that samples are measured against.

    Args:
        training: the model's training images.
        held_out: those that choose the number of steps.
        test: those that the measures are reported on.
        chosen_on: what the held-out images are, in words.
    """

    training: Split
    held_out: Split
    test: Split
    chosen_on: str


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn.

    Args:
        count: samples in all, the classes in turn; at least two of each.
        steps: numbers of steps to choose from, ascending.
        step_size: L2 length of a step, greater than 0.
        seeds: gives the seeds float32 [B, C, H, W] of samples by their classes and their numbers within the class.
        seeds_name: what the seeds are, in words.
        seed: of the seeds.
    """

    count: int
    steps: tuple[int, ...]
    step_size: float
    seeds: Callable[[Tensor, Tensor], Tensor]
    seeds_name: str
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.steps or self.steps[0] < 0 or any(a >= b for a, b in pairwise(self.steps)):
            raise UserError(f"steps must be ascending numbers from 0, got {', '.join(map(str, self.steps)) or 'none'}")
        above(0, "step_size", self.step_size)


@dataclass(frozen=True)
class Generation:
    """Measures of a model's samples.

    Args:
        results: JSON values, `generation` in `results.json`; its `checks` tell what makes the figures doubtful.
        arrays: pictures and energies, the content of `generation.npz`.
    """

    results: dict[str, Any]
    arrays: Mapping[str, NDArray[Any]] = field(repr=False)

    def save(self, folder: str | Path) -> None:
        """Write `generation.npz`, atomically."""
        write_arrays(Path(folder) / FILE, self.arrays)


def measure_generation(
    model: nn.Module,
    sets: Sets,
    judge: Judge,
    sampling: Sampling,
    score: Callable[[Split], NDArray[np.bool_]],
) -> Generation:
    """Draw samples of every class and measure them against test images, in the features of a judge.

    The number of steps is the one whose samples are nearest to held-out images (Frechet distance); everything else is
    of samples with that number, rounded to 8 bits. Beside each measure stands that of as many training images, the
    floor: a sample is not expected to be nearer to test images than they are. Distances can be compared only between
    models that the same judge measured with as many samples.

    Args:
        model: images to logits [B, K]; asked in eval mode. It may be any classifier.
        sets: training, held-out and test images.
        judge: trained apart from the model.
        sampling: how many samples, and how.
        score: trains a classifier on images, and says which test images it then gets right, bool [N].

    Raises:
        UserError: for too few images or samples.
    """
    labels, seeds, drawn = _drawn(model, sets, sampling)
    of_test, named = judge.look(_pixels(sets.test))
    spread = _diversity(of_test, sets.test.labels)
    if not spread > 0:
        raise UserError("samples: the judge tells no two test images of a class apart; choose another --judge")
    training = _some(sets.training, MOST_REFERENCES)
    test, held = sets.test, sets.held_out
    looks = [judge.look(images) for images in drawn]
    of_held = judge.look(_pixels(held))[0]
    curve = [
        {
            "steps": steps,
            "held_out": frechet_distance(features, of_held),
            "test": frechet_distance(features, of_test),
            "judge_agreement": float((classes_seen == labels).double().mean()),
        }
        for steps, (features, classes_seen) in zip(sampling.steps, looks, strict=True)
    ]
    best = min(range(len(curve)), key=lambda place: curve[place]["held_out"])
    images, (features, _) = drawn[best], looks[best]
    as_many = _of_all_classes(sets.training, sampling.count)
    floor = judge.look(_pixels(as_many))[0]
    nearest = _nearest(images, test, training)
    scored = score(Split(images, labels, test.class_names))
    results: dict[str, Any] = {
        "samples": sampling.count,
        "steps": sampling.steps[best],
        "step_size": sampling.step_size,
        "seeds": sampling.seeds_name,
        "seed": sampling.seed,
        "chosen_on": sets.chosen_on,
        "passes": {"forward": sampling.steps[best], "backward": sampling.steps[best]},
        "test_images": len(test),
        "judge": {
            **judge.facts,
            "features": features.shape[1],
            "accuracy": float((named == test.labels).double().mean()),
        },
        **_against(features, of_test, in_turn=True),
        **_scored(scored, "classification_accuracy_score"),
        "judge_agreement": curve[best]["judge_agreement"],
        "diversity": _diversity(features, labels) / spread,
        "nearest": nearest,
        "floor": {
            "images": len(as_many), **_against(floor, of_test, in_turn=False),
            **_scored(score(as_many), "classification_accuracy_score"),
        },
        "curve": curve,
    }  # fmt: skip
    energies = {
        "training": _energies(model, _pixels(_some(training, 1000))),
        "test": _energies(model, _pixels(_some(test, 1000))),
        "seeds": _energies(model, to_bytes(seeds).cpu()[:1000]),
        "samples": _energies(model, images[:1000]),
    }
    results["checks"] = [asdict(finding) for finding in _findings(results)]
    results["energies"] = {name: {"mean": float(e.mean()), "deviation": float(e.std())} for name, e in energies.items()}
    arrays = {
        SCORED: scored,
        **_pictures(drawn, sampling.steps, best, labels, training),
        **{f"energy_{name}": values.numpy() for name, values in energies.items()},
    }
    return Generation(results, arrays)


def held_out_distances(model: nn.Module, sets: Sets, judge: Judge, sampling: Sampling) -> dict[int, float]:
    """Return the Frechet distance of samples to held-out images, by the number of steps.

    What `measure_generation` chooses the number of steps by; likewise a checkpoint can be chosen, and test images see
    neither choice.

    Args:
        model: images to logits [B, K]; asked in eval mode.
        sets: training, held-out and test images.
        judge: trained apart from the model.
        sampling: how many samples, and how.

    Raises:
        UserError: for too few images or samples.
    """
    _, _, drawn = _drawn(model, sets, sampling)
    of_held = judge.look(_pixels(sets.held_out))[0]
    found = (frechet_distance(judge.look(images)[0], of_held) for images in drawn)
    return dict(zip(sampling.steps, found, strict=True))


def _drawn(model: nn.Module, sets: Sets, sampling: Sampling) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Draw samples: labels [N], seeds [N, C, H, W], and for each number of steps the images uint8 [N, C, H, W]."""
    classes = sets.training.num_classes
    fewest = min(sampling.count, len(sets.test), len(sets.held_out))
    if sampling.count < 2 * classes or fewest < 2 * NEIGHBOURS:
        raise UserError(
            f"samples: {sampling.count} of {classes} classes against {len(sets.test)} test and {len(sets.held_out)} "
            f"held-out images; at least two of each class, and {2 * NEIGHBOURS} of each of the three, are needed"
        )
    if int(sets.test.labels.bincount().max()) < 2:
        raise UserError(f"samples: no class has two of the {len(sets.test)} test images; measure more of them")
    labels = torch.arange(sampling.count) % classes
    places = torch.arange(sampling.count) // classes
    device = device_of(model)
    seeds = sampling.seeds(labels, places).to(device)
    path = sample_at(model, labels.to(device), seeds, sampling.steps, step_size=sampling.step_size)
    return labels, seeds, [to_bytes(images).cpu() for images in path]


def kernel_distance(features: Tensor, others: Tensor) -> tuple[float, list[float] | None]:
    """Compute the kernel distance, unbiased, with a cubic kernel (Binkowski et al. 2018, arXiv 1801.01401; KID).

    Args:
        features: [N, D].
        others: [M, D].

    Returns:
        The mean over disjoint parts of both sets, which may be negative, and its 95 % interval by Student's t over
        the parts; None of fewer than two parts.

    Raises:
        UserError: for fewer than two rows.
    """
    few = min(len(features), len(others))
    if few < 2:
        raise UserError("the kernel distance needs at least two images on either side")
    parts = max(1, min(BLOCKS, few // 10))
    found = [
        _squared_discrepancy(a, b)
        for a, b in zip(_shared_out(features, parts), _shared_out(others, parts), strict=True)
    ]
    return float(np.mean(found)), student(found)


def _shared_out(rows: Tensor, parts: int) -> list[Tensor]:
    """Equal parts by lot: samples come class by class in turn, and some sets are sorted."""
    mixed = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))].double()
    size = len(rows) // parts
    return [mixed[place * size : (place + 1) * size] for place in range(parts)]


def _squared_discrepancy(a: Tensor, b: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x y / D + 1)^3."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1.0) ** 3

    n, m = len(a), len(b)
    within_a, within_b = kernel(a, a), kernel(b, b)
    own = (within_a.sum() - within_a.trace()) / (n * (n - 1)) + (within_b.sum() - within_b.trace()) / (m * (m - 1))
    return float(own - 2.0 * kernel(a, b).mean())


def _against(features: Tensor, of_test: Tensor, *, in_turn: bool) -> dict[str, Any]:
    """All distances of images from test images by their features; neighbours are counted among equally many.

    Args:
        features: of the images.
        of_test: of test images.
        in_turn: whether the images' classes come in turn, as those of samples, so that the first ones show them all.
    """
    kernel, ends = kernel_distance(features, of_test)
    count = min(len(features), len(of_test))
    real = of_test[_spread(len(of_test), count)]
    return {
        "frechet_distance": frechet_distance(features, of_test),
        "kernel_distance": kernel,
        "kernel_distance_interval": ends,
        **precision_recall(real, features[:count] if in_turn else features[_spread(len(features), count)], NEIGHBOURS),
    }


def _scored(right: NDArray[np.bool_], name: str) -> dict[str, Any]:
    return {name: float(right.mean()), f"{name}_interval": list(wilson(int(right.sum()), len(right)))}


def _diversity(features: Tensor, labels: Tensor) -> float:
    """Mean distance of two images of one class, over the classes with at least two."""
    means = []
    for label in sorted(set(labels.tolist())):
        rows = features[labels == label][:500]
        if len(rows) > 1:
            means.append(float(torch.pdist(rows).mean()))
    return float(np.mean(means)) if means else math.nan


def _nearest(images: Tensor, test: Split, training: Split) -> dict[str, float]:
    """Distances to the nearest training image; `copies`: share of samples nearer than 99 of 100 test images are."""
    known = _pixels(training).float().div(255.0)
    samples = nearest_distance(images.float().div(255.0), known)
    others = nearest_distance(_pixels(_some(test, 1000)).float().div(255.0), known)
    limit = float(others.double().quantile(0.01))
    return {
        "samples": float(samples.mean()), "test": float(others.mean()),
        "copies": float((samples < limit).double().mean()),
    }  # fmt: skip


def _energies(model: nn.Module, images: Tensor) -> Tensor:
    """Marginal energies float32 [N], on the CPU."""
    device = device_of(model)
    with torch.no_grad(), in_eval_mode(model):
        parts = [
            read_logits(model, part.to(device).float().div(255.0)).float().logsumexp(1).neg().cpu()
            for part in torch.split(images, BATCH)
        ]
    return torch.cat(parts)


def _pictures(
    drawn: Sequence[Tensor], steps: Sequence[int], best: int, labels: Tensor, training: Split
) -> dict[str, NDArray[Any]]:
    """Samples by class, ways from seed to sample, and samples with their nearest training images."""
    classes = training.num_classes
    shown = [label for label in range(classes) if bool((labels == label).any())][:SHOWN]
    rows = [torch.nonzero(labels == label)[:, 0] for label in shown]
    many = min(SHOWN, *(len(row) for row in rows))
    sheet = torch.stack([drawn[best][row[:many]] for row in rows])
    strip = torch.stack([torch.stack([images[row[0]] for images in drawn]) for row in rows])
    first = torch.stack([drawn[best][row[0]] for row in rows])
    known = _pixels(training)
    near = torch.cdist(first.flatten(1).float(), known.flatten(1).float()).topk(min(4, len(known)), largest=False)
    neighbours = torch.cat((first[:, None], known[near.indices]), 1)
    return {
        "sheet": sheet.numpy(), "strip": strip.numpy(), "strip_steps": np.asarray(steps),
        "neighbours": neighbours.numpy(), "neighbour_distance": near.values.div(255.0).numpy(),
        "shown": np.asarray(shown),
    }  # fmt: skip


def _findings(results: Mapping[str, Any]) -> list[Finding]:
    """Signs that samples are copies, collapsed, or of a model whose logits know nothing of images."""
    near, coverage, precision = results["nearest"], results["coverage"], results["precision"]
    copied = near["copies"] > 0.05
    narrow = coverage < 0.5 * precision or results["diversity"] < 0.5
    at_end = results["steps"] == results["curve"][-1]["steps"] and len(results["curve"]) > 1
    return [
        Finding(
            "memorised_samples", "warning" if copied else "ok",
            f"{near['copies']:.0%} of the samples are nearer to a training image than 99 % of the test images are",
        ),
        Finding(
            "narrow_samples", "warning" if narrow else "ok",
            f"coverage {coverage:.2f}, precision {precision:.2f}, diversity within classes {results['diversity']:.2f} "
            "of that of test images",
        ),
        Finding(
            "sampling_steps", "warning" if at_end else "ok",
            f"{results['steps']} steps are the best of those tried"
            + (", and the most: try more with --sample-steps" if at_end else ""),
        ),
    ]  # fmt: skip


def check_compression(training: Tensor, seeds: Tensor) -> Finding:
    """Try to tell seeds from training images by what compression and resizing leave: fine residues without content.

    Each image gives the shape of the spectrum of its high-pass residue and the strength of edges on a grid of 8x8
    blocks; a linear discriminant of half of the images is tried on the other half.

    Args:
        training: uint8 [N, C, H, W].
        seeds: uint8 [M, C, H, W], natural images.
    """
    a, b = _traces(training), _traces(seeds)
    half_a, half_b = len(a) // 2, len(b) // 2
    spread = (a[:half_a].T.cov() + b[:half_b].T.cov()) / 2
    eye = torch.eye(a.shape[1], dtype=a.dtype)
    way = torch.linalg.solve(spread + 1e-3 * spread.trace() / a.shape[1] * eye, b[:half_b].mean(0) - a[:half_a].mean(0))
    found = auroc(a[half_a:] @ way, b[half_b:] @ way)
    bad = found > APART
    return Finding(
        "seed_compression", "warning" if bad else "ok",
        f"seeds and training images are told apart by fine residues alone with an AUC of {found:.2f}"
        + ("; the energy may learn compression: bring both through the same encoder" if bad else ""),
    )  # fmt: skip


def _traces(images: Tensor) -> Tensor:
    """Measure traces of compression in images uint8 [N, C, H, W]: float64 [N, 8]."""
    x = images.double().div(255.0).mean(1, keepdim=True)
    residue = x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 1)
    residue = residue / residue.flatten(1).std(1).clamp_min(1e-6)[:, None, None, None]
    power = torch.fft.rfft2(residue[:, 0]).abs().square()
    rows, columns = torch.fft.fftfreq(x.shape[2])[:, None], torch.fft.rfftfreq(x.shape[3])[None]
    radius = (rows.square() + columns.square()).sqrt().clamp_max(0.499)
    ring = (radius * 12).long()
    bins = torch.stack([power[:, ring == k].mean(1) if bool((ring == k).any()) else power.new_ones(len(power))
                        for k in range(6)], 1)  # fmt: skip
    blocks = []
    for axis in (2, 3):
        jump = x.diff(dim=axis).abs().mean(dim=(1, 5 - axis))
        edge = torch.arange(jump.shape[1]) % 8 == 7
        inner = jump[:, ~edge].mean(1)
        blocks.append((jump[:, edge].mean(1) if bool(edge.any()) else inner).add(1e-3).log() - inner.add(1e-3).log())
    return torch.cat((bins.add(1e-9).log(), torch.stack(blocks, 1)), 1)


def _some(split: Split, count: int) -> Split:
    return split if len(split) <= count else split.take(_spread(len(split), count))


def _of_all_classes(split: Split, count: int) -> Split:
    """As `_some`; where chance would leave a class out, which nothing could then be trained on, as evenly as can be."""
    found = _some(split, count)
    if np.unique(found.labels).size == np.unique(split.labels).size:
        return found
    return split.take(Memory(count).chosen(split.labels))


def _spread(total: int, count: int) -> Tensor:
    """Positions of `count` of `total` images, the same for each call."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count].sort().values


def _pixels(split: Split) -> Tensor:
    return torch.as_tensor(split.images[:])
