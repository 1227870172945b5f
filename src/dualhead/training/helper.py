"""A standard model that says how far robustness should reach (HAT; Rade and Moosavi-Dezfooli 2022, ICLR)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from pydantic import Field
from torch import Tensor, nn

from dualhead.components.fields import Real
from dualhead.components.sections import Section
from dualhead.system.arithmetic import Arithmetic
from dualhead.training.passes import Features, Program


class Helper(Section):
    """Beyond the ball, images take the label that a model trained without attacks gives the attacked image.

    With x' the attacked image and f_std that model, the loss gets one term more (section 4 of the paper):

        gamma CE(f(x + stretch (x' - x)), argmax f_std(x'))

    Adversarial training pushes its decision boundary further from the images than the ball asks for, which costs clean
    accuracy; here it is held back where a standard model says that the image has become another class. HAT is this
    beside TRADES with beta 2.5. Images beyond [0, 1] are left so, as published. It costs 4 forward equivalents a step.
    """

    weights: str
    """Of f_std: the name of an earlier stage of the recipe, or a run or exported model."""
    gamma: Real = Field(0.5, ge=0)
    """Weight of the term."""
    stretch: Real = Field(2.0, gt=1)
    """How far out, as a multiple of the perturbation."""


class HelperExamples(NamedTuple):
    """What the term is taken on.

    Args:
        features: what the frozen prefix makes of the images.
        labels: int64 [B].
    """

    features: Features
    labels: Tensor


class HelperTerm:
    """The term for a stage.

    Args:
        settings: its weight and its reach.
        model: f_std; put in evaluation mode.
        program: program of the stage.
        arithmetic: number format of the passes.
    """

    def __init__(self, settings: Helper, model: nn.Module, program: Program, arithmetic: Arithmetic) -> None:
        self._settings, self._program, self._arithmetic = settings, program, arithmetic
        arithmetic.lay_out(model)
        self._label = arithmetic.wrap(model.eval())

    def examples(self, x: Tensor, x_adv: Tensor) -> HelperExamples:
        """From images and attacked images, both [B, ...]."""
        with torch.no_grad():
            labels = self._label(x_adv).argmax(1)
            with self._arithmetic.autocast(x.device):
                features = self._program.constant(x + self._settings.stretch * (x_adv - x))
        return HelperExamples(features, labels)

    def loss(self, examples: HelperExamples) -> Tensor:
        """The term, averaged over the images; of several outputs the last counts, and no other head sees them."""
        with self._arithmetic.autocast(examples.labels.device):
            logits = self._program.trained_suffix(examples.features).float()
        return self._settings.gamma * F.cross_entropy(logits, examples.labels)
