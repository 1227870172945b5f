"""The paper's aggregator: a small CNN over all pairs of classes (Jiang et al. 2021, arXiv 2104.10377)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor, nn

from dualhead.errors import UserError
from dualhead.heads.aggregators.base import DH_AT, MAX_CLASSES_OF_PAIRWISE_CNN, Aggregator, aggregators

CLASS_FEATURES, PAIR_FEATURES = 8, 16


class PairwiseCNNModule(nn.Module):
    """Head logits [B, H, C] to logits [B, C] through features of every pair of classes.

    With P = C (C - 1) / 2 pairs i < j:

        [B, H, C] -> Conv1d(H, 8, 1), BatchNorm, ReLU -> [B, 8, C]
          the 8 features of class i over the 8 of class j, pair after pair -> [B, 2, 8 P]
          Conv1d(2, 16, 1), BatchNorm -> [B, 16, 8 P], transposed [B, 8 P, 16]
          AvgPool1d(2, 2) -> [B, 8 P, 8], flattened [B, 64 P] -> Linear(64 P, C)

    There is no non-linearity behind the first ReLU, as published: in evaluation mode the pairs therefore only
    parametrise one affine map of the 8 C class features, and that map is what is computed then. The last layer has
    32 C^2 (C - 1) weights: 28,800 at C = 10.

    Args:
        num_classes: C, at least 2.
        heads: H; 2 in the paper.
    """

    def __init__(self, num_classes: int, heads: int = 2) -> None:
        super().__init__()
        first, second = torch.triu_indices(num_classes, num_classes, offset=1)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)
        self.class_conv = nn.Conv1d(heads, CLASS_FEATURES, 1)
        self.class_bn = nn.BatchNorm1d(CLASS_FEATURES)
        self.pair_conv = nn.Conv1d(2, PAIR_FEATURES, 1)
        self.pair_bn = nn.BatchNorm1d(PAIR_FEATURES)
        self.pool = nn.AvgPool1d(2, 2)
        self.fc = nn.Linear(len(first) * CLASS_FEATURES * PAIR_FEATURES // 2, num_classes)

    first: Tensor
    second: Tensor

    def forward(self, head_logits: Tensor) -> Tensor:
        """Return logits [B, C] from head logits [B, H, C]."""
        features = torch.relu(self.class_bn(self.class_conv(head_logits))).transpose(1, 2)  # [B, C, 8]
        if not self.pair_bn.training:
            return F.linear(features.flatten(1), *self._affine_map())
        pairs = torch.stack((features[:, self.first].flatten(1), features[:, self.second].flatten(1)), 1)
        scores = self.pair_bn(self.pair_conv(pairs)).transpose(1, 2)
        logits: Tensor = self.fc(self.pool(scores).flatten(1))
        return logits

    def _affine_map(self) -> tuple[Tensor, Tensor]:
        """Fold all layers behind the class features, in evaluation mode, into weights [C, 8 C] and biases [C]."""
        bn, classes = self.pair_bn, self.fc.out_features
        assert bn.running_mean is not None
        assert bn.running_var is not None
        assert self.pair_conv.bias is not None
        gain = bn.weight * (bn.running_var + bn.eps).rsqrt()
        shift = bn.bias + gain * (self.pair_conv.bias - bn.running_mean)
        pooled = torch.cat((gain[:, None] * self.pair_conv.weight[..., 0], shift[:, None]), 1)  # [16, 3]
        pooled = pooled.view(-1, 2, 3).mean(1)  # [8, 3]: of class i, of class j, and constant
        parts = self.fc.weight.view(classes, -1, CLASS_FEATURES, len(pooled)) @ pooled  # [C, P, 8, 3]
        pairs = torch.stack((self.first, self.second), 1)[..., None]
        of_pairs = (pairs == torch.arange(classes, device=pairs.device)).to(parts.dtype)  # [P, 2, C]
        weight = torch.einsum("kpue,pec->kcu", parts[..., :2], of_pairs)
        return weight.flatten(1), self.fc.bias + parts[..., 2].flatten(1).sum(1)


@aggregators.register("pairwise_cnn")
@dataclass(frozen=True)
class PairwiseCNN(Aggregator):
    """The paper's CNN over all pairs of classes; 2 to 20 classes (its size grows with their cube).

    When: to repeat the paper, up to 20 classes; the default there.

    Paper: Jiang et al. 2021, Dual Head Adversarial Training, arXiv 2104.10377.
    """

    paper: ClassVar[str] = DH_AT

    def create(self, num_classes: int, heads: int = 2) -> nn.Module:
        """See `Aggregator.create`.

        Raises:
            UserError: for more than 20 classes, or fewer than 2.
        """
        if num_classes > MAX_CLASSES_OF_PAIRWISE_CNN:
            weights = 32 * num_classes**2 * (num_classes - 1)
            raise UserError(
                f"aggregator pairwise_cnn would have {weights / 1e6:,.1f} M weights at {num_classes} classes; it is "
                f"meant for up to {MAX_CLASSES_OF_PAIRWISE_CNN}: use aggregator pairwise_shared"
            )
        if num_classes < 2:
            raise UserError(f"aggregator pairwise_cnn needs at least 2 classes, got {num_classes}")
        return PairwiseCNNModule(num_classes, heads)
