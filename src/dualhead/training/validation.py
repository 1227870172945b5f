"""What chooses among the epochs of a stage: accuracy on the held-out part of the training images."""

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
        """`validation_clean` and `validation_robust`, fractions of the held-out images."""
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        logits_fn = arithmetic.wrap(passes.logits)
        with in_eval_mode(passes.model):
            for batch in batches(self.split, self.batch_size, device, group().share_of(len(self.split))):
                streams = Streams.of(self.seed, batch.index).fork("validation")
                x_adv = self.attack(logits_fn, batch.x, batch.y, self.threat, generator=streams)
                with torch.no_grad():
                    right = predictions(logits_fn(batch.x)) == batch.y
                    robust = right & (predictions(logits_fn(x_adv)) == batch.y)
                    counts += torch.stack((right.sum(), robust.sum()))
        group().sum_([counts])
        clean, robust_clean = counts.tolist()
        return {"validation_clean": clean / len(self.split), "validation_robust": robust_clean / len(self.split)}
