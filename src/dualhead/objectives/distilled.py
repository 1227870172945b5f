"""Robust distillation of one head into another (Zi et al. 2021, arXiv 2108.07969)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dualhead.components.fields import Real, at_least
from dualhead.errors import UserError
from dualhead.objectives.base import (
    ATTACKED,
    Inner,
    Logits,
    LossTerms,
    Need,
    Objective,
    Seen,
    kl_divergence,
    objectives,
)


@objectives.register("distilled")
@dataclass(frozen=True)
class Distilled(Objective):
    """A head learns what another, trained before and frozen, says of clean images, and to say it under attack too.

    With p = softmax(z_1(x)) of the teacher, which is a constant, s = softmax(z_2(x)) and s' = softmax(z_2(x')) of the
    student:

        KL(p || s) + beta KL(p || s')

    The attack climbs KL(p || s'). Labels are not used: the teacher's soft ones take their place, which hinders a head
    of the same size from fitting few images too closely.

    When: as the stage of head 2, and of further ones, where head 1 is as good as more training makes it; with `deploy:
    mean` the mean of all heads is the result.

    Paper: Zi et al. 2021, Revisiting Adversarial Robustness Distillation: Robust Soft Labels Make Student Better, arXiv
    2108.07969, eq. 5, up to a factor; there the teacher is a larger network and beta 5.

    Args:
        beta: weight of the attacked images, at least 0.
        teacher: a head, or another output of the model that learns nothing meanwhile.
        student: another one.
    """

    beta: Real = 5.0
    teacher: str = "head1"
    student: str = "head2"

    def __post_init__(self) -> None:
        at_least(0, "beta", self.beta, "5 is as published")
        if self.teacher == self.student:
            raise UserError(f"teacher and student are both {self.teacher}; choose two heads")

    def needs(self) -> Mapping[str, Need]:
        """Logits of the teacher on clean images, and of the student on both."""
        return {
            "taught": Logits(self.teacher),
            "clean": Logits(self.student),
            "adv": Logits(self.student, on=ATTACKED),
        }

    def frozen(self) -> Sequence[str]:
        """Keep the teacher as it is."""
        return (self.teacher,)

    def inner(self) -> Mapping[str, Inner]:
        """Climb KL(p || s')."""
        return {ATTACKED: Inner(lambda y, seen: kl_divergence(seen["taught"], seen["adv"]), uses=("taught", "adv"))}

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the sum above."""
        del y
        return LossTerms.sum_of(
            clean=kl_divergence(seen["taught"], seen["clean"]).mean(),
            divergence=self.beta * kl_divergence(seen["taught"], seen["adv"]).mean(),
        )
