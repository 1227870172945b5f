"""RAMP's logit pairing: what two threats make of an image is drawn together (Jiang and Singh 2024, NeurIPS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F  # noqa: N812  # the field's name for it
from pydantic import PlainValidator
from torch import Tensor

from dualhead.components.fields import Real, at_least
from dualhead.errors import UserError
from dualhead.objectives.base import LossTerms, Seen, cross_entropies, kl_divergence, objectives
from dualhead.objectives.sat import SAT
from dualhead.objectives.several import USUAL, Contender, Several


@objectives.register("ramp")
@dataclass(frozen=True)
class RAMP(Several):
    """Cross-entropy under the worse of two threats, and the predictions under both drawn together.

    With x_1 and x_2 attacked within the first and the second threat, and n the number of images whose x_1 is
    classified correctly:

        mean max(CE(f(x_1), y), CE(f(x_2), y)) + (weight / n) sum over those of KL(p(x_1) || p(x_2))

    The paper's gradient projection, which mixes in natural training epoch by epoch, is not in it.

    When: to keep robustness against the first threat while learning the second, as in fine-tuning a model that stands
    the first.

    Paper: Jiang and Singh 2024, RAMP: Boosting Adversarial Robustness Against Multiple lp Perturbations for Universal
    Robustness, NeurIPS, arXiv 2402.06827; the logit pairing alone.

    Args:
        among: two threats, the one that is kept first; `[Linf:8/255, L1:12]`.
        weight: of the divergence, at least 0; published as 5 from scratch and 1.5 in fine-tuning.
    """

    among: Annotated[tuple[Contender, ...], PlainValidator(lambda specs: specs)] = (USUAL[0], USUAL[2])
    weight: Real = 5.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", SAT())
        super().__post_init__()
        if len(self.among) != 2:
            raise UserError(f"among: names {len(self.among)}, and pairs two threats, as [Linf:8/255, L1:12]")
        at_least(0, "weight", self.weight, "5 is as published")

    @property
    def per_image(self) -> bool:
        """No: the divergence is a mean over the images that are right."""
        return False

    def at(self, epoch: int, state: object) -> RAMP:
        """Return itself."""
        del epoch, state
        return self

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the sum above."""
        first, second = (self.under(place, seen)["q"] for place in range(2))
        labels = y if y.dim() == 1 else y.argmax(1)
        right = (first.argmax(1) == labels).to(first.dtype)
        worse = cross_entropies(first, y).maximum(cross_entropies(second, y)).mean()
        pairing = (kl_divergence(first, second) * right).sum() / right.sum().clamp_min(1.0)
        return LossTerms.sum_of(adversarial=worse, pairing=self.weight * pairing).with_figures(
            **{f"loss_{label}": F.cross_entropy(q, y) for label, q in zip(self.labels, (first, second), strict=True)}
        )
