"""Several outputs of a dual-head model trained at once, each by its own base method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from dualhead.components.fields import Real, at_least
from dualhead.components.sections import component
from dualhead.errors import UserError
from dualhead.objectives.base import (
    ATTACKED,
    CLEAN,
    Around,
    Features,
    Inner,
    Logits,
    LossTerms,
    Need,
    Objective,
    Seen,
    kl_divergence,
    objectives,
    under,
)
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
            at_least(0, name, getattr(self, name))
        methods = dict(self._methods())
        if len(methods) < 2:
            raise UserError(
                "joint needs at least two of head1, head2 and aggregate; for one, name its objective itself"
            )
        if self.guidance and not (
            self.head1 and self.head2 and _sees(self.head1, ATTACKED) and _sees(self.head2, CLEAN)
        ):
            raise UserError(
                "guidance needs an adversarial base method on head1, and on head2 one that sees clean images"
            )
        if any(method.outputs or not _is_simple(method) for method in methods.values()):
            raise UserError(
                "joint is made of base methods that are a loss alone on one output, as natural, sat, trades or mart"
            )
        if (self.distillation or self.diversity) and not set(HEADS) <= methods.keys():
            raise UserError("distillation and diversity need a loss on head1 and on head2")
        if not self._climbed() and self._attacks():
            known = ", ".join(n for n in methods if methods[n].adversarial)
            raise UserError(f"attack: {self.attack} has no adversarial objective; use sum or one of {known}")

    def _methods(self) -> Iterator[tuple[str, Objective]]:
        """Base methods by output, the deployed one last: the aggregate, else head 2 unless head 1 alone is robust."""
        methods = [(n, getattr(self, n)) for n in (*HEADS, "aggregate") if getattr(self, n) is not None]
        yield from sorted(methods, key=lambda item: item[1].adversarial) if self.aggregate is None else methods

    def _attacks(self) -> bool:
        return any(method.adversarial for _, method in self._methods())

    def _climbed(self) -> list[str]:
        """Return the outputs whose inner losses the attack climbs."""
        return [name for name, method in self._methods() if self.attack in (name, "sum") and method.adversarial]

    def _seen_on(self) -> list[str]:
        """Return the images that the base methods see, clean ones first."""
        return [on for on in (CLEAN, ATTACKED) if any(_sees(method, on) for _, method in self._methods())]

    @property
    def per_image(self) -> bool:
        """Whether all base methods are."""
        return all(method.per_image for _, method in self._methods())

    def needs(self) -> Mapping[str, Need]:
        """Return each base method's needs under its output's name; of tied heads, all outputs on all images."""
        methods = list(self._methods())
        needs: dict[str, Need] = {}
        for on in (CLEAN, ATTACKED):
            for output, method in methods:
                inside = {n: need for n, need in method.needs().items() if need.on == on}
                needs |= {f"{output}.{n}": need.of(output) for n, need in inside.items()}
            if on in self._seen_on() and (self.distillation or self.diversity):
                needs |= {f"{output}@{on}": Logits(output, on) for output, _ in methods}
        if (
            self._attacks()
        ):  # the deployed output is judged under attack, also where its own loss sees clean images alone
            needs[f"{methods[-1][0]}@{ATTACKED}"] = Logits(methods[-1][0], ATTACKED)
        if self.guidance:
            needs |= {"guided": Logits("head1", ATTACKED), "guide": Logits("head2")}
        return needs

    @property
    def judged(self) -> str:
        """The deployed output, on attacked images if there are any."""
        deployed = list(self._methods())[-1][0]
        of_it = {n: need for n, need in self.needs().items() if isinstance(need, Logits) and need.output == deployed}
        return ([n for n, need in of_it.items() if need.on == ATTACKED] or list(of_it))[-1]

    def inner(self) -> Mapping[str, Inner]:
        """Climb the weighted inner losses of the outputs that are attacked."""
        methods = dict(self._methods())
        inside = {name: methods[name].inner()[ATTACKED] for name in self._climbed()}
        if not inside:
            return {}

        def climbed(y: Tensor, seen: Seen) -> Tensor:
            total = torch.zeros((), device=y.device)
            for name, inner in inside.items():
                weight = getattr(self, f"{name}_weight") if self.attack == "sum" else 1.0
                total = total + weight * inner.loss(y, under(name, seen))
            return total

        uses = [f"{name}.{need}" for name, inner in inside.items() for need in inner.uses]
        return {ATTACKED: Inner(climbed, uses, flat=all(inner.flat for inner in inside.values()))}

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the sum above; terms are named by output and base method's term, as `head1_divergence`."""
        terms: dict[str, Tensor] = {}
        for name, method in self._methods():
            # Views, so that gradients of a base method add up among themselves before those of the ties do.
            own = method.loss(y, {need: value.view_as(value) for need, value in under(name, seen).items()})
            weight = getattr(self, f"{name}_weight")
            terms |= {f"{name}_{term}": weight * value for term, value in own.terms.items()}
        if self.distillation:
            apart = [self._apart(seen, on) for on in self._seen_on()]
            terms["distillation"] = self.distillation * torch.stack(apart).mean()
        if self.diversity:
            last = self._seen_on()[-1]
            terms["diversity"] = self.diversity * alikeness(seen[f"head1@{last}"], seen[f"head2@{last}"], y).mean()
        if self.guidance:
            terms["guidance"] = self.guidance * F.mse_loss(seen["guided"], seen["guide"])
        return LossTerms.sum_of(**terms)

    def _apart(self, seen: Seen, on: str) -> Tensor:
        first, second = (seen[f"{head}@{on}"] for head in HEADS)
        merged = seen[f"aggregate@{on}"] if self.aggregate is not None else torch.stack((first, second), 1).mean(1)
        divergences = [kl_divergence(merged.detach(), logits) for logits in (first, second)]
        return (divergences[0] + divergences[1]).mean() / 2


_AS_IT_TRAINS = ("window", "begin", "at", "advance", "recall", "penalty")
"""What a method may do beside its loss, and `joint` does not ask it for."""


def _is_simple(method: Objective) -> bool:
    """Whether a method is no more than a loss of logits on clean images and on those of the stage's own attack."""
    needs = method.needs().values()
    if {need.on for need in needs} - {CLEAN, ATTACKED} or method.teachers() or method.streams():
        return False
    if any(isinstance(need, Features) and need.through is not None for need in needs):
        return False
    if any(inner.attack is not None or inner.threat is not None for inner in method.inner().values()):
        return False
    changes = any(
        getattr(type(method), name) not in (getattr(Objective, name), getattr(Around, name)) for name in _AS_IT_TRAINS
    )
    return not changes and (not isinstance(method, Around) or _is_simple(method.base))


def _sees(method: Objective, on: str) -> bool:
    return any(need.on == on for need in method.needs().values())


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
