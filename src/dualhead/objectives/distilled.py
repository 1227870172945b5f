"""Robust distillation of one head into another (Zi et al. 2021, arXiv 2108.07969)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dualhead.components.fields import Real
from dualhead.errors import UserError
from dualhead.objectives.base import LossTerms, Objective, given, kl_divergence, objectives


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

    clean_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise UserError(f"beta must be at least 0, got {self.beta:g}; 5 is as published")
        if self.teacher == self.student:
            raise UserError(f"teacher and student are both {self.teacher}; choose two heads")
        for name, value in {
            "outputs": (self.teacher, self.student),
            "only_clean": (self.teacher,),
            "teachers": (self.teacher,),
            "attacked": (self.student,),
        }.items():
            object.__setattr__(self, name, value)

    def inner_loss(self, adv_logits: Tensor, clean_logits: Tensor | None, y: Tensor) -> Tensor:
        """KL(p || s') per image, from logits [B, 1, C]: the student's under attack, the teacher's of clean images."""
        del y
        return kl_divergence(given(clean_logits)[:, 0], adv_logits[:, 0])

    def loss(self, clean_logits: Tensor | None, adv_logits: Tensor | None, y: Tensor) -> LossTerms:
        """The sum above, from logits [B, 2, C], the teacher's and the student's."""
        del y
        clean, adv = given(clean_logits), given(adv_logits)
        taught = clean[:, 0].detach()
        return LossTerms.sum_of(
            clean=kl_divergence(taught, clean[:, 1]).mean(),
            divergence=self.beta * kl_divergence(taught, adv[:, 1]).mean(),
        )
