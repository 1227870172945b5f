"""Routes through tied heads: statistics of one head with the affine parameters of another, and what lies between two.

With dual batch norm a network has two sets of running statistics and two sets of affine parameters, and so four routes
(Zhang et al. 2024, arXiv 2403.19150, exchange them at test). Each is a plain classifier.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dualhead.errors import UserError
from dualhead.heads.classifier import DualHeadClassifier
from dualhead.heads.splitting import Features
from dualhead.heads.tied import STATISTICS, tensors_by_name


@dataclass(frozen=True)
class Route:
    """Whose tensors an image meets.

    Args:
        statistics: the head whose running statistics are used.
        affine: the head whose other tensors are.
    """

    statistics: str
    affine: str

    @property
    def name(self) -> str:
        """Return the head's name for a route that was trained, else both names."""
        if self.statistics == self.affine:
            return self.affine
        return f"statistics-{self.statistics}_affine-{self.affine}"


def routes_of(classifier: DualHeadClassifier) -> list[Route]:
    """Return all routes that differ, those of one head first.

    Raises:
        UserError: if the heads are not tied.
    """
    if not classifier.tied:
        raise UserError("routes: the heads of this model are not tied, so nothing of theirs can be exchanged")
    heads = classifier.heads
    own = {name.rpartition(".")[2] in STATISTICS for name in classifier.own_of_tied}
    crossed = [Route(i, j) for i in heads for j in heads if i != j] if own == {True, False} else []
    return [*(Route(head, head) for head in heads), *crossed]


class _Through(nn.Module):
    """Trunk and a head as one classifier: images [B, ...] to logits [B, C]."""

    def __init__(self, trunk: nn.Module, head: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.trunk, self.head, self.num_classes = trunk, head, num_classes

    def forward(self, x: Tensor) -> Tensor:
        features: Features = self.trunk(x)
        logits: Tensor = self.head(features)
        return logits


def _copied(classifier: DualHeadClassifier, head: str) -> _Through:
    pair = copy.deepcopy(nn.ModuleList([classifier.trunk, classifier.get_submodule(head)]))
    return _Through(pair[0], pair[1], classifier.num_classes).eval()


@torch.no_grad()
def through(classifier: DualHeadClassifier, route: Route) -> nn.Module:
    """Return a route as a plain classifier, a copy in eval mode.

    Args:
        classifier: with tied heads.
        route: one of `routes_of`.
    """
    made = _copied(classifier, route.affine)
    statistics = tensors_by_name(classifier.get_submodule(route.statistics))
    for name, tensor in tensors_by_name(made.head).items():
        if name in classifier.own_of_tied and name.rpartition(".")[2] in STATISTICS:
            tensor.copy_(statistics[name])
    return made


@torch.no_grad()
def between(classifier: DualHeadClassifier, first: str, second: str, t: float, images: Iterable[Tensor]) -> nn.Module:
    """Return the classifier whose own tensors are (1 - t) first + t second, with statistics estimated anew.

    Stored statistics belong to the affine parameters in front of them, so those of neither head fit what lies between
    (Rebuffi et al. 2023, arXiv 2210.04886, interpolate adapters in this way).

    Args:
        classifier: with tied heads.
        first: a head.
        second: another one.
        t: in [0, 1].
        images: batches [B, ...], of which statistics are the plain mean; none: statistics are interpolated too.
    """
    made = _copied(classifier, first)
    other = tensors_by_name(classifier.get_submodule(second))
    for name, tensor in tensors_by_name(made.head).items():
        if name in classifier.own_of_tied and tensor.is_floating_point():
            tensor.lerp_(other[name], t)
    estimate_statistics(made, images)
    return made


@torch.no_grad()
def estimate_statistics(model: nn.Module, images: Iterable[Tensor]) -> None:
    """Set running statistics of batch norm to the plain mean over batches; leave them if there are no batches.

    Args:
        model: left in eval mode.
        images: batches [B, ...].
    """
    layers = [layer for layer in model.eval().modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    momenta = [layer.momentum for layer in layers]
    begun = False
    for batch in images:
        if not begun:
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # torch's word for the plain mean
                layer.train()
            begun = True
        model(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.eval()


class MergedRoutes(nn.Module):
    """A merging of heads in an order of one's own: images [B, ...] to logits [B, C]. It shows the heads to attacks.

    Args:
        classifier: whose heads are merged.
        heads: their names, in the order in which the aggregator takes them.
        aggregator: head logits [B, H, C] to logits [B, C].
    """

    def __init__(self, classifier: DualHeadClassifier, heads: Sequence[str], aggregator: nn.Module) -> None:
        super().__init__()
        self.classifier, self.heads, self.aggregator = classifier, tuple(heads), aggregator
        self.num_classes = classifier.num_classes

    def head_logits(self, x: Tensor) -> Tensor:
        """Logits of the heads [B, H, C]."""
        features = self.classifier.features(x)
        return torch.stack([self.classifier.head(head, features) for head in self.heads], 1)

    def aggregate(self, head_logits: Tensor) -> Tensor:
        """Logits [B, C] from head logits [B, H, C], in float32."""
        with torch.autocast(head_logits.device.type, enabled=False):
            logits: Tensor = self.aggregator(head_logits.float())
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C]."""
        return self.aggregate(self.head_logits(x))


# ---- how far apart


Gap = dict[str, list[float]]
"""Distances by kind, each with one number for each channel."""


def _gap(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor, eps: float) -> Gap:
    sigma, other = (variance.double() + eps).sqrt(), (other_variance.double() + eps).sqrt()
    return {
        "mean": ((mean.double() - other_mean.double()).abs() / sigma).tolist(),
        "log_sigma": (other / sigma).log().abs().tolist(),
    }


def stored_gaps(classifier: DualHeadClassifier, first: str, second: str) -> dict[str, Gap]:
    """Compare what two tied heads have of their own, layer by layer and channel by channel.

    Args:
        classifier: with tied heads.
        first: a head, whose deviation is the unit of the distance of means.
        second: another one.

    Returns:
        By layer: `mean`, |mu - mu'| / sigma; `log_sigma`, |log(sigma' / sigma)|; and for each own parameter its
        absolute difference, under its name. Layers without own tensors are left out.
    """
    one, other = (tensors_by_name(classifier.get_submodule(head)) for head in (first, second))
    found: dict[str, Gap] = {}
    for name in one:  # in the order of the network
        path, _, kind = name.rpartition(".")
        if name not in classifier.own_of_tied or kind == "num_batches_tracked":
            continue
        gap = found.setdefault(path, {})
        if kind not in STATISTICS:
            gap[kind] = (one[name].detach().double() - other[name].detach().double()).abs().flatten().tolist()
        elif "mean" not in gap:
            eps = float(getattr(classifier.get_submodule(first).get_submodule(path), "eps", 1e-5))
            mean, variance = f"{path}.running_mean", f"{path}.running_var"
            gap |= _gap(one[mean], one[variance], other[mean], other[variance], eps)
    return found


@torch.no_grad()
def image_gaps(model: nn.Module, clean: Iterable[Tensor], attacked: Iterable[Tensor]) -> dict[str, Gap]:
    """Compare what batch norm sees of clean and of attacked images under one set of parameters.

    Args:
        model: in eval mode.
        clean: batches of images [B, ...].
        attacked: the same images, attacked.

    Returns:
        By layer that is a batch norm: `mean` and `log_sigma` as in `stored_gaps`.
    """
    first, second = (_moments(model, images) for images in (clean, attacked))
    return {
        path: _gap(*first[path], *second[path], float(getattr(model.get_submodule(path), "eps", 1e-5)))
        for path in first
    }


def _moments(model: nn.Module, images: Iterable[Tensor]) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Mean and variance of what enters each batch norm, over all images and positions: [C] each."""
    sums: dict[str, list[Tensor]] = {}

    def take(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].double().transpose(0, 1).flatten(1)
            seen = [torch.full((), x.shape[1], dtype=x.dtype, device=x.device), x.sum(1), x.square().sum(1)]
            sums[path] = seen if path not in sums else [a + b for a, b in zip(sums[path], seen, strict=True)]

        return hook

    with ExitStack() as hooks:
        for path, layer in model.named_modules():
            if isinstance(layer, _BatchNorm):
                hooks.callback(layer.register_forward_pre_hook(take(path)).remove)
        for batch in images:
            model(batch)
    return {path: (s / n, (q / n - (s / n).square()).clamp_min(0.0)) for path, (n, s, q) in sums.items()}
