"""Both heads at once, the second learning the first's confusions: the joint loss in the public code of DH-AT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
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


@objectives.register("reverse_smoothing")
@dataclass(frozen=True)
class ReverseSmoothing(Objective):
    """TRADES on head 1, and head 2 learning from head 1 by reverse smoothing (public code of Jiang et al. 2021).

    With p = softmax(z_1), p' the same on attacked images, s' = softmax(z_2(x')), s = softmax(z_2(x)):

        b_0 CE(z_1, y) + b_1 KL(p || p') + b_2 KL(q_alpha(p') || s') + b_3 KL(q_alpha(p) || s)

    `log_reversed_target` gives q_alpha. alpha is 1.1 where the attack turned head 1, 1.0 where it did not, and 0.9 on
    clean images; images that head 1 gets wrong without attack have no term on s'. The target is made of head 1's
    prediction for the same image, and is no constant: these terms train head 1 too.

    When: to repeat what the authors' public code does, which is not the paper's three stages.

    Paper: none; the public code of Jiang et al. 2021, Dual Head Adversarial Training, arXiv 2104.10377.

    Args:
        clean_weight: b_0.
        divergence: b_1.
        second_adversarial: b_2.
        second_clean: b_3.
        decay_from: finished epochs before the first decay; the next follow every `decay_every`, five in all.
        decay_every: epochs.
        decay_first: factor of b_0 and b_1 at each decay.
        decay_second: factor of b_2 and b_3 at each decay.
    """

    clean_weight: Real = 1.0
    divergence: Real = 1.0
    second_adversarial: Real = 1.0
    second_clean: Real = 0.1
    decay_from: int = 60
    decay_every: int = 10
    decay_first: Real = 0.95
    decay_second: Real = 0.8

    def __post_init__(self) -> None:
        for name in ("clean_weight", "divergence", "second_adversarial", "second_clean", "decay_from"):
            at_least(0, name, getattr(self, name))
        at_least(1, "decay_every", self.decay_every)
        for name in ("decay_first", "decay_second"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name} must lie in (0, 1], got {getattr(self, name):g}")

    def at(self, epoch: int, state: Mapping[str, float]) -> ReverseSmoothing:
        """Return it as in an epoch: at 60, 70, 80, 90 and 100, b_0 and b_1 times 0.95, b_2 and b_3 times 0.8."""
        del state
        decays = min(max((epoch - self.decay_from) // self.decay_every + 1, 0), 5)
        first, second = self.decay_first**decays, self.decay_second**decays
        return dataclasses.replace(
            self,
            clean_weight=self.clean_weight * first,
            divergence=self.divergence * first,
            second_adversarial=self.second_adversarial * second,
            second_clean=self.second_clean * second,
        )

    def needs(self) -> Mapping[str, Need]:
        """Logits of both heads on clean images, then on attacked ones."""
        clean = {head: Logits(head) for head in ("head1", "head2")}
        return {**clean, **{f"{head}_attacked": Logits(head, on=ATTACKED) for head in clean}}

    def inner(self) -> Mapping[str, Inner]:
        """Climb KL(p || p') of head 1."""
        uses = ("head1", "head1_attacked")
        return {ATTACKED: Inner(lambda y, seen: kl_divergence(*(seen[name] for name in uses)), uses=uses, flat=True)}

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the sum above."""
        first, second = seen["head1"], seen["head2"]
        first_adv, second_adv = seen["head1_attacked"], seen["head2_attacked"]
        labels = y if y.dim() == 1 else y.argmax(1)
        right, kept = first.argmax(1) == labels, first_adv.argmax(1) == labels
        alpha = 1.1 - 0.1 * kept.to(first.dtype)
        on_attacked = learn_confusions(first_adv, second_adv, labels, alpha) * right
        on_clean = learn_confusions(first, second, labels, first.new_full(labels.shape, 0.9))
        return LossTerms.sum_of(
            clean=self.clean_weight * F.cross_entropy(first, y),
            divergence=self.divergence * kl_divergence(first, first_adv).mean(),
            second_adversarial=self.second_adversarial * on_attacked.mean(),
            second_clean=self.second_clean * on_clean.mean(),
        )


def log_reversed_target(log_p: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """Logarithm of the target q [B, C]: q_y = p_y, q_k = (1 + b) p_k for k != y, with b = alpha p_y / (1.0001 - p_y).

    Its mass is not 1 but about 1 + alpha p_y.

    Args:
        log_p: log p [B, C].
        y: labels, int64 [B].
        alpha: [B].
    """
    true = log_p.gather(1, y[:, None])
    b = alpha[:, None] * true.exp() / (1.0001 - true.exp())
    log_q: Tensor = (log_p + torch.log1p(b)).scatter(1, y[:, None], true)
    return log_q


def learn_confusions(teacher: Tensor, student: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
    """sum_k q_k log(q_k / s_k) per image [B], q from the teacher's logits [B, C], s = softmax of the student's."""
    log_q = log_reversed_target(teacher.log_softmax(1), y, alpha)
    return (log_q.exp() * (log_q - student.log_softmax(1))).sum(1)
