"""Energy training: a robust classifier that also tells images from what climbs its own logits, as in DAT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, Literal

import numpy as np
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor

from dualhead.attacks import attacks
from dualhead.components.fields import Real, above, at_least
from dualhead.components.sections import component
from dualhead.data import Stream, streams
from dualhead.errors import UserError
from dualhead.objectives.base import (
    OWN,
    Around,
    Inner,
    Labels,
    Logits,
    LossTerms,
    Need,
    Objective,
    Seen,
    objectives,
)
from dualhead.objectives.sat import SAT
from dualhead.threats import Threat, ThreatModel

SAT_ALONE, IMAGES, GAUSSIAN = SAT(), streams.build("images"), streams.build("gaussian")
STREAM = component(streams)
EVERYWHERE = ThreatModel("L2", 1e4)
"""A ball that holds the whole box [0, 1]^d of images up to d = 10^8, so that the box alone bounds the ascent."""
FAR: Final = 3.0
"""Distance of the mean log-sum-exp of training images from 0 from which on training was too short."""


@objectives.register("energy")
@dataclass(frozen=True)
class Energy(Around):
    """A base method's loss, and a binary one that separates images from contrastive samples by their energy.

    With LSE(x) = log sum_y exp f(x)[y], the negative marginal energy, images x+ and contrastive samples x-:

        L_base + weight * (mean softplus(-LSE(x+)) + mean softplus(LSE(x-)))

    Contrastive samples start at seeds and take `steps` normalised steps up f(x)[y], y being the label of x+, within
    the box [0, 1] and nothing else. The number of steps grows by one whenever images are told from samples well enough:
    when the AUC over a window of steps reaches `auc`. The AUC compares f(x+)[y] with f(x-)[y] slot by slot, between an
    image and the sample that climbed the same label. That is the AUC within classes; it is a mean over images, so
    processes and micro-batches add up to the same figure. One step costs as many further passes as `steps`, and two.

    When: for one network that classifies robustly and generates: as a second stage, from adversarially trained weights,
    with `batch_norm: frozen`, a small constant learning rate and an averaged copy of the weights.

    Paper: Yin et al. 2026, Scalable Energy-Based Models via Adversarial Training, arXiv 2510.13872 (DAT). The defaults
    are those of the published code where it differs from the paper: weight 0.5, which is the mean over images and
    samples together, in place of the paper's sum (1), and the ascent of a class logit in place of the marginal energy.

    Args:
        base: the base method.
        weight: of the binary loss, greater than 0: 0.5 as in the published code, 1 for the paper's sum.
        real: the stream of images x+: `images` with an augmentation of its own.
        seeds: the stream where contrastive samples start: `gaussian`, `uniform`, or `images` of another source, whose
            labels are not used.
        climb: `class`, f(x)[y], or `marginal`, LSE(x).
        output: the output that has the energy; the one that the stage trains where none is named.
        step_size: L2 length of a step, greater than 0; 0.1 for images of 32x32, 2 for 224x224.
        start_steps: steps at the start of the stage, at least 0; with 0 steps the samples are the seeds.
        max_steps: the most steps.
        auc: threshold in [0.5, 1]. A lower one lets the steps grow faster, for better samples and less accuracy.
        every: steps of training in a window, at least 1; published as 1000 / batch size, rounded up.
    """

    base: Annotated[Objective, *component(objectives)] = SAT_ALONE
    weight: Real = 0.5
    real: Annotated[Stream, *STREAM] = IMAGES
    seeds: Annotated[Stream, *STREAM] = GAUSSIAN
    climb: Literal["class", "marginal"] = "class"
    output: str = OWN
    step_size: Real = 0.1
    start_steps: int = 0
    max_steps: int = 50
    auc: Real = 0.8
    every: int = 8

    def __post_init__(self) -> None:
        for name in ("weight", "step_size"):
            above(0, name, getattr(self, name))
        if not 0 <= self.start_steps <= self.max_steps:
            raise UserError(
                f"start_steps must be at least 0 and at most max_steps, got {self.start_steps} and {self.max_steps}"
            )
        if not 0.5 <= self.auc <= 1:
            raise UserError(f"auc must lie in [0.5, 1], got {self.auc:g}; 0.8 is as published for CIFAR-10")
        at_least(1, "every", self.every, "8 is as published for batches of 128")
        if not self.base.per_image:
            raise UserError(
                f"energy adds a mean over images, and the loss of {self.base.registered_name!r} is none; use sat, "
                "trades or hybrid"
            )
        if self.real.registered_name != "images":
            raise UserError(f"real must be a stream of images with labels, got {self.real.registered_name}; use images")
        self.refuse_itself("name it once")
        if self.base.window() or self.base.begin():
            raise UserError("energy has a curriculum of its own, and so has its base method; use a base method without")

    @property
    def judged(self) -> str:
        """As the base method."""
        return self.base.judged

    def streams(self) -> Mapping[str, Stream]:
        """Real images and seeds, beside the base method's."""
        return {**self.base.streams(), "real": self.real, "seeds": self.seeds}

    def needs(self) -> Mapping[str, Need]:
        """Return the base method's needs, logits of real images and contrastive samples, and labels of the former."""
        made = "contrast" if self.start_steps else "seeds"
        own: dict[str, Need] = {
            "real": Logits(self.output, "real"),
            "real_y": Labels("real"),
            "made": Logits(self.output, made),
        }
        return {**self.base.needs(), **own}

    def inner(self) -> Mapping[str, Inner]:
        """Return the base method's attack, and the ascent from the seeds unless it has 0 steps."""
        if not self.start_steps:
            return self.base.inner()

        def climbed(y: Tensor, seen: Seen) -> Tensor:
            del y
            return seen["made"].logsumexp(1) if self.climb == "marginal" else _of(seen["made"], seen["real_y"])

        ascent = {"name": "pgd", "steps": self.start_steps, "step_size": self.step_size, "start": "clean"}
        made = Inner(climbed, ("made", "real_y"), start="seeds", attack=attacks.build(ascent), threat=EVERYWHERE)
        return {**self.base.inner(), "contrast": made}

    def threats(self) -> Sequence[Threat | None]:
        """Those of the base method: the ascent of seeds is no attack."""
        return self.base.threats()

    def window(self) -> int:
        """The steps over which the AUC is taken."""
        return self.every

    def begin(self) -> Mapping[str, float]:
        """Return the number of steps of the ascent."""
        return {"steps": float(self.start_steps)}

    def at(self, epoch: int, state: Mapping[str, float]) -> Objective:
        """Return it with the number of steps that has been reached."""
        steps = int(state.get("steps", self.start_steps))
        return replace(self, start_steps=steps, base=self.base.at(epoch, {}))

    def advance(self, state: Mapping[str, float], means: Mapping[str, float]) -> Mapping[str, float]:
        """Take one step more where the AUC over the window reached the threshold."""
        rises = means["auc"] >= self.auc and state["steps"] < self.max_steps
        return {"steps": state["steps"] + rises}

    def checks(self, lines: Sequence[Mapping[str, Any]]) -> Mapping[str, tuple[bool, str]]:
        """Judge the last quarter of the epochs: the AUC at the number of steps reached, and the level of energies."""
        found = dict(self.base.checks(lines))
        last = [line for line in lines if "auc" in line and "lse_real" in line][-max(1, len(lines) // 4) :]
        if not last:
            return found
        auc, level = (float(np.mean([line[key] for line in last])) for key in ("auc", "lse_real"))
        steps = last[-1]["steps"]
        told = f"in the last {len(last)} epochs the AUC is {auc:.2f} at {steps:.0f} of {self.max_steps} steps"
        if auc > 0.95 and steps >= self.max_steps:
            found["curriculum"] = False, f"{told}: raise step_size or max_steps of the objective energy"
        elif auc < 0.5:
            found["curriculum"] = False, f"{told}: samples fool the classifier; raise auc or lower lr"
        else:
            found["curriculum"] = True, told
        far = abs(level) > FAR
        advice = ", far from 0, where it settles: train for longer" if far else ""
        found["energy_level"] = not far, f"the mean log-sum-exp of training images is {level:.2f}{advice}"
        return found

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the base method's terms, and `energy`; figures are `auc`, `steps` and the mean LSE of both."""
        real, made = seen["real"].logsumexp(1), seen["made"].logsumexp(1)
        energy = self.weight * (F.softplus(-real).mean() + F.softplus(made).mean())
        base = self.base.loss(y, seen)
        gap = (_of(seen["real"], seen["real_y"]) - _of(seen["made"], seen["real_y"])).detach()
        # Ties count half, as in every AUC.
        figures = {
            "auc": (gap.sign() + 1.0).mean() / 2.0,
            "steps": gap.new_full((), float(self.start_steps)),
            "lse_real": real.detach().mean(),
            "lse_made": made.detach().mean(),
        }
        return base.plus(energy=energy).with_figures(**figures)


def _of(logits: Tensor, y: Tensor) -> Tensor:
    """Each image's logit of its label [B], from logits [B, C] and labels int64 [B]."""
    return logits.gather(1, y[:, None])[:, 0]
