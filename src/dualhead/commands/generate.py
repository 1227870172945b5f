"""Do what `dualhead sample` and `dualhead counterfactual` are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualhead.commands.resolve import Request, Resolved, resolve
from dualhead.data import Split, load_split, to_bytes
from dualhead.errors import UserError
from dualhead.evaluation import counterfactual, noise_seeds, sample, write_arrays
from dualhead.noise import Streams
from dualhead.report import save_sheet
from dualhead.runs import read_recipe
from dualhead.system.files import check_folder
from dualhead.threats import ThreatModel

MOST_SAMPLES = 1_000_000
"""Most samples of one class: samples are numbered by class and place."""


def draw_samples(
    request: Request, classes: str | None, count: int, steps: int, step_size: float, seeds: str | None
) -> dict[str, Any]:
    """Draw samples of some classes and write `samples.npz`, a sheet and a strip from seeds to samples.

    Args:
        request: model, images, seed and the folder.
        classes: as `chosen` reads it.
        count: of each class.
        steps: of the ascent.
        step_size: L2 length of a step.
        seeds: `gaussian`, `uniform` or a data source; None for what the run was trained with, else `gaussian`.

    Returns:
        Facts of what was written.

    Raises:
        UserError: for values that do not fit.
    """
    if not 1 <= count <= MOST_SAMPLES:
        raise UserError(f"--count {count}: must be from 1 to {MOST_SAMPLES:,}")
    folder = _folder(request, "samples")
    asked = resolve(request)
    known = asked.images
    labels = torch.tensor(chosen(classes, known.class_names), dtype=torch.int64).repeat_interleave(count)
    device = next(asked.model.parameters()).device
    draw, kind = seeds_for(request, seeds, training_images(request, asked))
    started = draw(labels, torch.arange(count).repeat(len(labels) // count)).to(device)
    labels = labels.to(device)
    path = sample(asked.model, labels, started, steps=steps, step_size=step_size)
    images = to_bytes(path).cpu().numpy()
    arrays = {"images": images, "label": labels.cpu().numpy(), "class_names": np.array(known.class_names)}
    write_arrays(folder / "samples.npz", arrays, compressed=True)
    rows = images.reshape(-1, count, *images.shape[1:])
    save_sheet(rows[:, :16], folder / "sheet.png")
    first = torch.arange(0, len(labels), count, device=device)
    strip = sample(asked.model, labels[first], started[first], steps=steps, step_size=step_size, trajectory=True)
    shown = np.unique(np.linspace(0, steps, min(9, steps + 1)).round().astype(int))
    save_sheet(to_bytes(strip).cpu().numpy()[shown].swapaxes(0, 1), folder / "strip.png")
    passes = {"forward": steps, "backward": steps}
    facts = {"output": str(folder), "samples": len(labels), "steps": steps, "step_size": step_size, "seeds": kind}
    return {**facts, "passes": passes}


def draw_counterfactuals(
    request: Request, to: str | None, count: int, radius: float, steps: int, step_size: float | None
) -> dict[str, Any]:
    """Turn the first test images into some classes within an L2 ball; write `counterfactuals.npz` and a sheet.

    Args:
        request: model, images and the folder.
        to: target classes, as `chosen` reads them.
        count: how many images.
        radius: of the ball, in units of pixels in [0, 1].
        steps: of the ascent, at least 1.
        step_size: None for 2.5 times the radius over the steps.

    Returns:
        Facts of what was written, with mean distance and mean probability of the target.

    Raises:
        UserError: for values that do not fit.
    """
    folder = _folder(request, "counterfactuals")
    asked = resolve(request)
    targets = chosen(to, asked.images.class_names)
    device = next(asked.model.parameters()).device
    count = min(count, len(asked.images))
    x = asked.images.images[torch.arange(count)].to(device).float().div(255.0)
    target = torch.tensor(targets, device=device).repeat(count)
    origin = x.repeat_interleave(len(targets), 0)
    found = counterfactual(asked.model, origin, target, ThreatModel("L2", radius), steps=steps, step_size=step_size)
    told = found.probabilities.gather(1, target[:, None])[:, 0]
    index = torch.arange(count).repeat_interleave(len(targets))
    image, path, clean = (to_bytes(each).cpu().numpy() for each in (found.image, found.path, x))
    arrays = {
        "image": image, "path": path, "index": index.numpy(), "label": asked.images.labels[index].numpy(),
        "target": target.cpu().numpy(), "distance": found.distance.cpu().numpy(),
        "probabilities": found.probabilities.cpu().numpy(), "class_names": np.array(asked.images.class_names),
    }  # fmt: skip
    write_arrays(folder / "counterfactuals.npz", arrays, compressed=True)
    moved = image.reshape(count, len(targets), *x.shape[1:])
    save_sheet(np.concatenate((clean[:, None], moved), 1)[:24], folder / "sheet.png")
    mean = {"distance": float(found.distance.mean()), "target_probability": float(told.mean())}
    return {"output": str(folder), "images": count, "targets": targets, "radius": radius, "steps": steps, **mean}


def chosen(words: str | None, names: Sequence[str]) -> list[int]:
    """Read classes by number, range or name, with commas: `0-3,7` or `cat,dog`; None for all.

    Raises:
        UserError: for one that there is not.
    """
    if words is None:
        return list(range(len(names)))
    found: list[int] = []
    for word in filter(None, (part.strip() for part in words.split(","))):
        first, dash, last = word.partition("-")
        if word in names:
            found.append(list(names).index(word))
        elif word.isdigit() and int(word) < len(names):
            found.append(int(word))
        elif dash and first.isdigit() and last.isdigit() and int(first) <= int(last) < len(names):
            found += range(int(first), int(last) + 1)
        else:
            raise UserError(f"class {word}: there is none; write numbers from 0 to {len(names) - 1}, ranges or names")
    if not found:
        raise UserError("no class is named; write e.g. 0-3,7 or leave the option out for all")
    return list(dict.fromkeys(found))


def seeds_for(request: Request, kind: str | None, training: Split) -> tuple[Callable[[Tensor, Tensor], Tensor], str]:
    """Return what draws the seeds of samples, and what they are in words.

    Args:
        request: model, images and seed.
        kind: `gaussian`, `uniform` or a data source, of which the test part is taken where there is one; None for
            what the run was trained with, else `gaussian`.
        training: images whose shape seeds have, and to which `gaussian` is fitted.

    Returns:
        A function of labels and numbers within the class, int64 [B] each, to seeds float32 [B, C, H, W] in [0, 1]. The
        number of a sample is its class and place, so a picture stays the same whatever else is asked for.

    Raises:
        UserError: for a source that cannot be read.
    """
    kind = kind or _trained_with(request) or "gaussian"
    if kind in ("gaussian", "uniform"):

        def noise(labels: Tensor, places: Tensor) -> Tensor:
            return noise_seeds(training, labels * MOST_SAMPLES + places, kind, seed=request.seed)

        return noise, kind
    images, part = other_images(request, kind, training.image_shape)

    def natural(labels: Tensor, places: Tensor) -> Tensor:
        streams = Streams.of(request.seed, labels * MOST_SAMPLES + places).fork("seeds")
        rows = (streams.uniform(1)[:, 0] * len(images)).long().clamp_max(len(images) - 1)
        return torch.as_tensor(images.images[rows]).float().div(255.0)

    return natural, f"{kind}, {part} part"


def other_images(request: Request, source: str, shape: tuple[int, int, int]) -> tuple[Split, str]:
    """Read images of another source in the shape of the model's: the test part, or the train part where there is none.

    Returns:
        The images, and which part they are.

    Raises:
        UserError: if they cannot be read.
    """
    reading: dict[str, Any] = {**request.reading, "image_size": shape[1:]}
    if shape[0] in (1, 3):
        reading["channels"] = shape[0]
    try:
        return load_split(source, "test", **reading), "test"
    except UserError:
        return load_split(source, "train", **reading), "train"


def training_images(request: Request, asked: Resolved) -> Split:
    """Return the training part of a run's data, held-out images with it; of other models that of `--data`, if any.

    Where a source has no training part the images that are given stand for it.
    """
    shape = asked.images.image_shape
    if request.is_run:
        found = read_recipe(Path(request.model)).data.load("train", request.data)
    else:
        assert request.data is not None, "models that are no runs need --data"
        framing = asked.framing
        try:
            found = load_split(
                request.data, "train", image_size=framing.size, crop=framing.crop, resample=framing.resample,
                squash=framing.squash, channels=framing.channels or shape[0], depth=framing.depth,
                image_column=request.image_column, label_column=request.label_column,
            )  # fmt: skip
        except UserError:
            return asked.images
    return found.show_middle(*shape[1:])


def _trained_with(request: Request) -> str | None:
    """Return the seeds that a run's last stage with seeds was trained with; None if there was none."""
    stages = read_recipe(Path(request.model)).stages if request.is_run else ()
    for stage in reversed(stages):
        stream = stage.objective.streams().get("seeds")
        if stream is not None:
            return stream.named_source or stream.registered_name
    return None


def _folder(request: Request, name: str) -> Path:
    if request.output_dir is None and not request.is_run:
        raise UserError(f"--output is needed, since {request.model} is not a run")
    folder = request.output_dir or Path(request.model) / name
    check_folder(folder, "--output")
    return folder
