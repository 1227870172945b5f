"""Models and a run that earlier code has left; `python -m helpers.frozen_models OUTPUT.npz` writes their logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers.frozen_recipes import PORTABLE

TESTS = Path(__file__).resolve().parents[1]
DATA = TESTS / "data"
RUN, EXPORTED = DATA / "finished_run", DATA / "exported_model"
LOGITS, VERDICTS = DATA / "frozen_logits.npz", DATA / "frozen_verdicts.json"
PUBLISHED = TESTS.parent / "benchmarks" / "results" / "models" / "trades-distilled"
HEADS, MERGED = ("head1", "head2"), ("mean", "aggregate")
MODELS = {
    "finished_run": (RUN, (1, 8, 8), (*HEADS, *MERGED)),
    "exported_model": (EXPORTED, (1, 8, 8), (*HEADS, *MERGED)),
    "trades-distilled": (PUBLISHED, (3, 32, 32), (*HEADS, *MERGED)),
}
"""Folder, shape of an image, and outputs."""
IMAGES = 16
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def logits_here() -> dict:
    """Logits float32 [16, 10] of every output of every model, by `MODEL/OUTPUT`; `MODEL/deployed` is the default."""
    import numpy as np
    import torch

    import dualhead

    found = {}
    for name, (folder, shape, outputs) in MODELS.items():
        generator = np.random.Generator(np.random.PCG64(11))
        images = torch.from_numpy(generator.random((IMAGES, *shape), dtype=np.float32))
        for output in (None, *outputs):
            with torch.no_grad():
                found[f"{name}/{output or 'deployed'}"] = dualhead.load(folder, output)(images).numpy()
    return found


def logits_apart() -> dict:
    """The same from a process in which processors of any make agree."""
    import numpy as np

    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "logits.npz"
        subprocess.run(
            [sys.executable, "-m", "helpers.frozen_models", str(output)],
            cwd=TESTS,
            env={**os.environ, **PORTABLE},
            check=True,
        )
        with np.load(output) as found:
            return dict(found)


SEEN = (0, 2, 5, 2, 2, 5, 2, 0, 5, 9, 2, 2, 2, 1, 2, 5, 2, 0, 7, 8)
"""Classes in which the published model sees the images below, except for the last two."""


def make_patches(folder: Path) -> Path:
    """An image folder of 32x32 images in coarse patches of colour, the same everywhere."""
    import numpy as np
    from PIL import Image

    generator = np.random.Generator(np.random.PCG64(13))
    images = generator.integers(0, 256, (200, 4, 4, 3)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    for part, labels in (("train", range(10)), ("test", SEEN)):
        for number, label in enumerate(labels):
            place = folder / part / CIFAR10[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[number]).save(place / f"{number:02d}.png")
    return folder


def dualhead(*arguments: object, folder: Path) -> str:
    """What `dualhead ARGUMENTS` prints in a folder, in such a process."""
    command = [sys.executable, "-m", "dualhead", *map(str, arguments)]
    own = {**PORTABLE, "DUALHEAD_CACHE": str(folder / "cache")}
    ended = subprocess.run(
        command, env={**os.environ, **own}, cwd=folder, capture_output=True, text=True, check=False
    )  # fmt: skip
    if ended.returncode:
        raise RuntimeError(ended.stderr)
    return ended.stdout


def evaluate_published(place: Path) -> dict:
    """What `dualhead evaluate` finds of the published model on a few images, made in this folder."""
    import numpy as np

    make_patches(place / "images")
    told = dualhead(
        "evaluate", PUBLISHED, "--data", place / "images", "--attack", "fgsm", "--attack", "pgd-2", "--eps", "1/255",
        "--batch-size", 20, "--output", place / "evaluation",
        "--device", "cpu", "--precision", "float32", "--quiet", "--json", folder=place,
    )  # fmt: skip
    results = json.loads(told)
    with np.load(place / "evaluation" / "samples.npz") as samples:
        kept = ("label", "clean_prediction", "robust_fgsm", "robust_pgd-2")
        verdicts = {name: samples[name].astype(int).tolist() for name in kept}
    return {**verdicts, "clean_accuracy": results["clean_accuracy"], "robust_accuracy": results["robust_accuracy"]}


def main() -> None:
    import numpy as np

    np.savez_compressed(sys.argv[1], **logits_here())


if __name__ == "__main__":
    main()
