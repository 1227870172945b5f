"""One linear layer over all heads' logits: a simple learned control."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dualhead.heads.aggregators.base import Aggregator, aggregators


class LinearOfHeads(nn.Module):
    """Head logits [B, H, C] to logits [B, C] by one affine map, which starts as the mean of the heads.

    Args:
        num_classes: C; the map has H C^2 + C parameters.
        heads: H.
    """

    def __init__(self, num_classes: int, heads: int = 2) -> None:
        super().__init__()
        self.fc = nn.Linear(heads * num_classes, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset to the mean of the heads."""
        with torch.no_grad():
            heads = self.fc.in_features // self.fc.out_features
            self.fc.weight.copy_(torch.eye(self.fc.out_features).repeat(1, heads) / heads)
            self.fc.bias.zero_()

    def forward(self, head_logits: Tensor) -> Tensor:
        """Return logits [B, C] from head logits [B, H, C]."""
        logits: Tensor = self.fc(head_logits.flatten(1))
        return logits


@aggregators.register("linear")
@dataclass(frozen=True)
class Linear(Aggregator):
    """One affine map from all heads' logits, initialised at their mean.

    When: as the control that is trained: what learning to weigh logits brings without a network.

    Paper: none.
    """

    def create(self, num_classes: int, heads: int = 2) -> nn.Module:
        """See `Aggregator.create`; any number of classes and heads."""
        return LinearOfHeads(num_classes, heads)
