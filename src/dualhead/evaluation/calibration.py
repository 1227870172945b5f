"""Calibration: whether a classifier is right as often as its softmax says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualhead.errors import UserError

BINS = 15
"""Bins of equal width, as Guo et al. (2017) have them."""


def calibration_error(probabilities: Tensor, y: Tensor, bins: int = BINS) -> tuple[float, Tensor]:
    """Compute the expected calibration error in bins of equal width (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    Args:
        probabilities: float [N, K], rows that sum to 1.
        y: labels, int64 [N].
        bins: at least 1.

    Returns:
        The error in [0, 1], and for a reliability diagram one row for each bin [bins, 3]: mean confidence, accuracy and
        number of images; the first two are NaN in an empty bin.

    Raises:
        UserError: if there are no images or bins.
    """
    if bins < 1 or not len(y):
        raise UserError(f"calibration needs images and at least 1 bin, got {len(y)} images and {bins} bins")
    confidence, guess = probabilities.double().cpu().max(1)
    right = (guess == y.cpu()).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bins (low, high], as published
    table = torch.zeros(bins, 3, dtype=torch.float64)
    for column, values in enumerate((confidence, right, torch.ones_like(right))):
        table[:, column].index_add_(0, place, values)
    count = table[:, 2]
    error = ((table[:, 0] - table[:, 1]).abs() / len(y)).sum()
    table[:, :2] /= count[:, None]
    return float(error), table


def calibration(logits: Tensor, labels: Tensor) -> dict[str, Any] | None:
    """Return the calibration on clean images, as `results.json` holds it.

    Args:
        logits: of the clean images, float [N, K].
        labels: int64 [N].

    Returns:
        `error`, the expected calibration error in [0, 1]; and `bins`, of those bins that hold images, in order:
        `confidence`, the mean probability of the predicted class, `accuracy` and `images`. None where a logit is not
        a number or overflows, since no probability follows from it.
    """
    probabilities = logits.double().cpu().softmax(1)
    if not bool(probabilities.isfinite().all()):
        return None
    error, table = calibration_error(probabilities, labels)
    held = [
        {"confidence": confidence, "accuracy": accuracy, "images": int(images)}
        for confidence, accuracy, images in table.tolist()
        if images
    ]
    return {"error": error, "bins": held}
