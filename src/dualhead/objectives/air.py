"""After AIR: what the network said of noisy and mixed attacked images is kept (Zhou and Hua 2024, arXiv 2404.01828)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from dualhead.components.fields import Real, above, at_least
from dualhead.components.sections import component
from dualhead.data import Stream, Uniform
from dualhead.objectives.base import (
    ATTACKED,
    BEFORE,
    Around,
    Logits,
    LossTerms,
    Need,
    Objective,
    Seen,
    kl_divergence,
    objectives,
)
from dualhead.objectives.sat import SAT

_SAT = SAT()


@objectives.register("air")
@dataclass(frozen=True)
class AIR(Around):
    """A base method, and three terms on images around and between the attacked ones x', without any memory.

    With p and p_0 the predictions of the network and of the network as the stage began, x_n = x' + sigma n for normal
    noise n, and x_m a mixture of two attacked images of the batch at a random ratio:

        isotropic KL(p_0(x_n) || p(x_n)) + anisotropic KL(p_0(x_m) || p(x_m)) + alignment ||f(x_n) - f(x')||_2

    This is after the paper, whose abstract and summaries alone could be read: the form of the last term, the weights
    and sigma are choices of this library.

    When: in a later stage of a sequence, where old attacks are lost and nothing may be stored.

    Paper: Zhou and Hua 2024, Defense without Forgetting: Continual Adversarial Defense with Anisotropic and Isotropic
    Pseudo Replay, CVPR, arXiv 2404.01828.

    Args:
        base: the base method, an adversarial one.
        isotropic: weight on noisy images, at least 0.
        anisotropic: weight on mixed images, at least 0.
        alignment: weight of the distance of logits, at least 0.
        sigma: deviation of the noise in units of a pixel's range, greater than 0.
    """

    base: Annotated[Objective, *component(objectives)] = _SAT
    isotropic: Real = 1.0
    anisotropic: Real = 1.0
    alignment: Real = 0.1
    sigma: Real = 0.05

    def __post_init__(self) -> None:
        for key in ("isotropic", "anisotropic", "alignment"):
            at_least(0, key, getattr(self, key))
        above(0, "sigma", self.sigma, "0.05 is usual")
        self.require_attack()
        self.refuse_itself("raise its weights instead")

    @property
    def per_image(self) -> bool:
        """No: images of a batch are mixed."""
        return False

    def needs(self) -> Mapping[str, Need]:
        """Ask for what the base method needs, and both networks' logits on noisy and on mixed images."""
        own = self.base.judged_output
        asked: dict[str, Need] = {"noisy": Logits(own, "noisy"), "mixed": Logits(own, "mixed")}
        asked |= {f"{name}_before": Logits(BEFORE, name) for name in ("noisy", "mixed")}
        return {**asked, **self.base.needs(), "aligned": Logits(own, ATTACKED)}

    def streams(self) -> Mapping[str, Stream]:
        """Draw a number for each value of an image."""
        return {**self.base.streams(), "noise": Uniform()}

    def views(self, images: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Make noisy and mixed images of the attacked ones."""
        drawn, attacked = images["noise"], images[ATTACKED]
        middle = (drawn.clamp(1e-6, 1 - 1e-6) * 2.0 - 1.0).to(torch.float32)
        noise = math.sqrt(2.0) * torch.erfinv(middle)  # uniform numbers to normal ones
        share = drawn.flatten(1)[:, 0].reshape(-1, *(1 for _ in drawn.shape[1:]))
        mixed = share * attacked + (1.0 - share) * attacked.roll(1, 0)
        return {**self.base.views(images), "noisy": (attacked + self.sigma * noise).clamp(0.0, 1.0), "mixed": mixed}

    def teachers(self) -> Mapping[str, str]:
        """Ask the network as the stage began."""
        return {**self.base.teachers(), BEFORE: BEFORE}

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the base method's terms, and the three."""
        base = self.base.loss(y, seen)
        distance = torch.linalg.vector_norm(seen["noisy"] - seen["aligned"], dim=1)
        return base.plus(
            isotropic=self.isotropic * kl_divergence(seen["noisy_before"], seen["noisy"]).mean(),
            anisotropic=self.anisotropic * kl_divergence(seen["mixed_before"], seen["mixed"]).mean(),
            alignment=self.alignment * distance.mean(),
        )
