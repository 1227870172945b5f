"""Several outputs of a dual-head model trained at once, each by its own base method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from dualhead.components.fields import Real
from dualhead.components.sections import component
from dualhead.errors import UserError
from dualhead.objectives.base import LossTerms, Objective, given, kl_divergence, objectives
from dualhead.objectives.trades import TRADES

HEADS = ("head1", "head2")
TRADES_6, TRADES_3 = TRADES(6.0), TRADES(3.0)


@objectives.register("joint")
@dataclass(frozen=True)
class Joint(Objective):
    """The weighted sum of base methods on the heads and on the aggregate, from one pass through the trunk.

    With z_1, z_2 the heads' logits, z the aggregate's, and L each base method's loss (in the step's one attack x'):

        w_1 L_1(z_1) + w_2 L_2(z_2) + w L(z) + distillation * mean_i KL(p || p_i) + diversity * mean -log(1 - cos^2)
            + guidance * mean (z_1(x') - z_2(x))^2

    p is the merged prediction (of z, or of the mean of the heads where z has no loss) and a constant in the
    divergence: each head learns from what the two say together, on clean and on attacked images. cos is that of the
    angle between the two heads' predictions of the wrong classes, on attacked images if there are any: for two
    members, -log(1 - cos^2) is the negative logarithm of the ensemble diversity of Pang et al. 2019 (arXiv 1901.08846,
    eq. 4). Guidance pulls head 1's logits of attacked images to head 2's of clean ones, which learn from it too: with a
    head 2 trained naturally this is the boundary guided adversarial training of Cui et al. 2021 (arXiv 2011.11164).

    When: to train both heads and the aggregate in one stage instead of three, or to tie the heads by distillation or
    push them apart by diversity.

    Paper: this project's own composition; the diversity term is that of Pang et al. 2019, arXiv 1901.08846, eq. 4.

    Args:
        head1: base method on head 1; None for no loss there.
        head2: on head 2.
        aggregate: on the aggregate.
        head1_weight: at least 0.
        head2_weight: at least 0.
        aggregate_weight: at least 0.
        attack: whose inner loss the attack climbs: one output's, or the weighted `sum` of those that have one.
        distillation: weight, at least 0.
        diversity: weight, at least 0; published for ensembles as 0.5.
        guidance: weight, at least 0; published as 1. The mean is over images and classes.
    """

    head1: Annotated[Objective, *component(objectives)] | None = TRADES_6
    head2: Annotated[Objective, *component(objectives)] | None = TRADES_3
    aggregate: Annotated[Objective, *component(objectives)] | None = TRADES_6
    head1_weight: Real = 1.0
    head2_weight: Real = 1.0
    aggregate_weight: Real = 1.0
    attack: Literal["aggregate", "head1", "head2", "sum"] = "aggregate"
    distillation: Real = 0.0
    diversity: Real = 0.0
    guidance: Real = 0.0

    def __post_init__(self) -> None:
        weights = ("head1_weight", "head2_weight", "aggregate_weight", "distillation", "diversity", "guidance")
        for name in weights:
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name):g}")
        methods = dict(self._methods())
        if len(methods) < 2:
            raise UserError(
                "joint needs at least two of head1, head2 and aggregate; for one, name its objective itself"
            )
        if self.guidance and not (self.head1 and self.head2 and self.head1.adversarial and self.head2.clean):
            raise UserError(
                "guidance needs an adversarial base method on head1, and on head2 one that sees clean images"
            )
        if any(method.outputs for method in methods.values()):
            raise UserError("joint is made of base methods, which have one output each")
        if (self.distillation or self.diversity) and not set(HEADS) <= methods.keys():
            raise UserError("distillation and diversity need a loss on head1 and on head2")
        climbed = [n for n in methods if self.attack in (n, "sum") and methods[n].adversarial]
        if not climbed and any(method.adversarial for method in methods.values()):
            known = ", ".join(n for n in methods if methods[n].adversarial)
            raise UserError(f"attack: {self.attack} has no adversarial objective; use sum or one of {known}")
        # Which passes are needed depends on the base methods.
        all_passes = bool(self.distillation or self.diversity)
        calm = tuple(n for n in tuple(methods)[:-1] if not methods[n].adversarial)  # the deployed one is judged
        for name, value in {
            "outputs": tuple(methods),
            "attacked": tuple(climbed) or tuple(methods)[-1:],
            "only_clean": () if all_passes else calm,
            "only_attacked": () if all_passes else tuple(n for n in methods if not methods[n].clean),
            "apart": all(method.apart for method in methods.values()),
            "adversarial": any(method.adversarial for method in methods.values()),
            "clean": any(method.clean for method in methods.values()),
            "clean_target": any(methods[n].clean_target for n in climbed),
        }.items():
            object.__setattr__(self, name, value)

    def _methods(self) -> Iterator[tuple[str, Objective]]:
        """Base methods by output, the deployed one last: the aggregate, else head 2 unless head 1 alone is robust."""
        methods = [(n, getattr(self, n)) for n in (*HEADS, "aggregate") if getattr(self, n) is not None]
        yield from sorted(methods, key=lambda item: item[1].adversarial) if self.aggregate is None else methods

    def inner_loss(self, adv_logits: Tensor, clean_logits: Tensor | None, y: Tensor) -> Tensor:
        """The weighted inner losses of the attacked outputs, per image [B], from logits [B, attacked, C]."""
        total = adv_logits.new_zeros(len(adv_logits))
        for index, name in enumerate(self.attacked):
            target = None if clean_logits is None else clean_logits[:, index]
            weight = getattr(self, f"{name}_weight") if self.attack == "sum" else 1.0
            total = total + weight * getattr(self, name).inner_loss(adv_logits[:, index], target, y)
        return total

    def loss(self, clean_logits: Tensor | None, adv_logits: Tensor | None, y: Tensor) -> LossTerms:
        """The sum above; terms are named by output and base method's term, as `head1_divergence`."""
        terms: dict[str, Tensor] = {}
        for index, (name, method) in enumerate(self._methods()):
            clean = clean_logits[:, index] if clean_logits is not None and method.clean else None
            attacked = adv_logits[:, index] if adv_logits is not None and method.adversarial else None
            weight = getattr(self, f"{name}_weight")
            terms |= {f"{name}_{term}": weight * v for term, v in method.loss(clean, attacked, y).terms.items()}
        passes = [logits for logits in (clean_logits, adv_logits) if logits is not None]
        if self.distillation:
            apart = [self._apart(logits) for logits in passes]
            terms["distillation"] = self.distillation * torch.stack(apart).mean()
        if self.diversity:
            terms["diversity"] = self.diversity * alikeness(passes[-1][:, 0], passes[-1][:, 1], y).mean()
        if self.guidance:
            first, second = (self.outputs.index(head) for head in HEADS)
            terms["guidance"] = self.guidance * F.mse_loss(given(adv_logits)[:, first], given(clean_logits)[:, second])
        return LossTerms.sum_of(**terms)

    def _apart(self, logits: Tensor) -> Tensor:
        merged = (logits[:, 2] if self.aggregate is not None else logits.mean(1)).detach()
        return (kl_divergence(merged, logits[:, 0]) + kl_divergence(merged, logits[:, 1])).mean() / 2


def alikeness(first: Tensor, second: Tensor, y: Tensor) -> Tensor:
    """-log(1 - cos^2) of the angle between two predictions of the wrong classes, per image [B], from logits [B, C].

    Args:
        first: logits [B, C] of one head.
        second: of the other.
        y: labels, int64 [B], or shares [B, C] of which the largest counts.
    """
    true = (y if y.dim() == 1 else y.argmax(1))[:, None]
    one, other = (logits.scatter(1, true, -torch.inf).softmax(1) for logits in (first, second))
    cosine = torch.cosine_similarity(one, other, dim=1)
    return -torch.log(1.0 - cosine.square() + 1e-6)
