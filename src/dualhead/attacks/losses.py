"""Losses that attacks climb. Each takes logits [B, C] and labels int64 [B] and gives one number per image [B]."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax(z)_y."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{i != y} z_i - z_y (Carlini and Wagner 2017, loss f6): greater than 0 exactly where misclassified."""
    true = logits.gather(1, y[:, None])[:, 0]
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - true


def probability_margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{i != y} p_i - p_y of the probabilities p = softmax(z) (Xie et al. 2024, arXiv 2411.15210), in [-1, 1]."""
    return margin(logits.softmax(1), y)


def kl_from_clean(logits: Tensor, clean: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(logits)) (Zhang et al. 2019, TRADES, eq. 5), with clean logits [B, C]."""
    return F.kl_div(logits.log_softmax(1), clean.log_softmax(1), reduction="none", log_target=True).sum(1)


def targeted_margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """z_t - z_y, with target classes t int64 [B]."""
    pair = logits.gather(1, torch.stack((target, y), 1))
    return pair[:, 0] - pair[:, 1]


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, -(z_y - max_{i != y} z_i) / (z_(1) - z_(3)), with z_(k) the k-th largest.

    Croce and Hein 2020, Reliable evaluation, eq. 6. It does not change when the logits are scaled or shifted. Needs 3
    classes.
    """
    top = logits.topk(3, 1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Targeted difference of logits ratio, -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2), target classes int64 [B].

    Croce and Hein 2020, Reliable evaluation, eq. 7. Needs 4 classes.
    """
    top = logits.topk(4, 1).values
    return targeted_margin(logits, y, target) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


def dlr_to(logits: Tensor, target: Tensor) -> Tensor:
    """(z_t - max_{i != t} z_i) / (z_(1) - (z_(3) + z_(4)) / 2): greater than 0 exactly where the target is the answer.

    As long as the label has the highest other logit this is `targeted_dlr`, which stops caring about third classes once
    the label is beaten. Needs 4 classes; with fewer the ratio would be flat where the target comes last.
    """
    top = logits.topk(4, 1).values
    return -margin(logits, target) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)
