"""The mean of the heads' logits: the control that tells the aggregator's merit from the ensemble's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dualhead.heads.aggregators.base import Aggregator, aggregators


class MeanOfHeads(nn.Module):
    """Head logits [B, H, C] to their mean [B, C]; no parameters."""

    def forward(self, head_logits: Tensor) -> Tensor:
        """Return logits [B, C] from head logits [B, H, C]."""
        return head_logits.mean(1)


@aggregators.register("mean")
@dataclass(frozen=True)
class Mean(Aggregator):
    """The mean of the heads' logits, without parameters.

    When: as the control that every trained aggregator must beat; it needs no stage of training.

    Paper: none; an ensemble.
    """

    def create(self, num_classes: int, heads: int = 2) -> nn.Module:
        """See `Aggregator.create`; any number of classes and heads."""
        del num_classes, heads
        return MeanOfHeads()
