"""One update: attack the batch, one forward, one backward, one step of the optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dualhead.attacks import Maximiser
from dualhead.data import Batch
from dualhead.noise import Streams
from dualhead.runtime import Arithmetic, in_eval_mode
from dualhead.threat import ThreatModel
from dualhead.training.guard import StepGuard
from dualhead.training.program import Features, LossForward, Program
from dualhead.training.stage import Stage


@dataclass(frozen=True)
class StepOutcome:
    """What a step leaves for the log, as tensors on the device: reading them is up to the log."""

    terms: dict[str, Tensor]
    """Scalars: the loss and its parts."""
    taken: Tensor
    """Whether the update was made: bool scalar, False where loss or gradient was not finite."""
    correct: Tensor
    """How many of the batch's images, attacked if the objective attacks, were classified correctly."""


class TrainingStep:
    """The step of a stage, with as few passes as its objective allows.

    The clean target of an objective is computed once a batch; the attack asks for input gradients only; a frozen
    prefix is run once for the clean batch and once for the attacked one.

    Args:
        program: what of the network runs.
        stage: objective, attack and their settings.
        threat: ball and box.
        optimiser: over `program.parameters()`.
        arithmetic: number format of the passes.
        forward: `LossForward` of the program, or a wrapper around it.

    Attributes:
        guard: drops updates that are not finite, and counts them.
    """

    def __init__(
        self,
        program: Program,
        stage: Stage,
        threat: ThreatModel,
        optimiser: torch.optim.Optimizer,
        arithmetic: Arithmetic,
        forward: nn.Module | None = None,
    ) -> None:
        self._program = program
        self._stage = stage
        self._threat = threat
        self._optimiser = optimiser
        self._arithmetic = arithmetic
        self.guard = StepGuard(program.model, optimiser)
        self._forward = forward or LossForward(program, joint=stage.forward == "joint")

    def __call__(self, batch: Batch, streams: Streams) -> StepOutcome:
        """Train on a batch.

        Args:
            batch: images float32 [B, C, H, W] in [0, 1] and labels int64 [B].
            streams: the randomness of these samples in this epoch.
        """
        objective = self._stage.objective
        self._program.model.train()
        x = self._arithmetic.images(batch.x)
        with self._arithmetic.autocast(x.device):
            clean = self._program.constant(x) if objective.clean or objective.clean_target else None
        attacked = None
        if objective.adversarial:
            x_adv = self._attack(x, clean, batch.y, streams)
            with self._arithmetic.autocast(x.device):
                attacked = self._program.constant(x_adv)
        self.guard.remember()
        with self._arithmetic.autocast(x.device):
            clean_logits, adv_logits = self._forward(clean if objective.clean else None, attacked)
        terms = objective.loss(clean_logits, adv_logits, batch.y)
        self._optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(terms.total)
        taken = self.guard.step(terms.total)
        judged = clean_logits if adv_logits is None else adv_logits
        return StepOutcome(
            {"loss": terms.total.detach(), **{name: term.detach() for name, term in terms.terms.items()}},
            taken,
            (cast("Tensor", judged).argmax(1) == batch.y).sum(),
        )

    def _attack(self, x: Tensor, clean: Features | None, y: Tensor, streams: Streams) -> Tensor:
        if self._stage.attack_mode == "train":
            return self._climb(x, clean, y, streams)
        with in_eval_mode(self._program.model):
            return self._climb(x, clean, y, streams)

    def _climb(self, x: Tensor, clean: Features | None, y: Tensor, streams: Streams) -> Tensor:
        objective, target = self._stage.objective, None
        if objective.clean_target:
            with torch.no_grad(), self._arithmetic.autocast(x.device):
                target = self._program.suffix(clean).float()
        attack = cast("Maximiser", self._stage.attack)
        logits_fn = self._arithmetic.wrap(self._program.logits)
        return attack.maximise(logits_fn, x, lambda z: objective.inner_loss(z, target, y), self._threat, streams)
