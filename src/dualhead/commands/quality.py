"""Do what `dualhead evaluate --generation` and `--ood` are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualhead.commands.generate import MOST_SAMPLES, other_images, seeds_for, training_images
from dualhead.commands.judge import backbone_for, identity_of, judge_of, score_of
from dualhead.commands.resolve import BY_SAMPLES, Request, Resolved, resolve, run_results
from dualhead.data import Split, hold_out, to_bytes
from dualhead.errors import UserError
from dualhead.evaluation import (
    STEPS,
    Evaluation,
    Finding,
    Judge,
    Sampling,
    Sets,
    check_compression,
    finite,
    held_out_distances,
    measure_generation,
    measure_ood,
    noise_seeds,
    weights_fingerprint,
    write_arrays,
)
from dualhead.runs import RunFolder, kept_checkpoints, parted, read_recipe
from dualhead.system.devices import find_device
from dualhead.system.files import write_json
from dualhead.system.processes import group
from dualhead.threats import Threat, build_threat
from dualhead.training import read_metrics

CHOSEN: Final = "checkpoint.json"
"""Which checkpoint an earlier call chose by its samples, and by which distances."""
KEPT: Final = "generation.json"
"""Results of an earlier call, which are taken where nothing that decides them has changed."""
OOD: Final = "ood.npz"
Pair = tuple[Tensor | NDArray[Any], Tensor | NDArray[Any]]
"""Images uint8 [N, C, H, W] and labels [N]."""
MOST_HELD_OUT: Final = 2_000
NATURAL: Final = 1_000
"""Images in which traces of compression are looked for."""


def chosen_by_samples(request: Request) -> tuple[Request, dict[str, Any] | None]:
    """Choose a run's checkpoint as steps are chosen: by the distance of samples to held-out images.

    Robust accuracy chose `best`; a classifier may generate better after another epoch. All that is then measured,
    accuracies and samples alike, is of the one network that is chosen.

    Args:
        request: the options; another `checkpoint` than `by-samples` is left as it is.

    Returns:
        The request for the chosen checkpoint, whose results lie where those of the whole request do. And `chosen`, and
        by checkpoint the least `distance` with its number of `steps`; None where nothing was to choose.

    Raises:
        UserError: if the model is no run, or no samples are asked for.
    """
    if request.checkpoint != BY_SAMPLES:
        return request, None
    if not request.generation:
        raise UserError(f"--checkpoint {BY_SAMPLES}: chooses by samples; give --generation too")
    if not request.is_run:
        raise UserError(f"--checkpoint is for runs, and {request.model} is none")
    request = replace(request, output_dir=run_results(request))
    kept = kept_checkpoints(Path(request.model), request.stage)
    plans = {which: _Plan.of(replace(request, checkpoint=which)) for which in kept}
    questions = {which: plan.question for which, plan in plans.items()}
    folder = cast("Path", request.output_dir)
    known = group().agreed(lambda: _known(folder / CHOSEN, questions))
    if known is None or request.overwrite:
        known = {"asked": questions, "held_out": {which: plan.least_distance() for which, plan in plans.items()}}
        group().lead(partial(write_json, folder / CHOSEN, known))
    found = known["held_out"]
    chosen = min(found, key=lambda which: float(found[which]["distance"]))
    return replace(request, checkpoint=chosen), {"chosen": chosen, "held_out": found}


def assess_further(
    request: Request, asked: Resolved, evaluation: Evaluation, checkpoint: Mapping[str, Any] | None = None
) -> None:
    """Add `generation` and `ood` to an evaluation's results, as far as they are asked for, and save them.

    Args:
        request: the options.
        asked: what they lead to.
        evaluation: of the same model and images.
        checkpoint: how it was chosen, as `chosen_by_samples` tells.

    Raises:
        UserError: for sources that cannot be read, or numbers that do not fit.
    """
    if not (request.generation or request.ood):
        return
    test = asked.images.first(evaluation.num_samples)
    if request.generation:
        told = _generation(request, asked, test)
        evaluation.results["generation"] = told if checkpoint is None else {**told, "checkpoint": dict(checkpoint)}
    if request.ood:
        evaluation.results["ood"] = _ood(request, asked, training_images(request, asked), test)
    group().lead(lambda: evaluation.save(asked.results))


@dataclass(frozen=True)
class _Plan:
    """How samples of a model are drawn and judged.

    Args:
        model: images to logits.
        sets: training, held-out and test images.
        sampling: how many samples, and how.
        judge: makes the judge, which may take its training.
        score: trains a classifier on images, and tells which test images it gets right.
        question: all that decides the measures, JSON values.
        training: all training images, the held-out ones included.
    """

    model: nn.Module
    sets: Sets
    sampling: Sampling
    judge: Callable[[], Judge]
    score: Callable[[Split], NDArray[np.bool_]]
    question: dict[str, Any]
    training: Split

    @classmethod
    def of(cls, request: Request, asked: Resolved | None = None, test: Split | None = None) -> Self:
        """Plan what a request asks for."""
        asked = asked or resolve(request)
        test = test or asked.images.first(asked.images.count(request.limit))
        tested, training = test, training_images(request, asked)
        steps = _steps(request.sample_steps)
        backbone = backbone_for(asked.model, request.judge)
        draw, kind = seeds_for(request, request.seeds, training)
        question = {
            "weights": weights_fingerprint(asked.model), "images": len(test), "training": len(training),
            "samples": request.samples, "steps": list(steps), "step_size": request.step_size, "seeds": kind,
            "seed": request.seed, "judge": identity_of(request.judge or backbone),
        }  # fmt: skip
        sets, augment = _sets(request, training, test)
        device = str(find_device(request.device))
        return cls(
            asked.model,
            sets,
            Sampling(request.samples, steps, request.step_size, draw, kind, request.seed),
            lambda: judge_of(training, asked.images, augment, request.judge or backbone, device),
            lambda images: score_of(images, tested, augment, backbone, device),
            question,
            training,
        )

    def least_distance(self) -> dict[str, Any]:
        """Return the least `distance` of samples to held-out images, and its number of `steps`."""
        found = held_out_distances(self.model, self.sets, self.judge(), self.sampling)
        steps = min(found, key=found.__getitem__)
        return {"distance": found[steps], "steps": steps}


def _generation(request: Request, asked: Resolved, test: Split) -> dict[str, Any]:
    plan = _Plan.of(request, asked, test)
    known = group().agreed(lambda: _known(asked.results / KEPT, plan.question))
    if known is not None and not request.overwrite:
        return dict(known["generation"])
    found = measure_generation(plan.model, plan.sets, plan.judge(), plan.sampling, plan.score)
    found.results["checks"] += [
        asdict(each) for each in _further_checks(request, plan.sampling.seeds_name, plan.training)
    ]
    results: dict[str, Any] = finite(found.results)

    def keep() -> None:
        found.save(asked.results)
        write_json(asked.results / KEPT, {"asked": plan.question, "generation": results})

    group().lead(keep)
    return results


def _further_checks(request: Request, kind: str, training: Split) -> list[Finding]:
    """Let objectives look at the log of their stages, and look at natural seeds."""
    stages = read_recipe(Path(request.model)).stages if request.is_run else ()
    log = read_metrics(RunFolder(Path(request.model)).metrics) if stages else []
    checks: dict[str, tuple[bool, str]] = {}  # those of a later stage in place of an earlier one's
    for stage in stages:
        checks |= stage.objective.checks([line for line in log if line.get("stage") == stage.name])
    found = [Finding(name, "ok" if good else "warning", told) for name, (good, told) in checks.items()]
    if kind not in ("gaussian", "uniform"):
        source = request.seeds or kind.rpartition(",")[0]
        images = other_images(request, source, training.image_shape)[0]
        pixels = (torch.as_tensor(each.images[:NATURAL]) for each in (training, images))
        found.append(check_compression(*pixels))
    return found


def _known(file: Path, question: dict[str, Any]) -> dict[str, Any] | None:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) and told.get("asked") == question else None


def _steps(words: str | None) -> tuple[int, ...]:
    if words is None:
        return STEPS
    parts = [part.strip() for part in words.split(",")]
    if not all(part.isdigit() for part in parts):
        raise UserError(f"--sample-steps {words}: write numbers with commas, e.g. 8,16,32")
    return tuple(sorted({int(part) for part in parts}))


def _sets(request: Request, training: Split, test: Split) -> tuple[Sets, tuple[Any, ...]]:
    """Return the sets of images, and the augmentations that the run's recipe has."""
    if not request.is_run:
        kept, held = _tenth(training)
        return Sets(kept, held, test, f"{len(held)} images of the training part"), ()
    recipe = read_recipe(Path(request.model))
    augment = tuple(recipe.resolved()["data"]["augment"])
    if recipe.data.validation:
        kept, held = parted(Path(request.model), recipe, training)
        return Sets(kept, held, test, f"{len(held)} held-out training images"), augment
    kept, held = _tenth(training)
    return Sets(kept, held, test, f"{len(held)} training images, since the run held none out"), augment


def _tenth(training: Split) -> tuple[Split, Split]:
    return hold_out(training, min(max(len(training) // 10, 2 * training.num_classes), MOST_HELD_OUT), 0)


def _ood(request: Request, asked: Resolved, training: Split, test: Split) -> dict[str, Any]:
    others = {source: _outside(request, source, training) for source in dict.fromkeys(request.ood)}
    found, energies = measure_ood(asked.model, test, others, asked.threat, seed=request.seed)
    arrays = {f"energy_{place}": values.numpy() for place, values in enumerate(energies.values())}
    names = np.asarray(list(energies))
    group().lead(lambda: write_arrays(asked.results / OOD, {"sources": names, **arrays}))
    told: dict[str, Any] = finite(found)
    return told


def _outside(request: Request, source: str, training: Split) -> Split:
    """Return images of a source, or noise as it starts samples."""
    if source not in ("gaussian", "uniform"):
        return other_images(request, source, training.image_shape)[0]
    numbers = torch.arange(1_000) + 10**12  # other noise than that of any sample
    noise = noise_seeds(training, numbers, source, seed=request.seed)
    labels = torch.zeros(len(noise), dtype=torch.int64)
    return Split(to_bytes(noise), labels, training.class_names)


# ---- from Python


def evaluate_generation(
    model: nn.Module,
    train: Pair,
    test: Pair,
    *,
    held_out: Pair | None = None,
    class_names: Sequence[str] | None = None,
    samples: int = 1_000,
    steps: Sequence[int] = STEPS,
    step_size: float = 0.2,
    seeds: str | Tensor = "gaussian",
    seed: int = 0,
    judge: str | None = None,
    augment: Sequence[Any] = (),
    output_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Measure samples of a classifier as `dualhead evaluate --generation` does; any classifier will do.

    A judge is trained on the training images the first time, and kept in the cache.

    Args:
        model: images float32 [B, C, H, W] in [0, 1] to logits; asked in eval mode, on its device.
        train: images uint8 [N, C, H, W] and labels int64 [N] that the model was trained on.
        test: those that the measures are reported on.
        held_out: those that choose the number of steps; None for a tenth of the training images.
        class_names: in the order of the labels; None for numbers.
        samples: in all.
        steps: ascending numbers of steps to choose from.
        step_size: L2 length of a step.
        seeds: `gaussian`, `uniform`, or images float32 [samples, C, H, W] in [0, 1], where sample i has class i modulo
            the number of classes.
        seed: of the noise.
        judge: its backbone, or the folder of a saved classifier; None for a backbone of another family than the
            model's.
        augment: augmentations of the judge's training images, as a recipe has them.
        output_dir: where pictures for the report go; None for nowhere.

    Returns:
        JSON values, as `generation` in `results.json`.

    Raises:
        UserError: for images, seeds or numbers that do not fit.
    """
    whole, tested = (_split(given, class_names) for given in (train, test))
    if held_out is None:
        kept, held = _tenth(whole)
        words = f"{len(held)} of the training images"
    else:
        kept, held = whole, _split(held_out, class_names)
        words = f"{len(held)} held-out images"
    given = seeds if isinstance(seeds, Tensor) else None
    if given is not None and given.shape != (samples, *whole.image_shape):
        raise UserError(f"seeds: must be {[samples, *whole.image_shape]}, got {list(given.shape)}")

    def draw(labels: Tensor, places: Tensor) -> Tensor:
        if given is not None:
            return given
        return noise_seeds(whole, labels * MOST_SAMPLES + places, str(seeds), seed=seed)

    backbone = backbone_for(model, judge)
    device = str(next(model.parameters()).device)
    found = measure_generation(
        model,
        Sets(kept, held, tested, words),
        judge_of(whole, tested, augment, judge or backbone, device),
        Sampling(samples, tuple(steps), step_size, draw, "given images" if given is not None else str(seeds), seed),
        lambda images: score_of(images, tested, augment, backbone, device),
    )
    if output_dir is not None:
        found.save(output_dir)
    return dict(finite(found.results))


def evaluate_ood(
    model: nn.Module, test: Tensor, others: Mapping[str, Tensor], threat: Threat | str, *, seed: int = 0
) -> dict[str, Any]:
    """Measure how well scores tell test images from others, as `dualhead evaluate --ood` does.

    Args:
        model: images float32 [B, C, H, W] in [0, 1] to logits; asked in eval mode, on its device.
        test: images uint8 [N, C, H, W] in distribution.
        others: by name, images uint8 [M, C, H, W] that are not.
        threat: of the attack on the others, `"L2:0.5"` or a threat.
        seed: of the attack.

    Returns:
        JSON values, as `ood` in `results.json`.

    Raises:
        UserError: for images that do not fit.
    """
    splits = {name: _unlabelled(images) for name, images in others.items()}
    found, _ = measure_ood(model, _unlabelled(test), splits, build_threat(threat, "threat"), seed=seed)
    return dict(finite(found))


def _split(given: Pair, names: Sequence[str] | None) -> Split:
    images, labels = (torch.as_tensor(each) for each in given)
    count = int(labels.max()) + 1
    return Split(images, labels.long(), tuple(names) if names is not None else tuple(map(str, range(count))))


def _unlabelled(images: Tensor) -> Split:
    return Split(images, torch.zeros(len(images), dtype=torch.int64), ("0", "1"))
