"""What of a network a stage runs: a frozen prefix, whose results are constants, and the suffix that learns."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dualhead.errors import UserError
from dualhead.heads import DualHeadClassifier, Output

Features = Any
"""What crosses from prefix to suffix: a tensor with one row per image, or a tuple of such."""


def trained_output(parts: Collection[str]) -> str:
    """The output that a stage trains, given the parts that learn: the aggregate, else head 2, else head 1."""
    if "model" in parts:
        return "model"
    if "aggregator" in parts:
        return "aggregate"
    return "head2" if "head2" in parts else "head1"


class Program:
    """The pass from images to the logits that a stage trains, cut where learning begins.

    The frozen prefix runs without a graph, once an image, whatever uses its result; so the loss's backward pass ends
    where learning begins.

    Args:
        model: a plain classifier, or a dual-head one.
        parts: the parts that learn: `{"model"}`, or some of trunk, head1, head2, aggregator.

    Raises:
        UserError: if the parts are not the model's.
    """

    def __init__(self, model: nn.Module, parts: Collection[str]) -> None:
        self.model = model
        self.parts = frozenset(parts)
        self.output = trained_output(parts)
        self.prefix: Callable[[Tensor], Features] = lambda x: x
        self.suffix: Callable[[Features], Tensor] = model
        if isinstance(model, DualHeadClassifier):
            model.set_trainable(set(parts))
            self._cut(model)
        elif self.parts != {"model"}:
            raise UserError(f"a model without a second head trains as 'model', not {', '.join(sorted(self.parts))}")

    def _cut(self, model: DualHeadClassifier) -> None:
        if "trunk" in self.parts:
            self.suffix = model.view(cast("Output", self.output))
        elif self.parts == {"aggregator"}:
            self.prefix, self.suffix = model.head_logits, model.aggregate
        elif self.output == "aggregate":
            self.prefix = model.features
            self.suffix = lambda f: model.aggregate(torch.stack([model.head(1, f), model.head(2, f)], 1))
        else:
            head = 2 if self.output == "head2" else 1
            self.prefix, self.suffix = model.features, lambda f: model.head(head, f)

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, C] of images [B, ...] through prefix and suffix, differentiable to the images."""
        return self.suffix(self.prefix(x))

    def constant(self, x: Tensor) -> Features:
        """The prefix's result, without a graph."""
        with torch.no_grad():
            return self.prefix(x)

    def parameters(self) -> list[nn.Parameter]:
        """What learns."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


class LossForward(nn.Module):
    """Clean and attacked features to both logits: the part of a step that a gradient flows through, as one module.

    Args:
        program: prefix and suffix.
        joint: one forward of both together, with batch-norm statistics of their union; else one after the other.
    """

    def __init__(self, program: Program, *, joint: bool) -> None:
        super().__init__()
        self.model = program.model  # registered, so that a wrapper around this module finds the parameters
        self._suffix = program.suffix
        self._joint = joint

    def forward(self, clean: Features | None, attacked: Features | None) -> tuple[Tensor | None, Tensor | None]:
        """Logits [B, C] for each that is given."""
        if clean is None or attacked is None or not self._joint:
            return (
                None if clean is None else self._suffix(clean).float(),
                None if attacked is None else self._suffix(attacked).float(),
            )
        both = tree_map(lambda a, b: torch.cat((a, b)), clean, attacked)
        clean_logits, adv_logits = self._suffix(both).float().chunk(2)
        return clean_logits, adv_logits
