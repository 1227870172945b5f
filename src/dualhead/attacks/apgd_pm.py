"""Auto-PGD on the margin of probabilities rather than of logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dualhead.attacks import losses
from dualhead.attacks.apgd import APGD
from dualhead.attacks.base import attacks


@attacks.register("apgd-pm", numbers=("steps",))
@dataclass(frozen=True)
class APGDPM(APGD):
    """Auto-PGD on the probability margin, the loss of the Probability Margin Attack (PMA).

    The loss is the authors'; the ascent is Auto-PGD, with its step sizes and random start, where theirs may differ.
    Written from the abstract and a summary of the paper.

    When: as a second untargeted loss beside the cross-entropy, at the price of one ascent.

    Paper: Xie et al. 2024, Towards Million-Scale Adversarial Robustness Evaluation With Stronger Individual Attacks,
    arXiv 2411.15210.

    Args:
        steps: gradient steps after the start, at least 1; the short form `apgd-pm-50` sets it.
        rho: the step is halved where the loss rose in at most this share of a window's steps; in (0, 1].
        restarts: independent starts, at least 1.
        eot: gradients averaged per step, for models with random outputs, at least 1.
    """

    def loss(self, logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
        """The probability margin."""
        del target
        return losses.probability_margin(logits, y)
