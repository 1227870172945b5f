"""GradAlign: gradients of the loss at an image and beside it drawn to one direction (Andriushchenko et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from dualhead.attacks import RandomPoint
from dualhead.components.fields import Real, at_least
from dualhead.components.sections import component
from dualhead.objectives.base import CLEAN, Around, Inner, LossTerms, Need, Objective, Seen, Slope, objectives
from dualhead.objectives.sat import SAT

SAT_ALONE = SAT()
BESIDE = "beside"
"""Images at a random point of the ball."""


@objectives.register("grad_align")
@dataclass(frozen=True)
class GradAlign(Around):
    """A base method's loss, and a term that aligns gradients within the ball (eq. 4 of the paper).

    With g(x) the gradient of the cross-entropy with respect to the image, and eta uniform in the ball:

        L_base + weight * mean (1 - cos(g(x), g(x + eta)))

    Where the loss is linear within the ball a single step finds its maximum, and training on single steps does not
    overfit catastrophically. As in the published code the term learns through g(x + eta) alone; an image without a
    gradient adds nothing. The method is this around `sat` with `attack: fgsm`. Each gradient is a pass of its own, and
    one of them is differentiated again: a step costs 2.6 times that of its base method.

    When: for single-step training at a large eps, as the cure that others are measured by; `n_fgsm` costs no more than
    FGSM.

    Paper: Andriushchenko and Flammarion 2020, Understanding and Improving Fast Adversarial Training, arXiv 2007.02617,
    eq. 4.

    Args:
        base: the base method, an adversarial one of one output.
        weight: at least 0; published for CIFAR-10 as 0.2 at 8/255, and 0.02 * 10^(255 eps / 8) elsewhere.
    """

    base: Annotated[Objective, *component(objectives)] = SAT_ALONE
    weight: Real = 0.2

    def __post_init__(self) -> None:
        at_least(0, "weight", self.weight, "0.2 is as published for 8/255")
        self.require_attack(one_output=True)
        self.refuse_itself()

    def needs(self) -> Mapping[str, Need]:
        """Return the base method's needs, and gradients at images and beside them."""
        return {**self.base.needs(), "slope": Slope(on=CLEAN, constant=True), BESIDE: Slope(on=BESIDE)}

    def inner(self) -> Mapping[str, Inner]:
        """Return the base method's attack, and a random point of the ball."""
        return {**self.base.inner(), BESIDE: Inner(lambda y, seen: y, uses=(), attack=RandomPoint())}

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the base method's terms, and `alignment`."""
        base = self.base.loss(y, seen)
        apart = _apart(seen["slope"].flatten(1), seen[BESIDE].flatten(1))
        return base.plus(alignment=self.weight * apart.mean())


def _apart(first: Tensor, second: Tensor) -> Tensor:
    """1 - cos of rows [B, D], [B]; 0, without a gradient, where a row is zero."""
    squares = first.square().sum(1), second.square().sum(1)
    some = (squares[0] > 0) & (squares[1] > 0)
    length = torch.where(some, squares[0], 1.0).sqrt() * torch.where(some, squares[1], 1.0).sqrt()
    return torch.where(some, 1.0 - (first * second).sum(1) / length, 0.0)
