"""After DDeR, not a reproduction: one router and its score are trained for a threat (arXiv 2509.21392)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from pydantic import PlainValidator
from torch import Tensor

from dualhead.components.fields import Real, above, at_least
from dualhead.data import Stream, Uniform
from dualhead.errors import UserError
from dualhead.names import router_id
from dualhead.objectives.base import (
    ATTACKED,
    CLEAN,
    Features,
    Inner,
    Logits,
    LossTerms,
    Need,
    Objective,
    Seen,
    cross_entropies,
    objectives,
)
from dualhead.objectives.several import Contender, contenders

Rest = Literal["noisy", "mixed"]
NOISE = "noise"


@objectives.register("after_dder")
@dataclass(frozen=True)
class AfterDDeR(Objective):
    """After DDeR, not a reproduction: a stage trains one router of the aggregator `after_dder` against its threat.

    With y_t the router's logits, w its weights of the heads, s_t its score, x' images that are attacked through y_t
    within the stage's threat, and BCE the binary cross-entropy of a score,

        CE(y_t(x'), y) + clean CE(y_t(x), y) + balance CV(sum of w)^2
            + sentinel (BCE(s_t(own), 1) + mean over pseudo-tasks p of BCE(s_t(x_p), 0)) / 2

    Own are x', for the first router also clean images x. Pseudo-tasks stand in for what the router is not to take: for
    later routers x; noisy images x + noise u; mixtures of two images; and, with `old`, clean images that are attacked
    through each old router within its threat, for which its weights are kept and no image. Scores are one against the
    rest, so that later stages leave those of old routers as they are. CV is the deviation of the weights' sums over
    heads divided by their mean (Shazeer et al. 2017, arXiv 1701.06538), on x'.

    The paper's abstract alone could be read. Pseudo-tasks, scores, weights and what trains when are choices of this
    library; the trunk is to be frozen after the first stage, or old routers see other features.

    When: in every stage of a sequence whose model has the aggregator `after_dder`: `train` names the trunk, the heads
    and `router1` first, then the next router, with a head of its own if `experts: grown`.

    Paper: Wang, Wang and Qian 2025, Dynamic Dual-level Defense Routing for Continual Adversarial Training, arXiv
    2509.21392; after its abstract.

    Args:
        router: number of the router that the stage trains, at least 1.
        old: threats of the routers before it, in their order, `[Linf:8/255, {norm: L2, eps: 0.5, attack: pgd-20}]`,
            whose attacks make pseudo-tasks; empty: old attacks are lost, or not used.
        rest: pseudo-tasks made of clean images, `noisy` and `mixed`.
        clean: weight of clean images, at least 0.
        sentinel: weight of the scores, at least 0.
        balance: weight that spreads images over heads, at least 0.
        noise: largest change of a pixel in noisy images, greater than 0.
    """

    router: int = 1
    old: Annotated[tuple[Contender, ...], PlainValidator(lambda specs: specs)] = ()
    rest: tuple[Rest, ...] = ("noisy", "mixed")
    clean: Real = 0.5
    sentinel: Real = 1.0
    balance: Real = 0.01
    noise: Real = 0.1

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "old", contenders(self.old, least=0))
        except UserError as error:
            raise UserError(str(error).replace("among", "old", 1)) from None
        at_least(1, "router", self.router)
        if len(self.old) >= self.router:
            raise UserError(
                f"old: names {len(self.old)} threats, and router {self.router} has {self.router - 1} before it"
            )
        for key in ("clean", "sentinel", "balance"):
            at_least(0, key, getattr(self, key))
        above(0, "noise", self.noise, "0.1 is usual")
        if self.sentinel and not self._others:
            raise UserError(
                "rest: the first router needs pseudo-tasks for its score, noisy or mixed; or set sentinel=0"
            )

    @property
    def per_image(self) -> bool:
        """No: images of a batch are mixed and compete for heads."""
        return not self.balance and not (self.sentinel and "mixed" in self.rest)

    @property
    def _name(self) -> str:
        return router_id(self.router)

    @property
    def _own(self) -> tuple[str, ...]:
        """Images that the router is to take."""
        return (ATTACKED, CLEAN) if self.router == 1 else (ATTACKED,)

    @property
    def _pseudo(self) -> tuple[str, ...]:
        """Images that are attacked through old routers."""
        return tuple(f"old{number}" for number in range(1, len(self.old) + 1))

    @property
    def _others(self) -> tuple[str, ...]:
        """Images that it is to leave to others."""
        return (*(() if self.router == 1 else (CLEAN,)), *self._pseudo, *self.rest)

    def needs(self) -> Mapping[str, Need]:
        """Ask for the router's logits, weights and scores."""
        scored = (*self._own, *self._others) if self.sentinel else ()
        scores = {f"score_{on}": Features(self._name, on, "score") for on in scored}
        weights = {"weights": Features(self._name, ATTACKED, "gate")} if self.balance else {}
        return {**scores, **weights, "clean": Logits(self._name), "attacked": Logits(self._name, ATTACKED)}

    def inner(self) -> Mapping[str, Inner]:
        """Climb the cross-entropy of the router, and of each old one within its threat."""
        found = {ATTACKED: Inner(lambda y, seen: cross_entropies(seen["attacked"], y), uses=("attacked",))}
        for number, (name, old) in enumerate(zip(self._pseudo, self.old, strict=True), 1):
            found[name] = Inner(
                lambda y, seen: cross_entropies(seen["through"], y), uses=(), attack=old.attack, threat=old.threat,
                through={"through": Logits(router_id(number), name)},
            )  # fmt: skip
        return found if self.sentinel else {ATTACKED: found[ATTACKED]}

    def streams(self) -> Mapping[str, Stream]:
        """Draw a number for each value of an image."""
        return {NOISE: Uniform()} if self.rest and self.sentinel else {}

    def views(self, images: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Make noisy and mixed images of the clean ones."""
        if not self.streams():
            return {}
        x, drawn = images[CLEAN], images[NOISE]
        share = 0.25 + 0.5 * drawn.flatten(1)[:, 0].reshape(-1, *(1 for _ in drawn.shape[1:]))
        made = {
            "noisy": (x + self.noise * (2.0 * drawn - 1.0)).clamp(0.0, 1.0),
            "mixed": share * x + (1.0 - share) * x.roll(1, 0),
        }
        return {name: made[name] for name in self.rest}

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the terms, and the share of images whose score has the right sign."""
        terms = {
            "adversarial": F.cross_entropy(seen["attacked"], y),
            "clean": self.clean * F.cross_entropy(seen["clean"], y),
        }
        if self.balance:
            load = seen["weights"].sum(0)
            terms["balance"] = self.balance * load.var(correction=0) / load.mean().square()
        if not self.sentinel:
            return LossTerms.sum_of(**terms)
        own = torch.cat([seen[f"score_{on}"] for on in self._own])
        others = torch.stack([seen[f"score_{on}"] for on in self._others])
        terms["sentinel"] = self.sentinel * (F.softplus(-own).mean() + F.softplus(others).mean()) / 2
        right = ((own > 0).float().mean() + (others <= 0).float().mean()) / 2
        return LossTerms.sum_of(**terms).with_figures(sentinel_right=right)
