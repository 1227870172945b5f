"""What of a network a stage runs: a frozen prefix, whose results are constants, and the suffix that learns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dualhead.errors import UserError
from dualhead.heads import PARTS_OF, DualHeadClassifier, Output

if TYPE_CHECKING:
    from dualhead.training.stage import Stage

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
    where learning begins. Trunk and heads run once, however many outputs there are.

    Args:
        model: a plain classifier, or a dual-head one.
        parts: the parts that learn: `{"model"}`, or some of trunk, head1, head2, aggregator.
        outputs: of a dual-head model, those on which the loss depends, the deployed one last: logits are then
            [B, outputs, C]. None: the one that the parts train, [B, C].
        attacked: likewise those on which the loss of the attack depends.

    Attributes:
        output: the deployed one.

    Raises:
        UserError: if the parts are not the model's.
    """

    def __init__(
        self, model: nn.Module, parts: Collection[str], outputs: Sequence[str] = (), attacked: Sequence[str] = ()
    ) -> None:
        self.model = model
        self.parts = frozenset(parts)
        self.output = outputs[-1] if outputs else trained_output(parts)
        self.prefix: Callable[[Tensor], Features] = lambda x: x
        self.suffix: Callable[[Features], Tensor] = model
        self.attacked_suffix: Callable[[Features], Tensor] = model
        self._final: Callable[[Features], Tensor] = model
        if isinstance(model, DualHeadClassifier):
            model.set_trainable(set(parts))
            if self.parts == {"aggregator"}:
                self.prefix = model.head_logits
            elif "trunk" not in self.parts:
                self.prefix = model.features
            self._final = self._suffix(model, (self.output,), stacked=False)
            self.suffix = self._suffix(model, outputs, stacked=True) if outputs else self._final
            self.attacked_suffix = self._suffix(model, attacked, stacked=True) if outputs else self._final
        elif self.parts != {"model"}:
            raise UserError(f"a model without a second head trains as 'model', not {', '.join(sorted(self.parts))}")

    @classmethod
    def of(cls, model: nn.Module, stage: Stage) -> Self:
        """What of a model a stage runs."""
        return cls(model, stage.train, stage.objective.outputs, stage.objective.attacked)

    def _suffix(
        self, model: DualHeadClassifier, outputs: Sequence[str], *, stacked: bool
    ) -> Callable[[Features], Tensor]:
        used = {part for output in outputs for part in PARTS_OF[cast("Output", output)]}

        def run(start: Features) -> Tensor:
            if self.parts == {"aggregator"}:
                heads = dict(zip(("head1", "head2"), start.unbind(1), strict=True))
            else:
                features = model.features(start) if "trunk" in self.parts else start
                heads = {f"head{n}": model.head(n, features) for n in (1, 2) if f"head{n}" in used}
            if {"mean", "aggregate"} & set(outputs):
                both = torch.stack((heads["head1"], heads["head2"]), 1)
                heads |= {"aggregate": model.aggregate(both)} if "aggregate" in outputs else {}
                heads |= {"mean": both.mean(1)} if "mean" in outputs else {}
            return torch.stack([heads[output] for output in outputs], 1) if stacked else heads[outputs[0]]

        return run

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, C] of the deployed output for images [B, ...], differentiable to the images."""
        return self._final(self.prefix(x))

    def attacked_logits(self, x: Tensor) -> Tensor:
        """Logits [B, C] or [B, outputs, C] that the loss of the attack is a function of."""
        return self.attacked_suffix(self.prefix(x))

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
        """Logits [B, C] or [B, outputs, C] for each that is given."""
        if clean is None or attacked is None or not self._joint:
            return (
                None if clean is None else self._suffix(clean).float(),
                None if attacked is None else self._suffix(attacked).float(),
            )
        both = tree_map(lambda a, b: torch.cat((a, b)), clean, attacked)
        clean_logits, adv_logits = self._suffix(both).float().chunk(2)
        return clean_logits, adv_logits
