"""What attacks climb. Each takes logits [B, C] and labels int64 [B] and gives one number per image [B]."""

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


def kl_from_clean(logits: Tensor, clean: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(logits)) (Zhang et al. 2019, TRADES, eq. 5), with clean logits [B, C]."""
    return F.kl_div(logits.log_softmax(1), clean.log_softmax(1), reduction="none", log_target=True).sum(1)
