"""Pairs of classes by one scorer that all pairs share: the paper's idea at a cost linear in the classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dualhead.components.fields import at_least
from dualhead.errors import UserError
from dualhead.heads.aggregators.base import DH_AT, Aggregator, aggregators

CLASS_FEATURES, PAIR_FEATURES = 8, 16


class PairwiseSharedModule(nn.Module):
    """Head logits [B, H, C] to logits [B, C]: their mean, corrected by comparing each class with its rivals.

    As in the paper's aggregator (`pairwise_cnn`), each class gets 8 features from the heads' logits of it, and pairs
    of classes are scored by 16 features of the two classes' features. Here each class i is paired with the k classes j
    that lead the mean m of the heads, and what the pairs say is summed over the rivals:

        f_i  = ReLU(BatchNorm(Conv1d(H, 8, 1)))                          [B, 8, C]
        g_ij = ReLU(U f_i + V f_j + b)                                   [B, 16, C, k]
        z_i  = m_i + r_i . sum_j w_j g_ij,    w_j = p_j - p_(k+1),    p = softmax(m)

    With k >= C (the default at C = 10) the pairs are all pairs, and p_(k+1) is 0. The scorer U, V, b is the same for
    all pairs; which class is meant enters by its read-out r_i, as it does by the rows of the paper's last layer. Unlike
    there, the pair features have a non-linearity, without which a pair says no more than its two classes one by one.

    Gradients reach the logits of every class: by m_i, by f_i and by p. Which classes are the k leading ones changes
    with the input, yet a class enters and leaves with weight 0, so the output has no jumps. r starts at 0: the module
    starts as the mean of the heads.

    Cost: 16 C + 8 H + 296 parameters; about 32 C k multiplications and 16 C k numbers of memory per image, besides a
    top-k: linear in C. At C = 1000, 16 k parameters.

    Args:
        num_classes: C, at least 2.
        rivals: k, at least 1.
        heads: H.
    """

    def __init__(self, num_classes: int, rivals: int, heads: int = 2) -> None:
        super().__init__()
        self.rivals = min(rivals, num_classes)
        self.class_conv = nn.Conv1d(heads, CLASS_FEATURES, 1)
        self.class_bn = nn.BatchNorm1d(CLASS_FEATURES)
        self.own = nn.Linear(CLASS_FEATURES, PAIR_FEATURES)
        self.rival = nn.Linear(CLASS_FEATURES, PAIR_FEATURES, bias=False)
        self.readout = nn.Parameter(torch.zeros(num_classes, PAIR_FEATURES))

    def reset_parameters(self) -> None:
        """Read-outs of 0: the mean of the heads. The layers inside reset themselves."""
        nn.init.zeros_(self.readout)

    def forward(self, head_logits: Tensor) -> Tensor:
        """Return logits [B, C] from head logits [B, H, C]."""
        mean = head_logits.mean(1)
        weights, leading = self._leading(mean)
        features = torch.relu(self.class_bn(self.class_conv(head_logits))).transpose(1, 2)  # [B, C, 8]
        rivals = features.gather(1, leading[:, :, None].expand(-1, -1, CLASS_FEATURES))  # [B, k, 8]
        pairs = torch.relu(self.own(features)[:, None] + self.rival(rivals)[:, :, None])  # [B, k, C, 16]
        said = torch.einsum("bk,bkcf->bcf", weights, pairs)
        logits: Tensor = mean + (said * self.readout).sum(2)
        return logits

    def _leading(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights [B, k] and indices [B, k] of the leading classes; 0 where a class is about to drop out."""
        probabilities = mean.softmax(1)
        if self.rivals == mean.shape[1]:
            values, leading = probabilities.topk(self.rivals, dim=1)
            return values, leading
        values, leading = probabilities.topk(self.rivals + 1, dim=1)
        return values[:, :-1] - values[:, -1:], leading[:, :-1]


@aggregators.register("pairwise_shared", numbers=("rivals",))
@dataclass(frozen=True)
class PairwiseShared(Aggregator):
    """One scorer for all pairs of a class and its leading rivals, for any number of classes from 2.

    When: beyond 20 classes, where it is the default: its cost is linear in the classes.

    Paper: this project's own, after Jiang et al. 2021, Dual Head Adversarial Training, arXiv 2104.10377.

    Args:
        rivals: leading classes with which each class is compared, at least 1; `pairwise_shared-20` sets 20.
    """

    paper: ClassVar[str] = DH_AT
    rivals: int = 10

    def __post_init__(self) -> None:
        at_least(1, "rivals", self.rivals)

    def create(self, num_classes: int, heads: int = 2) -> nn.Module:
        """See `Aggregator.create`.

        Raises:
            UserError: for fewer than 2 classes.
        """
        if num_classes < 2:
            raise UserError(f"aggregator pairwise_shared needs at least 2 classes, got {num_classes}")
        return PairwiseSharedModule(num_classes, self.rivals, heads)
