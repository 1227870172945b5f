"""Validation, which chooses among the epochs of a stage: accuracy on the held-out part of the training images."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dualhead.attacks import Attack, predictions
from dualhead.data import Split, batches
from dualhead.noise import Streams
from dualhead.system.arithmetic import Arithmetic
from dualhead.system.modes import in_eval_mode
from dualhead.system.processes import group
from dualhead.threats import Threat
from dualhead.training.passes import Passes


@dataclass(frozen=True)
class Validator:
    """Clean and robust accuracy on the held-out part of the training images.

    Args:
        split: the held-out images.
        attack: what decides robust accuracy.
        every: epochs between validations.
        threat: what the adversary may do.
        seed: names the attack's noise, the same at every validation.
        batch_size: images at once.
    """

    split: Split
    attack: Attack
    every: int
    threat: Threat
    seed: int
    batch_size: int = 256

    def __call__(self, passes: Passes, arithmetic: Arithmetic, device: torch.device) -> dict[str, float]:
        """Measure the network as it is.

        Returns:
            Fractions of the held-out images: `validation_clean` and `validation_robust`, those that are right, and
            `validation_largest_answer`, those that get the most frequent answer; 1 means that training has collapsed.
        """
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        answers = torch.zeros(len(self.split.class_names) + 1, dtype=torch.int64, device=device)
        logits_fn = arithmetic.wrap(passes.logits)
        with in_eval_mode(passes.model):
            for batch in batches(self.split, self.batch_size, device, group().share_of(len(self.split))):
                streams = Streams.of(self.seed, batch.index).fork("validation")
                x_adv = self.attack(logits_fn, batch.x, batch.y, self.threat, generator=streams)
                with torch.no_grad():
                    answered = predictions(logits_fn(batch.x))
                    right = answered == batch.y
                    robust = right & (predictions(logits_fn(x_adv)) == batch.y)
                    counts += torch.stack((right.sum(), robust.sum()))
                    # Logits that are no numbers are answered with -1, which is no class: a place of its own.
                    answers += (answered + 1).bincount(minlength=len(answers))
        group().sum_([counts, answers])
        clean, robust_clean = counts.tolist()
        return {
            "validation_clean": clean / len(self.split),
            "validation_robust": robust_clean / len(self.split),
            "validation_largest_answer": int(answers[1:].max()) / len(self.split),
        }
