"""One of several threats at a time: drawn evenly, the worst, or the one that the network stands least (E-AT)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import PlainValidator
from torch import Tensor

from dualhead.components.sections import component
from dualhead.noise import Streams
from dualhead.objectives.base import Logits, LossTerms, Objective, Seen, objectives
from dualhead.objectives.sat import SAT
from dualhead.objectives.several import USUAL, Contender, Several

_SAT = SAT()


@objectives.register("any_of")
@dataclass(frozen=True)
class AnyOf(Several):
    """A base method against several threats, of which each step or each image meets one.

    `worst` attacks within all threats and descends, for each image, where the attack's loss came out highest (MAX).
    `uniform` draws one threat for each batch; `adaptive` draws it with probabilities proportional to 1 - a, where a is
    the share of attacked images that the network got right under that threat, over all steps so far (E-AT). Both cost
    what one attack costs. Counts and choice lie in the checkpoint.

    When: `adaptive` for several norms at the cost of one; Croce and Hein train against Linf and L1, and get L2 for
    free. `worst` where training time does not matter.

    Paper: Croce and Hein 2022, Adversarial Robustness against Multiple and Single lp-Threat Models via Quick
    Fine-Tuning of Robust Classifiers, ICML, arXiv 2105.12508 (adaptive); Tramer and Boneh 2019, Adversarial Training
    and Robustness for Multiple Perturbations, arXiv 1904.13000 (worst).

    Args:
        base: the base method, one with one attack.
        among: the threats, `[Linf:8/255, {norm: L1, eps: 12, attack: pgd-20}]`, two or more; without `attack` the
            stage's is used.
        choose: `uniform`, `worst` or `adaptive`.
        seed: of the draws of `uniform` and `adaptive`.
    """

    base: Annotated[Objective, *component(objectives)] = _SAT
    among: Annotated[tuple[Contender, ...], PlainValidator(lambda specs: specs)] = USUAL
    choose: Literal["uniform", "worst", "adaptive"] = "adaptive"
    seed: int = 0

    @property
    def active(self) -> Sequence[int]:
        """All threats, or the one that was drawn for this step."""
        chosen: int | None = getattr(self, "_chosen", None)
        return super().active if chosen is None else [chosen]

    def __eq__(self, other: object) -> bool:
        """Whether the fields are equal, and what was drawn."""
        if not isinstance(other, AnyOf):
            return NotImplemented
        mine, theirs = ((o.base, o.among, o.choose, o.seed, list(o.active)) for o in (self, other))
        return mine == theirs

    __hash__ = None  # type: ignore[assignment]

    def window(self) -> int:
        """A threat is drawn for each step, unless all are attacked."""
        return 0 if self.choose == "worst" else 1

    def begin(self) -> Mapping[str, float]:
        """Nothing counted yet, and the first draw."""
        if self.choose == "worst":
            return {}
        counts = {f"{what}_{label}": 0.0 for label in self.labels for what in ("met", "right")}
        return {"step": 0.0, "choice": float(self._draw(0, counts)), **counts}

    def at(self, epoch: int, state: Mapping[str, float]) -> Objective:
        """Return it with the threat that was drawn."""
        changed = copy.copy(self)
        object.__setattr__(changed, "base", self.base.at(epoch, {}))
        if "choice" in state:
            object.__setattr__(changed, "_chosen", int(state["choice"]))
        return changed

    def advance(self, state: Mapping[str, float], means: Mapping[str, float]) -> Mapping[str, float]:
        """Count what the step met, and draw for the next."""
        counts = {key: state[key] + means[key] for key in state if key not in ("step", "choice")}
        step = state["step"] + 1.0
        return {"step": step, "choice": float(self._draw(int(step), counts)), **counts}

    def probabilities(self, counts: Mapping[str, float]) -> list[float]:
        """The probability of each threat, from how many steps met it and the accuracy under it, added up over these."""
        weights = [1.0] * len(self.among)
        if self.choose == "adaptive":
            weights = [1.0 - counts[f"right_{label}"] / max(counts[f"met_{label}"], 1.0) for label in self.labels]
        total = sum(weights)
        return [weight / total for weight in weights] if total > 0 else [1.0 / len(weights)] * len(weights)

    def _draw(self, step: int, counts: Mapping[str, float]) -> int:
        place = float(Streams.of(self.seed, torch.tensor([step])).fork("threat").uniform(1)[0, 0])
        for number, probability in enumerate(self.probabilities(counts)):
            place -= probability
            if place < 0:
                return number
        return len(self.among) - 1

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the base method's loss under the threat that was drawn, or under each image's worst."""
        if len(self.active) == 1:
            return self._of_one(y, seen)
        climbed = torch.stack([self.climbed(y, seen, place) for place in range(len(self.active))])
        worst = climbed.argmax(0)
        under = [self.under(place, seen) for place in range(len(self.active))]
        rows = torch.arange(len(worst), device=worst.device)
        chosen: dict[str, Tensor] = {
            name: value if under[1][name] is value else torch.stack([one[name] for one in under])[worst, rows]
            for name, value in under[0].items()
        }
        shares = {f"worst_{label}": (worst == n).float().mean() for n, label in enumerate(self.labels)}
        return self.base.loss(y, chosen).with_figures(**shares)

    def _of_one(self, y: Tensor, seen: Seen) -> LossTerms:
        judged: Any = self.base.needs()[self.base.judged]
        assert isinstance(judged, Logits)
        labels = y if y.dim() == 1 else y.argmax(1)
        right = (seen[self.base.judged].argmax(1) == labels).float().mean()
        met = {n: right.new_full((), float(n == self.active[0])) for n in range(len(self.among))}
        figures = {f"met_{label}": met[n] for n, label in enumerate(self.labels)}
        figures |= {f"right_{label}": met[n] * right for n, label in enumerate(self.labels)}
        return self.base.loss(y, seen).with_figures(**figures)
