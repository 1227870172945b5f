"""EWC with an attacked Fisher matrix: weights that old robustness rests on stay (Kirkpatrick et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, cast

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from pydantic import PlainValidator
from torch import Tensor

from dualhead.attacks import Maximiser, maximise_within
from dualhead.components.fields import Real, at_least
from dualhead.components.sections import component
from dualhead.errors import UserError
from dualhead.objectives.base import Around, Before, LossTerms, Objective, Seen, cross_entropies, objectives
from dualhead.objectives.sat import SAT
from dualhead.objectives.several import USUAL, Contender, contenders

_SAT = SAT()
_FISHER, _ANCHOR = "ewc.fisher.", "ewc.anchor."


@objectives.register("ewc")
@dataclass(frozen=True)
class EWC(Around):
    """A base method, and a spring at each weight w, as stiff as the old threat's robustness needs it.

    With w_0 the weights as the stage began, and F the diagonal of the empirical Fisher matrix on images x' that are
    attacked within the threat that was learnt last,

        weight / 2 sum F (w - w_0)^2,   F = mean (d log p(y | x') / dw)^2 + decay F of the stage before

    The attack of the old threat is used once, on the network that has just learnt it, and not in training: this is what
    a run would keep that computes F as the old stage ends. Statistics of batch norm are not weights; `batch_norm:
    frozen` keeps them too.

    When: as the classic of continual learning, to compare with; where old attacks are lost.

    Paper: Kirkpatrick et al. 2017, Overcoming catastrophic forgetting in neural networks, PNAS, arXiv 1612.00796, in
    the online form of Schwarz et al. 2018, Progress & Compress, ICML, arXiv 1805.06370.

    Args:
        old: the threat that was learnt last, `Linf:8/255` or `{norm: L2, eps: 0.5, attack: pgd-20}`; without `attack`
            the stage's is used.
        base: the base method.
        weight: at least 0.
        decay: of what earlier stages remembered, in [0, 1].
        images: training images for F, at least 1.
    """

    old: Annotated[Contender, PlainValidator(lambda spec: spec)] = USUAL[0]
    base: Annotated[Objective, *component(objectives)] = _SAT
    weight: Real = 10.0
    decay: Real = 1.0
    images: int = 500

    def __post_init__(self) -> None:
        try:
            (old,) = contenders((self.old,), least=1)
        except UserError as error:
            raise UserError(str(error).replace("among.0", "old", 1)) from None
        object.__setattr__(self, "old", old)
        at_least(0, "weight", self.weight)
        if not 0 <= self.decay <= 1:
            raise UserError(f"decay must lie in [0, 1], got {self.decay:g}")
        at_least(1, "images", self.images)
        self.refuse_itself()

    def recall(self, before: Before) -> Mapping[str, Tensor]:
        """Find F and w_0; see the class."""
        weights = dict(before.weights)
        fisher = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        count = next(iter(weights.values())).new_zeros(())
        attack = self.old.attack or before.attack
        attack.check(self.old.threat)

        def log_likelihood(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return -F.cross_entropy(before.logits(w, x[None]), y[None])

        gradients_of = torch.func.vmap(torch.func.grad(log_likelihood), in_dims=(None, 0, 0))
        for x, y, streams in before.images(self.images):

            def climb(images: Tensor, labels: Tensor = y) -> Tensor:
                return cross_entropies(before.logits(weights, images), labels)

            attacked = maximise_within(cast("Maximiser", attack), climb, x, self.old.threat, streams)
            for name, gradients in gradients_of(weights, attacked, y).items():
                fisher[name] += gradients.square().sum(0)
            count += len(y)
        before.add_up([*fisher.values(), count])
        found = {f"{_FISHER}{name}": value / count for name, value in fisher.items()}
        for name, value in before.earlier.items():
            if name.startswith(_FISHER):  # also of weights that rest in this stage, for a later one
                found[name] = self.decay * value + found.get(name, 0.0)
        anchors = {f"{_ANCHOR}{name}": weight.clone() for name, weight in weights.items()}
        return {**self.base.recall(before), **found, **anchors}

    def penalty(self, weights: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Compute the term."""
        each = [
            (memory[f"{_FISHER}{name}"] * (weight - memory[f"{_ANCHOR}{name}"]).square()).sum()
            for name, weight in weights.items()
        ]
        return {**self.base.penalty(weights, memory), "ewc": 0.5 * self.weight * torch.stack(each).sum()}

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the base method's loss."""
        return self.base.loss(y, seen)
