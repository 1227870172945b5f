"""Networks that judge samples: trained naturally by a recipe of their own, once for each set of training images."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dualhead.commands.fit import fit
from dualhead.data import Split, cache_folder
from dualhead.errors import UserError
from dualhead.evaluation import Judge, answers, read_logits, weights_fingerprint
from dualhead.saving import load
from dualhead.system.processes import group

_log = logging.getLogger(__name__)

SEED: Final = 20_000
"""Seed of a judge: one that no run has by default."""
BACKBONES: Final = ("wideresnet-10-1", "cnn-16")
"""The judge's, the first whose family is not that of the model."""
EPOCHS: Final = 30
BATCH: Final = 64


def judge_of(
    training: Split, test: Split, augment: Sequence[Any], wanted: str, device: str, folder: Path | None = None
) -> Judge:
    """Return the judge for training images: a given one, trained now, or as an earlier call left it.

    Args:
        training: all training images.
        test: read by the run that trains it, and never learnt from.
        augment: of the training images, as a recipe has it.
        wanted: its backbone, or the folder of a saved classifier or run that shall judge.
        device: to train and run on.
        folder: where judges are kept; None for the cache (`$DUALHEAD_CACHE/judges`).

    Raises:
        UserError: for a given judge that does not fit the images.
    """
    if Path(wanted).is_dir():
        return _given(Path(wanted), training, device)
    backbone, recipe = wanted, _recipe(augment, SEED, device)
    told = {"backbone": backbone, "epochs": EPOCHS, "seed": SEED, "training_images": len(training)}
    digest = hashlib.sha256(json.dumps([recipe, backbone, list(training.class_names)], sort_keys=True).encode())
    digest.update(training.images[:].contiguous().numpy().tobytes())
    digest.update(training.labels.contiguous().numpy().tobytes())
    home = (folder or cache_folder() / "judges") / digest.hexdigest()[:24]
    if not (home / "report.html").is_file():  # the last file that a run writes
        _log.warning("trains a judge (%s, %d epochs) of %d images, once for this data", backbone, EPOCHS, len(training))
        fit(backbone, training, test, recipe=recipe, run_dir=home, progress=False)
    return Judge.of(load(home).to(torch.device(device)).eval(), training, told)


def _given(folder: Path, training: Split, device: str) -> Judge:
    """Load a judge and ask it once, so that one for other images is refused before samples are drawn."""
    network = load(folder).to(torch.device(device)).eval()
    one = torch.as_tensor(training.images[:1]).to(torch.device(device)).float().div(255.0)
    try:
        with torch.no_grad():
            classes = read_logits(network, one).shape[1]
    except (RuntimeError, ValueError) as error:
        shape = list(training.image_shape)
        raise UserError(f"--judge {folder}: cannot read images of the shape {shape}: {error}") from error
    if classes != training.num_classes:
        raise UserError(f"--judge {folder}: tells {classes} classes, but the images have {training.num_classes}")
    return Judge.of(network, training, {"folder": str(folder)})


def identity_of(wanted: str) -> str:
    """Return what tells a wanted judge from others: its backbone, or its folder and the digest of its weights."""
    if not Path(wanted).is_dir():
        return wanted
    return f"{wanted} {weights_fingerprint(load(Path(wanted)))[:16]}"


def score_of(training: Split, test: Split, augment: Sequence[Any], backbone: str, device: str) -> NDArray[np.bool_]:
    """Train a classifier on images and return which test images it gets right, bool [N].

    Raises:
        UserError: if a class has no image.
    """
    if int(training.labels.bincount(minlength=training.num_classes).min()) == 0:
        raise UserError("--samples: every class needs a sample; draw more")
    aside = group().agreed(lambda: tempfile.mkdtemp(prefix="dualhead-score-"))
    try:
        recipe = _recipe(augment, SEED + 1, device)
        found = fit(backbone, training, test, recipe=recipe, run_dir=Path(aside) / "run", progress=False)
        return np.asarray(answers(found.model, torch.as_tensor(test.images[:])) == test.labels.cpu().numpy())
    finally:
        group().lead(lambda: shutil.rmtree(aside, ignore_errors=True))


def backbone_for(model: nn.Module, wanted: str | None) -> str:
    """Return the backbone of networks that judge: the one that is wanted, else one of another family than the model's.

    A folder that is wanted as judge names no backbone.
    """
    if wanted is not None and not Path(wanted).is_dir():
        return wanted
    kinds = {type(module).__module__ for module in model.modules()}
    taken = {name for name in BACKBONES if any(kind.endswith(f"models.{name.split('-')[0]}") for kind in kinds)}
    return next((name for name in BACKBONES if name not in taken), BACKBONES[0])


def _recipe(augment: Sequence[Any], seed: int, device: str) -> dict[str, Any]:
    return {
        "data": {"source": "given", "augment": list(augment), "validation": 0},
        "model": {},
        "threat": {"norm": "L2", "eps": 0.5},
        "stages": [{
            "name": "natural", "train": ["model"], "objective": "natural", "epochs": EPOCHS, "batch_size": BATCH,
            "optimiser": {"name": "sgd", "lr": 0.1, "weight_decay": 5.0e-4},
            "schedule": {"name": "cyclic", "peak": 0.3}, "keep": "last",
        }],
        "evaluate": {"attacks": ["fgsm"], "limit": 100, "gallery": 0},
        "runtime": {"seed": seed, "precision": "float32", "layout": "channels_last", "lanes": 1, "device": device},
    }  # fmt: skip
