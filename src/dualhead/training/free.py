"""Free adversarial training: one backward pass for weights and images (Shafahi et al. 2019, NeurIPS)."""

from __future__ import annotations

from typing import cast

import torch
from pydantic import Field
from torch import Tensor

from dualhead.components.fields import Real
from dualhead.components.sections import Section
from dualhead.errors import UserError
from dualhead.threats import Threat, ThreatModel


class Free(Section):
    """Each batch is trained on several times, and the perturbation moves by what the weights' own backward pass gives.

    In place of `attack` (Shafahi et al. 2019, arXiv 1904.12843, algorithm 1): the gradient of the loss to the attacked
    images comes out of the same backward pass as that to the weights, so that a replay costs no more than a step of
    training without attacks, 3 forward equivalents with SAT. The perturbation is carried over, slot by slot of the
    batch, from replay to replay and from batch to batch, and begins at 0. An epoch is `replays` updates a batch: divide
    the epochs by it. The perturbation belongs to a slot and not to an image, so results depend on the batch size, and
    on the number of processes.
    """

    replays: int = Field(8, ge=1)
    """Updates on each batch; 8 is published for CIFAR-10."""
    step_size: Real | None = Field(None, gt=0)
    """Length of the perturbation's step after each update; None: the radius, as published."""

    def check(self, threat: Threat) -> None:
        """Refuse threats that are no norm: what is carried over from image to image is a difference of pixels.

        Raises:
            UserError: naming the threat.
        """
        if not isinstance(threat, ThreatModel):
            raise UserError(f"free carries a change of pixels, and threat {threat.kind} has none; use attack instead")


class CarriedPerturbation:
    """The perturbation of each slot of a batch.

    Args:
        settings: its step.
        threat: ball and box.

    Raises:
        UserError: for a threat that is no norm.
    """

    def __init__(self, settings: Free, threat: Threat) -> None:
        settings.check(threat)
        self._threat = threat
        self._step_size = threat.eps if settings.step_size is None else settings.step_size
        self.delta: Tensor | None = None
        """[B, ...]; None before the first batch, for zeros, as is one of another B."""

    def attacked(self, x: Tensor) -> Tensor:
        """Images [B, ...] under the perturbation, confined to ball and box, as a leaf that takes a gradient."""
        # Where another number of processes goes on, each has another share of the slots.
        fits = self.delta is not None and self.delta.shape == x.shape
        delta = cast("Tensor", self.delta).to(x.device) if fits else torch.zeros_like(x)
        self.delta = delta
        return self._threat.project(x + delta, x).requires_grad_()

    def ascend(self, x: Tensor, attacked: Tensor, taken: Tensor) -> None:
        """A step along the gradient in `attacked.grad`; none where the update of the weights was dropped.

        Args:
            x: images [B, ...].
            attacked: what `attacked` gave for them.
            taken: bool scalar.
        """
        assert attacked.grad is not None and self.delta is not None
        with torch.no_grad():
            moved = self._threat.project(self._threat.ascend(attacked, attacked.grad, self._step_size), x)
            self.delta = torch.where(taken, moved - x, self.delta)
