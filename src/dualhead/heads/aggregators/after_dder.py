"""After DDeR, not a reproduction: routers over the heads, and a sentinel over the routers (arXiv 2509.21392)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Size, Tensor, nn
from torch.utils._pytree import tree_leaves

from dualhead.components.fields import Real, above, at_least
from dualhead.errors import UserError
from dualhead.heads.aggregators.base import Aggregator, SeesFeatures, aggregators
from dualhead.names import router_id

MOST_ROUTERS: Final = 99
_NEVER: Final = -1e4
"""Score of a router that was never trained: its weight is 0, and its logarithm still a number."""


def pooled(features: Any) -> Tensor:
    """Return features [B, D] of what crosses the cut: means over pixels of [B, D, ...] or over tokens of [B, N, D].

    Several tensors are pooled one by one and lie side by side.
    """
    return torch.cat([_pooled(tensor) for tensor in tree_leaves(features)], 1)


def _pooled(features: Tensor) -> Tensor:
    if features.dim() == 2:
        return features
    return features.mean(1) if features.dim() == 3 else features.flatten(2).mean(2)


def width(shapes: Sequence[Size]) -> int:
    """Return D of `pooled`, given the shapes of one image's features.

    Raises:
        UserError: for features without a dimension.
    """
    if any(len(shape) == 0 for shape in shapes):
        raise UserError("aggregator after_dder needs features to route by, and one number crosses the cut")
    return sum(shape[1] if len(shape) == 2 else shape[0] for shape in shapes)


class Gate(nn.Module):
    """Weights of the heads from pooled features: a linear map, and a softmax over its largest values.

    Args:
        features: D.
        heads: H.
        top: heads with a weight other than 0, at most `known`.
        known: so many of the heads, from the first on, may have one.
    """

    def __init__(self, features: int, heads: int, top: int, known: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, known)
        self.heads, self.top = heads, top

    def forward(self, features: Tensor) -> Tensor:
        """Return weights [B, H] that sum to 1, from features [B, D]."""
        given: Tensor = self.linear(features)
        values, places = given.topk(self.top, dim=1)
        return given.new_zeros(given.shape[0], self.heads).scatter(1, places, values.softmax(1))


class Router(SeesFeatures):
    """A gate over the heads, and the score that tells how far an image is one for it.

    With weights w of the gate, head logits z_k and the score s, its logits are

        u = log softmax(sum_k w_k z_k) + s

    so that s is the logarithm of the sum of their exponentials, while predictions and losses that do not depend on a
    constant are those of the mixture.

    Args:
        features: D, width of pooled features.
        heads: H.
        top: heads with a weight other than 0, at most `known`.
        known: so many of the heads, from the first on, are mixed.
    """

    trained: Tensor
    """1 once it ran in training mode, int64 scalar: until then it has no share in what is deployed."""

    def __init__(self, features: int, heads: int, top: int, known: int) -> None:
        super().__init__()
        self.known = known
        self.gate = Gate(features, heads, top, known)
        self.score = nn.Linear(features, 1)
        self.register_buffer("trained", torch.zeros((), dtype=torch.int64))

    def forward(self, head_logits: Tensor, features: Any) -> Tensor:
        """Return u [B, C]; see `SeesFeatures.forward`."""
        return self._parts(head_logits, features)[0]

    def _parts(self, head_logits: Tensor, features: Any) -> tuple[Tensor, Tensor]:
        if self.training:
            self.trained.fill_(1)
        seen = pooled(features)
        weights: Tensor = self.gate(seen)
        mixed = torch.einsum("bh,bhc->bc", weights[:, : self.known], head_logits[:, : self.known])
        return mixed.log_softmax(1) + self.score(seen), weights

    def look(self, features: Any) -> None:
        """See `SeesFeatures.look`."""
        seen = pooled(features)
        self.gate(seen)
        self.score(seen)

    def shown(self, head_logits: Tensor, features: Any) -> Tensor:
        """Return the heads' logits with the logarithms of their weights, and its own."""
        logits, weights = self._parts(head_logits, features)
        return torch.cat((_with_shares(head_logits, weights), logits[:, None]), 1)


class AfterDDeRModule(SeesFeatures):
    """Routers, and the sentinel that weighs them by their scores.

    With u_t the logits of router t, see `Router`, and s_t its score, over the routers that were trained,

        v = softmax(s / temperature),    logits = sum_t v_t u_t

    Args:
        features: D, width of pooled features.
        heads: H.
        known: how many heads each router mixes, from the first on; as many numbers as routers.
        top: heads with a weight other than 0 in a router, at most.
        temperature: of the sentinel, greater than 0.
        routing: `soft`; `hard`, the router of the highest score alone, with the gradient of `soft`; or `uniform`.
    """

    def __init__(
        self, features: int, heads: int, known: Sequence[int], top: int, temperature: float, routing: str = "soft"
    ) -> None:
        super().__init__()
        self.routers = _names(len(known))
        self.temperature, self.routing = temperature, routing
        for name, count in zip(self.routers, known, strict=True):
            self.add_module(name, Router(features, heads, min(top, count), count))

    def evenly(self) -> AfterDDeRModule:
        """See `SeesFeatures.evenly`."""
        other = copy.copy(self)
        other.routing = "uniform"
        return other

    def _each(self) -> list[Router]:
        return [router for router in self.children() if isinstance(router, Router)]

    def logarithms(self, logits: Tensor) -> Tensor:
        """Return log v [B, T] of the sentinel, from the routers' logits [B, T, C]; with `uniform`, of equal weights."""
        trained = torch.stack([router.trained for router in self._each()]) > 0
        scores = logits.logsumexp(2) / self.temperature
        if self.routing == "uniform":
            scores = torch.zeros_like(scores)
        return torch.where(trained, scores, _NEVER).log_softmax(1)

    def merged(self, logits: Tensor) -> Tensor:
        """Return logits [B, C] from those of the routers [B, T, C]."""
        weights = self.logarithms(logits).exp()
        if self.routing == "hard":
            largest = torch.zeros_like(weights).scatter(1, weights.argmax(1, keepdim=True), 1.0)
            weights = largest + (weights - weights.detach())
        return (weights[:, :, None] * logits).sum(1)

    def forward(self, head_logits: Tensor, features: Any) -> Tensor:
        """See `SeesFeatures.forward`."""
        return self.merged(torch.stack([router(head_logits, features) for router in self._each()], 1))

    def shown(self, head_logits: Tensor, features: Any) -> Tensor:
        """Return logits of heads, routers and the whole; the first two with their share as sum of exponentials.

        A head's share is the weight that the routers give it, each weighed by the sentinel.
        """
        seen = pooled(features)
        logits = torch.stack([router(head_logits, features) for router in self._each()], 1)
        logarithms = self.logarithms(logits)
        gates = torch.stack([router.gate(seen) for router in self._each()], 1)  # [B, T, H]
        shares = torch.einsum("bt,bth->bh", logarithms.exp(), gates)
        own = logits - logits.logsumexp(2, keepdim=True) + logarithms[:, :, None]
        return torch.cat((_with_shares(head_logits, shares), own, self.merged(logits)[:, None]), 1)


def _with_shares(head_logits: Tensor, shares: Tensor) -> Tensor:
    """Logits [B, H, C] whose sum of exponentials is a head's share [B, H]; of a share of 0, next to nothing."""
    least = torch.finfo(shares.dtype).tiny
    return head_logits.log_softmax(2) + shares.clamp_min(least).log()[:, :, None]


def _names(routers: int) -> tuple[str, ...]:
    return tuple(map(router_id, range(1, routers + 1)))


@aggregators.register("after_dder", numbers=("routers",))
@dataclass(frozen=True)
class AfterDDeR(Aggregator):
    """After DDeR, not a reproduction: a router for each threat mixes the heads, and a sentinel weighs the routers.

    Heads are the experts: `shared`, all of them mixed by every router; or `grown`, so that router t mixes the first
    H - T + t and each threat can add a head without a change of what earlier routers say. With h the pooled features of
    the trunk and z_k the heads' logits, router t gives

        w_t = softmax of the `top` largest of W_t h + b_t,    y_t = sum_k w_tk z_k,    s_t = a_t h + c_t

    and the whole is sum_t v_t y_t with v = softmax(s / temperature) over the routers that have been trained. A router
    is a part, `router1` and so on, which a stage trains alone (objective `after_dder`), and an output, so that each is
    measured by itself. The paper's abstract alone could be read: pooling, linear gates, scores one against the rest
    and all else that it leaves open are choices of this library.

    Soft weights let gradients through. `hard` takes the router of the highest score, with the gradient of the soft
    weights; `uniform` is the control that ignores the sentinel. Attack it through the gates (`apgd-ce`), through every
    head and router (`multihead`) and by its sentinel (`steered`): an image counts as robust if it stands all three.

    When: to study routing in a sequence of threats, beside methods without it; a robust gate is as hard to train as a
    robust classifier, so compare with its single routers and with `uniform`.

    Paper: Wang, Wang and Qian 2025, Dynamic Dual-level Defense Routing for Continual Adversarial Training, arXiv
    2509.21392; after its abstract.

    Args:
        routers: T, at least 1: one for each threat to come; `after_dder-3` sets 3.
        top: heads that a router mixes, at least 1; fewer where it knows fewer.
        experts: `shared` or `grown`.
        temperature: of the sentinel, greater than 0.
        routing: `soft`, `hard` or `uniform`.
    """

    routers: int = 3
    top: int = 2
    experts: Literal["shared", "grown"] = "shared"
    temperature: Real = 1.0
    routing: Literal["soft", "hard", "uniform"] = "soft"

    def __post_init__(self) -> None:
        if not 1 <= self.routers <= MOST_ROUTERS:
            raise UserError(f"routers must lie in 1 to {MOST_ROUTERS}, got {self.routers}; one for each threat")
        at_least(1, "top", self.top, "2 is the default")
        above(0, "temperature", self.temperature)

    @property
    def router_names(self) -> tuple[str, ...]:
        """`router1`, `router2`, ..."""
        return _names(self.routers)

    def create(self, num_classes: int, heads: int = 2) -> nn.Module:
        """See `Aggregator.create`.

        Raises:
            UserError: always: the module is made for the features of a trunk.
        """
        del num_classes, heads
        raise UserError("aggregator after_dder routes by features of a trunk; make it with create_over, or attach it")

    def create_over(self, features: Sequence[Size], num_classes: int, heads: int = 2) -> nn.Module:
        """See `Aggregator.create_over`.

        Raises:
            UserError: for fewer heads than `top`, or features that cannot be pooled.
        """
        del num_classes
        if self.top > heads:
            raise UserError(f"aggregator after_dder: top is {self.top}, and the model has {heads} heads")
        first = heads if self.experts == "shared" else max(heads - self.routers + 1, 1)
        known = [min(first + number, heads) for number in range(self.routers)]
        return AfterDDeRModule(width(features), heads, known, self.top, self.temperature, self.routing)
