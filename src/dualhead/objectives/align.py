"""Alignment: features or logits of an image, clean and under attack, drawn together beside a base method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Final, Literal, cast

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Size, Tensor, nn

from dualhead.components.fields import Real
from dualhead.components.sections import component
from dualhead.errors import UserError
from dualhead.objectives.base import (
    ATTACKED,
    OWN,
    Around,
    Features,
    Logits,
    LossTerms,
    Need,
    Objective,
    Seen,
    kl_divergence,
    objectives,
)
from dualhead.objectives.hybrid import Hybrid

Distance = Literal["cosine", "l2", "kl", "mmd", "domain"]
HYBRID: Final = Hybrid()
_DOMAIN_WIDTH = 100


def pooled(features: Tensor, *, rectify: bool = False) -> Tensor:
    """Features [B, C, ...] averaged over all positions, [B, C]; `rectify`: after ReLU."""
    features = features.relu() if rectify else features
    return features.flatten(2).mean(2) if features.dim() > 2 else features


def cosine_distance(v: Tensor, u: Tensor) -> Tensor:
    """Mean of 1 - cos(v, u) over the rows of [B, C], in [0, 2]."""
    return 1.0 - F.cosine_similarity(v, u, dim=1).mean()


def squared_l2(v: Tensor, u: Tensor) -> Tensor:
    """Mean over the rows of [B, C] of the squared Euclidean distance, divided by C."""
    return F.mse_loss(v, u)


def kl(v: Tensor, u: Tensor) -> Tensor:
    """Mean of KL(softmax(u) || softmax(v)) over the rows of [B, C], in nats."""
    return kl_divergence(u, v).mean()


def mmd(v: Tensor, u: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of two samples [B, C] and [B', C] (Gretton et al. 2012, JMLR 13, eq. 5).

    The kernel is Gaussian, exp(-d^2 / m), with m the mean squared distance between all rows, a constant; the estimate
    is the biased one, at least 0.
    """
    both = torch.cat([v, u])
    squared = (both[:, None] - both[None]).square().sum(2)
    scale = squared.detach().mean().clamp_min(torch.finfo(squared.dtype).tiny)
    kernel = (-squared / scale).exp()
    count = len(v)
    return kernel[:count, :count].mean() + kernel[count:, count:].mean() - 2.0 * kernel[:count, count:].mean()


PAIRED: Final = {"cosine": cosine_distance, "l2": squared_l2, "kl": kl, "mmd": mmd}
"""Distances of what attacked images give (first) from what clean ones give."""


class Predictor(nn.Sequential):
    """Features [B, C, ...] to a prediction [B, C] of other pooled features, through a bottleneck of C / 4."""

    def __init__(self, channels: int) -> None:
        hidden = max(1, channels // 4)
        super().__init__(
            nn.Linear(channels, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )


class DomainHead(nn.Sequential):
    """Features [B, C, ...] to the logits [B, 2] of clean and attacked, as in DIAL."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Linear(channels, _DOMAIN_WIDTH), nn.BatchNorm1d(_DOMAIN_WIDTH), nn.ReLU(), nn.Linear(_DOMAIN_WIDTH, 2)
        )


class AfterPooling(nn.Module):
    """A module [B, C] to [B, C'] for features [B, C, ...], which are rectified if asked, and pooled."""

    def __init__(self, inner: nn.Module, *, rectify: bool) -> None:
        super().__init__()
        self.inner, self.rectify = inner, rectify

    def forward(self, features: Tensor) -> Tensor:
        """Map features [B, C, ...]."""
        made: Tensor = self.inner(pooled(features, rectify=self.rectify))
        return made


@objectives.register("align")
@dataclass(frozen=True)
class Align(Around):
    """A base method's loss + weight * mean over layers D(q(u'), u), u of the clean and u' of the attacked image.

    u and u' are features averaged over all positions, or with `output` logits; q is the predictor, or nothing. D:

        cosine  mean 1 - cos(q(u'), u)
        l2      mean (q(u') - u)^2, over images and channels
        kl      mean KL(softmax(u) || softmax(q(u')))
        mmd     squared maximum mean discrepancy of the batch's q(u') and u, by a Gaussian kernel whose squared width is
                the mean squared distance
        domain  CE(d(u), clean) + CE(d(u'), attacked) for a domain head d, whose gradient comes to the network reversed

    When: as AR-AT (with `balanced` on tied heads as its base, cosine and predictor), as DIAL (`domain` around
    `trades`), or as one of the readings after THAT, not a reproduction, see docs/howto/aligned-heads.md. Pairs that are
    only drawn together can meet in a constant: keep a base method that classifies clean images too.

    Paper: Waseda et al. 2025, Rethinking Invariance Regularization in Adversarial Training, arXiv 2402.14648 (cosine
    with predictor and stopped gradient); Levi et al. 2022, Domain Invariant Adversarial Learning, arXiv 2104.00322
    (domain); Wu et al. 2021, arXiv 2103.13612 (THAT, of which only the abstract could be
    read).

    Args:
        base: the base method, an adversarial one.
        distance: what is descended, D above.
        weight: at least 0; AR-AT takes 30 with ResNet-18 and 100 with WRN-34-10, DIAL 6 on CIFAR-10.
        layers: names of layers in the parts below; their mean counts. Empty: the trunk's features, which cross the cut.
        clean: part in which the layers of clean images are: `trunk`, a head, or `model` for a plain network.
        robust: part in which those of attacked images are.
        output: align the logits of this output in place of features: `head2`, say, or `own` for the one that the stage
            trains.
        predictor: whether u' goes through a predictor, C -> C/4 -> C with batch norm and ReLU, which learns along.
        stop_gradient: whether u is a constant.
        rectify: whether features pass through ReLU first: for layers that are batch norms, as in AR-AT.
        reversal: strength of the reversed gradient, at least 0; `domain` only.
        ramp: epochs p in [0, 1] over which the reversal grows as 2 / (1 + exp(-10 p)) - 1, from epoch to epoch: DIAL
            takes the whole stage. 0: at full strength from the start.
    """

    base: Annotated[Objective, *component(objectives)] = HYBRID
    distance: Distance = "cosine"
    weight: Real = 1.0
    layers: tuple[str, ...] = ()
    clean: str = "trunk"
    robust: str = "trunk"
    output: str | None = None
    predictor: bool = False
    stop_gradient: bool = True
    rectify: bool = False
    reversal: Real = 1.0
    ramp: int = 0

    def __post_init__(self) -> None:
        if not (self.weight >= 0 and self.reversal >= 0 and self.ramp >= 0):
            raise UserError("weight, reversal and ramp must be at least 0")
        if ATTACKED not in self.base.inner():
            raise UserError(f"align needs an adversarial base method; {self.base.registered_name!r} attacks nothing")
        self.refuse_itself("list all layers in one")
        if self.output is not None and (self.layers or self.predictor or self.rectify or self.distance == "domain"):
            raise UserError(
                "output: aligns logits; leave layers, predictor and rectify out, and take another distance than domain"
            )
        if self.predictor and self.distance in ("domain", "mmd"):
            raise UserError(f"predictor: predicts pair by pair, which {self.distance} does not compare; leave it out")
        if self.distance == "domain" and not self.stop_gradient:
            raise UserError("stop_gradient: domain has no target to stop; leave it out")
        if self.distance != "domain" and (self.ramp or self.reversal != 1.0):
            raise UserError(f"reversal and ramp are of distance domain; {self.distance} has no gradient to reverse")
        if len(set(self.layers)) != len(self.layers):
            raise UserError(f"layers: names one twice: {', '.join(self.layers)}")
        if not self.layers and self.output is None and {self.clean, self.robust} != {"trunk"}:
            raise UserError("layers: name layers of the parts clean and robust; only the trunk's features need none")

    @property
    def per_image(self) -> bool:
        """As the base method, but for what compares batches, or normalises by them."""
        return self.base.per_image and self.distance not in ("mmd", "domain") and not self.predictor

    def _pairs(self) -> list[tuple[str, str | None]]:
        """A short name for each layer, and the layer."""
        return [(f"align{number}", layer) for number, layer in enumerate(self.layers or (None,))]

    def needs(self) -> Mapping[str, Need]:
        """Return the aligned features, then the base method's needs, whose logits stay the last ones."""
        own: dict[str, Need] = {}
        if self.output is not None:
            output = OWN if self.output == "own" else self.output
            own = {"align0_clean": Logits(output), "align0_attacked": Logits(output, on=ATTACKED)}
            return {**own, **self.base.needs()}
        domain = self.distance == "domain"
        back = self.reversal if domain else None
        for name, layer in self._pairs():
            head = name if domain or self.predictor else None
            own[f"{name}_clean"] = Features(self.clean, layer=layer, through=name if domain else None, reversal=back)
            own[f"{name}_attacked"] = Features(self.robust, on=ATTACKED, layer=layer, through=head, reversal=back)
        return {**own, **self.base.needs()}

    def heads(self, shapes: Mapping[str, Size]) -> Mapping[str, nn.Module]:
        """Beside those of the base method, a predictor or domain head for each layer."""
        own: dict[str, nn.Module] = {}
        if self.output is None and (self.predictor or self.distance == "domain"):
            kind = DomainHead if self.distance == "domain" else Predictor
            for name, _ in self._pairs():
                own[name] = AfterPooling(kind(shapes[f"{name}_attacked"][0]), rectify=self.rectify)
        return {**self.base.heads(shapes), **own}

    def at(self, epoch: int, state: Mapping[str, float]) -> Objective:
        """Return it with the reversal of this epoch."""
        here = cast("Align", super().at(epoch, state))
        if not self.ramp:
            return here
        share = min(1.0, epoch / self.ramp)
        return replace(here, reversal=self.reversal * float(2.0 * torch.sigmoid(torch.tensor(10.0 * share)) - 1.0))

    def loss(self, y: Tensor, seen: Seen) -> LossTerms:
        """Compute the base method's terms, and `alignment`."""
        base = self.base.loss(y, seen)
        apart = torch.stack([self._apart(seen[f"{n}_clean"], seen[f"{n}_attacked"]) for n, _ in self._pairs()]).mean()
        return base.plus(alignment=self.weight * apart)

    def _apart(self, u: Tensor, v: Tensor) -> Tensor:
        if self.distance == "domain":
            clean, attacked = (torch.full((len(of),), domain, device=of.device) for domain, of in enumerate((u, v)))
            return F.cross_entropy(u, clean) + F.cross_entropy(v, attacked)
        u = u if self.output is not None else pooled(u, rectify=self.rectify)
        v = v if self.output is not None or self.predictor else pooled(v, rectify=self.rectify)
        return PAIRED[self.distance](v, u.detach() if self.stop_gradient else u)
