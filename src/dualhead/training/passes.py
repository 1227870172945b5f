"""What of a network a stage runs: a frozen prefix, whose results are constants, and the suffix that learns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dualhead.errors import UserError
from dualhead.heads import DualHeadClassifier, depends_on, is_head, mean_of

if TYPE_CHECKING:
    from dualhead.training.stage import Stage

Features = Any
"""What crosses from prefix to suffix: a tensor with one row per image, or a tuple of such."""


def trained_output(parts: Collection[str]) -> str:
    """The output that a stage trains, given the parts that learn: the aggregate, else the last head, else head 1."""
    if "model" in parts:
        return "model"
    if "aggregator" in parts:
        return "aggregate"
    return max(filter(is_head, parts), default="head1", key=lambda head: int(head.removeprefix("head")))


def _heads_of(model: DualHeadClassifier, outputs: Collection[str], left_out: Collection[str] = ()) -> set[str]:
    wanted = [output for output in outputs if output not in left_out]
    return {head for head in model.heads if any(depends_on(output, head) for output in wanted)}


def _merged(
    model: DualHeadClassifier, heads: dict[str, Tensor], outputs: Sequence[str], left_out: Collection[str] = ()
) -> Tensor:
    """Logits [B, outputs, C] from those of heads, 0 for what is left out."""
    wanted, logits = set(outputs) - set(left_out), dict(heads)
    if {"mean", "aggregate"} & wanted:
        every = torch.stack([heads[head] for head in model.heads], 1)
        logits |= {"aggregate": model.aggregate(every)} if "aggregate" in wanted else {}
        logits |= {"mean": mean_of(every)} if "mean" in wanted else {}
    nothing = torch.zeros_like(next(iter(heads.values())))
    return torch.stack([logits[output] if output in wanted else nothing for output in outputs], 1)


class Program:
    """The pass from images to the logits that a stage trains, cut where learning begins.

    The frozen prefix runs without a graph, once an image, whatever uses its result; so the loss's backward pass ends
    where learning begins. Trunk and heads run once, however many outputs there are.

    Args:
        model: a plain classifier, or a dual-head one.
        parts: the parts that learn: `{"model"}`, or some of trunk, head1, head2, ..., aggregator.
        outputs: of a dual-head model, those on which the loss depends, the deployed one last: logits are then
            [B, outputs, C]. None: the one that the parts train, [B, C].
        attacked: likewise those on which the loss of the attack depends.
        only_clean: those of `outputs` whose logits of attacked images are 0 and cost nothing.
        only_attacked: those whose logits of clean images are 0 and cost nothing.
        teachers: those whose logits of clean images the loss of the attack is given; none: `attacked`.
        deployed: the output that is judged; None: the last one.

    Attributes:
        output: the deployed one.
        trained_suffix: from the prefix's result to the logits [B, C] of the last output alone.

    Raises:
        UserError: if the parts are not the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Collection[str],
        outputs: Sequence[str] = (),
        attacked: Sequence[str] = (),
        only_clean: Collection[str] = (),
        only_attacked: Collection[str] = (),
        teachers: Sequence[str] = (),
        deployed: str | None = None,
    ) -> None:
        self.model = model
        self._outputs = tuple(outputs)
        self._only_clean, self._only_attacked = frozenset(only_clean), frozenset(only_attacked)
        self.parts = frozenset(parts)
        trained = outputs[-1] if outputs else trained_output(parts)
        self.output = deployed or trained
        self.prefix: Callable[[Tensor], Features] = lambda x: x
        self.suffix: Callable[[Features], Tensor] = model
        self.trained_suffix: Callable[[Features], Tensor] = model
        self.suffix_of_clean: Callable[[Features], Tensor] = model
        self.suffix_of_attacked: Callable[[Features], Tensor] = model
        self.attacked_suffix: Callable[[Features], Tensor] = model
        self.target_suffix: Callable[[Features], Tensor] = model
        self._final: Callable[[Features], Tensor] = model
        if isinstance(model, DualHeadClassifier):
            model.set_trainable(set(parts))
            if self.parts == {"aggregator"}:
                self.prefix = model.head_logits
            elif "trunk" not in self.parts:
                self.prefix = model.features
            self._final = self._alone(model, self.output)
            self.suffix = self.trained_suffix = self._alone(model, trained)
            self.suffix_of_clean = self.suffix_of_attacked = self.attacked_suffix = self.target_suffix = self.suffix
            if outputs:
                self.suffix = self._suffix(model, outputs)
                self.suffix_of_clean = self._suffix(model, outputs, self._only_attacked)
                self.suffix_of_attacked = self._suffix(model, outputs, self._only_clean)
                self.attacked_suffix = self._suffix(model, attacked)
                self.target_suffix = self._suffix(model, teachers) if teachers else self.attacked_suffix
        elif self.parts != {"model"}:
            raise UserError(f"a model without a second head trains as 'model', not {', '.join(sorted(self.parts))}")

    @classmethod
    def of(cls, model: nn.Module, stage: Stage) -> Self:
        """What of a model a stage runs."""
        wanted = stage.objective
        return cls(
            model, stage.train, wanted.outputs, wanted.attacked, wanted.only_clean, wanted.only_attacked,
            wanted.teachers, stage.deploy,
        )  # fmt: skip

    def _alone(self, model: DualHeadClassifier, output: str) -> Callable[[Features], Tensor]:
        """Logits [B, C] of one output."""
        run = self._suffix(model, (output,))
        return lambda start: run(start)[:, 0]

    def _suffix(
        self, model: DualHeadClassifier, outputs: Sequence[str], left_out: Collection[str] = ()
    ) -> Callable[[Features], Tensor]:
        heads = _heads_of(model, outputs, left_out)

        def run(start: Features) -> Tensor:
            return _merged(model, self._heads(model, self._features(model, start), heads), outputs, left_out)

        return run

    def _features(self, model: DualHeadClassifier, start: Features) -> Features:
        return model.features(start) if "trunk" in self.parts else start

    def _heads(self, model: DualHeadClassifier, features: Features, heads: Collection[str]) -> dict[str, Tensor]:
        if self.parts == {"aggregator"}:
            return dict(zip(model.heads, features.unbind(1), strict=True))
        return {head: model.head(head, features) for head in model.heads if head in heads}

    def clean_and_attacked(self, clean: Features, attacked: Features) -> tuple[Tensor, Tensor]:
        """Logits of both from one forward, in which a head sees only those images that the loss needs it for."""
        count = len(tree_leaves(clean)[0])
        both = tree_map(lambda a, b: torch.cat((a, b)), clean, attacked)
        model = self.model
        if not isinstance(model, DualHeadClassifier) or not (self._only_clean or self._only_attacked):
            logits = self.suffix(both)
            return logits[:count], logits[count:]
        features = self._features(model, both)
        of_clean = _heads_of(model, self._outputs, self._only_attacked)
        of_attacked = _heads_of(model, self._outputs, self._only_clean)
        shared = self._heads(model, features, of_clean & of_attacked)
        first = {head: logits[:count] for head, logits in shared.items()}
        second = {head: logits[count:] for head, logits in shared.items()}
        first |= self._heads(model, tree_map(lambda values: values[:count], features), of_clean - of_attacked)
        second |= self._heads(model, tree_map(lambda values: values[count:], features), of_attacked - of_clean)
        return (
            _merged(model, first, self._outputs, self._only_attacked),
            _merged(model, second, self._outputs, self._only_clean),
        )

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
        self._program = program
        self._joint = joint

    def forward(self, clean: Features | None, attacked: Features | None) -> tuple[Tensor | None, Tensor | None]:
        """Logits [B, C] or [B, outputs, C] for each that is given."""
        program = self._program
        if clean is None or attacked is None or not self._joint:
            return (
                None if clean is None else program.suffix_of_clean(clean).float(),
                None if attacked is None else program.suffix_of_attacked(attacked).float(),
            )
        clean_logits, adv_logits = program.clean_and_attacked(clean, attacked)
        return clean_logits.float(), adv_logits.float()
