"""Accuracy on images that are not attacked but worn: the mean over common corruptions, and that of each kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualhead.data import corruptions as rendering
from dualhead.statistics import interval_over_samples

WORD: Final = "corruptions"
"""The word for it in a list of attacks. It is none: nothing searches, no budget holds, and `worst` leaves it out."""


def asks_for_corruptions(spec: object) -> bool:
    """Whether an attack as a recipe or a command names it means the corruptions."""
    return spec == WORD


def corrupted_right(
    answer: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, keys: Tensor, kind: str, seed: int, size: int
) -> NDArray[np.bool_]:
    """Tell which images are classified correctly when corrupted, bool [N, 5] by severity.

    Args:
        answer: images float32 [B, C, H, W] on the CPU to classes int64 [B].
        images: uint8, or floating in [0, 1], which is rounded to 8 bits, [N, C, H, W].
        labels: int64 [N].
        keys: int64 [N], names of the samples, by which randomness is drawn.
        kind: of the corruptions.
        seed: of the evaluation.
        size: images at once.
    """
    right = np.zeros((len(images), rendering.SEVERITIES), bool)
    for rows in torch.split(torch.arange(len(images)), size):
        chosen = images[rows]
        pixels = (chosen if chosen.dtype == torch.uint8 else (chosen * 255.0).round().to(torch.uint8)).numpy()
        # A seed or a key may be negative; numpy's seeds are not.
        named = [(seed % 2**64, int(key) % 2**64) for key in keys[rows]]
        for severity in range(1, rendering.SEVERITIES + 1):
            worn = [rendering.corrupt(image, kind, severity, key) for image, key in zip(pixels, named, strict=True)]
            given = torch.from_numpy(np.stack(worn)).float().div_(255.0)
            right[rows.numpy(), severity - 1] = (answer(given) == labels[rows]).numpy()
    return right


def summary(right: dict[str, NDArray[np.bool_]], shape: Iterable[int]) -> dict[str, Any]:
    """Return what `results.json` says of corruptions.

    Args:
        right: by kind, bool [N, 5].
        shape: of an image, [C, H, W].
    """
    _, height, width = shape
    whole = np.stack(list(right.values()))
    return {
        "name": rendering.TITLE,
        "constants": "CIFAR-10-C" if rendering.is_small(height, width) else "ImageNet-C",
        **_mean(whole.mean((0, 2))),
        "kinds": {
            kind: {**_mean(of.mean(1)), "severities": [float(share) for share in of.mean(0)]}
            for kind, of in right.items()
        },
    }


def _mean(shares: NDArray[np.float64]) -> dict[str, Any]:
    """The mean over images of the share of renderings that are right, and its 95 % interval."""
    low, high = interval_over_samples(np.zeros((1, len(shares))), shares[None])
    return {"accuracy": float(shares.mean()), "interval": [max(low, 0.0), high]}
