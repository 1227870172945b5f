"""Catastrophic overfitting: training on single steps that has learned to withstand single steps alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it

from dualhead.attacks import Maximiser, attacks, maximise_within, predictions
from dualhead.data import Split, batches
from dualhead.noise import Streams
from dualhead.system.arithmetic import Arithmetic
from dualhead.system.modes import in_eval_mode
from dualhead.threats import Threat
from dualhead.training.passes import Passes

WATCHED: Final = 64
"""Images that are looked at after each epoch."""
STEPS: Final = 5
"""Steps of PGD on them, each 2.5 eps / 5."""


@dataclass(frozen=True)
class SingleStepWatch:
    """Accuracy under one step of FGSM and under a few of PGD, on a few images after each epoch.

    Where the loss is nearly linear within the ball both are alike. In catastrophic overfitting (Wong et al. 2020, arXiv
    2001.03994; Andriushchenko and Flammarion 2020, arXiv 2007.02617) the first rises while the second falls, often to 0
    within an epoch. The look costs about 14 forward equivalents an image.

    Args:
        split: held-out images, or training images where there are none; the first 64 are looked at.
        threat: what the stage trains against.
    """

    split: Split
    threat: Threat

    def __call__(self, passes: Passes, arithmetic: Arithmetic, device: torch.device) -> dict[str, float]:
        """Measure the network as it is; no random number is drawn, and buffers stay.

        Returns:
            Fractions of the images that stay right: `watched_fgsm` and `watched_pgd`.
        """
        logits_fn = arithmetic.wrap(passes.logits)
        with in_eval_mode(passes.model):
            (batch,) = batches(self.split, WATCHED, device, slice(WATCHED))
            right = {}
            for name, spec in (
                ("watched_fgsm", {"name": "fgsm"}),
                ("watched_pgd", {"name": "pgd", "steps": STEPS, "start": "clean"}),
            ):
                attack = attacks.build(spec)
                assert isinstance(attack, Maximiser)
                attacked = maximise_within(
                    attack, lambda x: F.cross_entropy(logits_fn(x), batch.y, reduction="none"), batch.x, self.threat,
                    Streams.of(0, batch.index),
                )  # fmt: skip
                with torch.no_grad():
                    right[name] = predictions(logits_fn(attacked)) == batch.y
        return {name: float(stays.float().mean()) for name, stays in right.items()}
