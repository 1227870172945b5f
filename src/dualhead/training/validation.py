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
        also: further threats; the mean over all of them is the robust accuracy then.
    """

    split: Split
    attack: Attack
    every: int
    threat: Threat
    seed: int
    batch_size: int = 256
    also: tuple[Threat, ...] = ()

    def __call__(self, passes: Passes, arithmetic: Arithmetic, device: torch.device) -> dict[str, float]:
        """Measure the network as it is.

        Returns:
            Fractions of the held-out images: `validation_clean` and `validation_robust`, those that are right (under
            several threats the mean over these, and `validation_robust_1` and so on under each), and
            `validation_largest_answer`, those that get the most frequent answer; 1 means that training has collapsed.
        """
        threats = (self.threat, *self.also)
        counts = torch.zeros(1 + len(threats), dtype=torch.int64, device=device)
        answers = torch.zeros(len(self.split.class_names) + 1, dtype=torch.int64, device=device)
        logits_fn = arithmetic.wrap(passes.logits)
        with in_eval_mode(passes.model):
            for batch in batches(self.split, self.batch_size, device, group().share_of(len(self.split))):
                streams = Streams.of(self.seed, batch.index).fork("validation")
                attacked = [self.attack(logits_fn, batch.x, batch.y, t, generator=streams) for t in threats]
                with torch.no_grad():
                    answered = predictions(logits_fn(batch.x))
                    right = answered == batch.y
                    robust = [(right & (predictions(logits_fn(x_adv)) == batch.y)).sum() for x_adv in attacked]
                    counts += torch.stack((right.sum(), *robust))
                    # Logits that are no numbers are answered with -1, which is no class: a place of its own.
                    answers += (answered + 1).bincount(minlength=len(answers))
        group().sum_([counts, answers])
        clean, *under = counts.tolist()
        each = {f"validation_robust_{n}": count / len(self.split) for n, count in enumerate(under, 1)}
        return {
            "validation_clean": clean / len(self.split),
            "validation_robust": sum(under) / len(under) / len(self.split),
            **(each if self.also else {}),
            "validation_largest_answer": int(answers[1:].max()) / len(self.split),
        }
