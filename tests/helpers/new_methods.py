"""Methods that the contract of objectives is made for, as a user would write them: each a class and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Size, Tensor, nn

from dualhead.attacks import attacks
from dualhead.components.sections import component
from dualhead.data import Stream, streams
from dualhead.objectives import (
    ATTACKED,
    Around,
    Features,
    Inner,
    Logits,
    LossTerms,
    Need,
    Objective,
    Seen,
    objectives,
)
from dualhead.objectives.hybrid import Hybrid
from dualhead.objectives.sat import SAT
from dualhead.threats import ThreatModel

HYBRID, SAT_ALONE = Hybrid(0.5, clean="head1", robust="head2"), SAT()


class Predictor(nn.Sequential):
    """Features [B, C, H, W] to a prediction [B, C] of other features."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 8), nn.BatchNorm1d(8), nn.ReLU(),
            nn.Linear(8, channels),
        )  # fmt: skip


@objectives.register("test_align")
@dataclass(frozen=True)
class Align(Around):
    """Hybrid training over two heads, and attacked features drawn to clean ones through a predictor (as AR-AT)."""

    base: Annotated[Objective, *component(objectives)] = HYBRID
    weight: float = 3.0
    layer: str | None = None
    part: str = "trunk"

    def needs(self) -> Mapping[str, Need]:
        u = Features(self.part, layer=self.layer)
        v = Features(self.part, on=ATTACKED, layer=self.layer, through="predictor")
        return {**self.base.needs(), "u": u, "v": v}

    def heads(self, shapes: Mapping[str, Size]) -> Mapping[str, nn.Module]:
        return {"predictor": Predictor(shapes["v"][0])}

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        apart = 1.0 - F.cosine_similarity(seen["v"], seen["u"].mean((2, 3)).detach()).mean()
        return LossTerms.sum_of(**self.base.loss(y, seen).terms, alignment=self.weight * apart)


@objectives.register("test_energy")
@dataclass(frozen=True)
class Energy(Around):
    """Real images up, images that climb from seeds down, with a curriculum of steps (as DAT, Yin et al. 2026)."""

    base: Annotated[Objective, *component(objectives)] = SAT_ALONE
    weight: float = 0.5
    steps: int = 1
    every: int = 3
    longest: int = 3
    step_size: float = 0.1
    augment_real: bool = True

    def streams(self) -> Mapping[str, Stream]:
        real = {"name": "images", "augment": ["flip"] if self.augment_real else []}
        return {"real": streams.build(real), "seeds": streams.build("gaussian")}

    def needs(self) -> Mapping[str, Need]:
        return {**self.base.needs(), "real": Logits(on="real"), "made": Logits(on="contrast")}

    def inner(self) -> Mapping[str, Inner]:
        def confident(y: Tensor, seen: Seen) -> Tensor:
            return seen["made"].gather(1, y[:, None])[:, 0]

        ascent = attacks.build({"name": "pgd", "steps": self.steps, "step_size": self.step_size, "start": "clean"})
        made = Inner(confident, ("made",), start="seeds", attack=ascent, threat=ThreatModel("L2", 1e3))
        return {**self.base.inner(), "contrast": made}

    def window(self) -> int:
        return self.every

    def begin(self) -> Mapping[str, float]:
        return {"steps": float(self.steps)}

    def at(self, epoch: int, state: Mapping[str, float]) -> Objective:
        return replace(self, steps=int(state["steps"]), base=self.base.at(epoch, state))

    def advance(self, state: Mapping[str, float], means: Mapping[str, float]) -> Mapping[str, float]:
        rises = means["gap"] > -100.0 and state["steps"] < self.longest
        return {"steps": state["steps"] + rises}

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        real, made = seen["real"].logsumexp(1), seen["made"].logsumexp(1)
        energy = self.weight * (F.softplus(-real).mean() + F.softplus(made).mean())
        terms = LossTerms.sum_of(**self.base.loss(y, seen).terms, energy=energy)
        return terms.with_figures(gap=(real - made).detach().mean())


METHODS: Sequence[str] = ("test_align", "test_energy")
"""Names under which they are registered."""
