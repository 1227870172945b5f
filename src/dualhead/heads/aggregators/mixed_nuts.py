"""MixedNUTS: probabilities of a robust and an accurate head, mixed after a non-linear map (Bai et al. 2024)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor, nn

from dualhead.components.fields import Real, above, at_least
from dualhead.errors import UserError
from dualhead.heads.aggregators.base import Aggregator, aggregators

GRID = {
    "alpha": (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.9999),
    "scale": (0.02, 0.1, 0.5, 2.0, 5.0),
    "power": (1.0, 2.5, 4.0),
    "shift": (-1.0, 0.0),
    "temperature": (0.25, 1.0),
}
"""The grid that a fitting stage tries; the settings published for CIFAR-10, CIFAR-100 and ImageNet lie about it."""


class MixedNUTSModule(nn.Module):
    """Head logits [B, 2, C] to logits [B, C]: the logarithm of a mixture of the heads' probabilities.

        h = GELU(LayerNorm(z_1) + c),    q = softmax(s sgn(h) |h|^p),    z = log((1 - alpha) softmax(z_2 / T) + alpha q)

    Its parameters are buffers, saved with the weights; no gradient moves them.

    Args:
        settings: `alpha`, `scale` (s), `power` (p), `shift` (c) and `temperature` (T).
    """

    scale: Tensor
    power: Tensor
    shift: Tensor
    log_odds: Tensor
    temperature: Tensor

    def __init__(self, settings: Mapping[str, float]) -> None:
        super().__init__()
        for name in ("scale", "power", "shift", "log_odds", "temperature"):
            self.register_buffer(name, torch.zeros(()))
        self._own = dict(settings)
        self.assign(settings)

    def candidates(self) -> Sequence[Mapping[str, float]]:
        """Return the settings that it was made with, and a grid."""
        return [self._own, *(dict(zip(GRID, point, strict=True)) for point in itertools.product(*GRID.values()))]

    def assign(self, settings: Mapping[str, float]) -> None:
        """Take these settings over."""
        for name in ("scale", "power", "shift", "temperature"):
            getattr(self, name).fill_(settings[name])
        self.log_odds.fill_(math.log(settings["alpha"] / (1.0 - settings["alpha"])))

    def forward(self, head_logits: Tensor) -> Tensor:
        """Return logits [B, C] from head logits [B, 2, C]."""
        robust, accurate = head_logits.unbind(1)
        clamped = F.gelu(F.layer_norm(robust, robust.shape[1:]) + self.shift)
        mapped = self.scale * clamped.sign() * clamped.abs().pow(self.power)
        # Logarithms throughout: a probability too small for a float still has a logit and a gradient.
        return torch.logaddexp(
            F.logsigmoid(-self.log_odds) + (accurate / self.temperature).log_softmax(1),
            F.logsigmoid(self.log_odds) + mapped.log_softmax(1),
        )


@aggregators.register("mixed_nuts")
@dataclass(frozen=True)
class MixedNUTS(Aggregator):
    """A mixture of the heads' probabilities, head 1 through a non-linear map.

    For a robust head 1 and an accurate head 2, trained naturally or nearly so. A robust head is more confident where
    it is right than where it is wrong, also under attack; the map widens that gap, so that head 2 decides where head 1
    is in doubt and head 1 where it is sure. With LayerNorm over an image's logits:

        h = GELU(LayerNorm(z_1) + c),    q = softmax(s sgn(h) |h|^p),    z = log((1 - alpha) softmax(z_2 / T) + alpha q)

    Nothing is trained. The defaults are those published for CIFAR-10; a stage with `train: [aggregator]` and `fit`
    chooses all five on the held-out images. Two departures keep gradients whole: the paper lets T go to 0, where head 2
    has none (its own attack uses T = 1), and a fit leaves out settings under which a probability underflows. GELU is
    the paper's, too; a ReLU would cut the gradient of the classes that it sets to 0.

    When: for clean accuracy at little cost in robustness, with a head 2 trained for clean accuracy; evaluate it with
    `multihead` too, which attacks the heads one by one.

    Paper: Bai et al. 2024, MixedNUTS: Training-Free Accuracy-Robustness Balance via Nonlinearly Mixed Classifiers,
    arXiv 2402.02263.

    Args:
        alpha: weight of head 1's probabilities, in (0, 1); above 0.5, head 1 overrules head 2 where it is sure.
        scale: s, greater than 0.
        power: p, at least 1.
        shift: c.
        temperature: T, greater than 0.
    """

    alpha: Real = 0.99875
    scale: Real = 5.0
    power: Real = 4.0
    shift: Real = -1.1
    temperature: Real = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise UserError(f"alpha must lie in (0, 1), got {self.alpha:g}")
        at_least(1, "power", self.power, "below it gradients have no bound")
        for name in ("scale", "temperature"):
            above(0, name, getattr(self, name))
        above(-math.inf, "shift", self.shift)

    def create(self, num_classes: int, heads: int = 2) -> nn.Module:
        """See `Aggregator.create`.

        Raises:
            UserError: for fewer than 3 classes, of which a layer norm leaves nothing but the order, and for more than 2
                heads.
        """
        if heads != 2:
            raise UserError(f"aggregator mixed_nuts mixes a robust head and an accurate one, 2 heads; got {heads}")
        if num_classes < 3:
            raise UserError(
                f"aggregator mixed_nuts needs at least 3 classes, got {num_classes}: a layer norm of two logits is "
                "constant, so head 1 would have no gradient; use mean or linear"
            )
        names = ("alpha", "scale", "power", "shift", "temperature")
        return MixedNUTSModule({name: getattr(self, name) for name in names})
