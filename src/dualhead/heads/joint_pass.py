"""A joint pass: several sets of images in one forward, through layers that know whose each row is.

Dual batch norm with statistics of the union and affine parameters of each route (Zhang et al. 2024, arXiv 2403.19150)
needs this, and so do statistics of the clean images alone: where routes run one after another, a layer cannot see the
rows of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dualhead.errors import UserError
from dualhead.heads.tied import STATISTICS

_KNOWN = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


@dataclass(frozen=True)
class Rows:
    """Whose the rows of a joint pass are.

    Args:
        sizes: number of rows of each set of images, in the order in which they follow one another.
        counted: for each set, whether batch norm takes its statistics from it.
    """

    sizes: tuple[int, ...]
    counted: tuple[bool, ...]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the rows of each set."""
        return torch.split(x, list(self.sizes))


@contextmanager
def joint_pass(routes: Sequence[nn.Module], rows: Rows, own: Collection[str] = ()) -> Iterator[nn.Module]:
    """Let the first route run all rows while inside, each row with the tensors of its own route.

    A layer that all routes share runs once on all rows. A batch norm whose statistics are shared normalises all rows by
    those of the sets that count, moves the running ones once, and maps each row by its route's weight and bias. Any
    other layer with tensors of a route's own runs once for each route, on its rows.

    Args:
        routes: the module for each set of images; all the same, or tied to one another.
        rows: of the pass.
        own: names of the tensors that the routes do not share.

    Yields:
        The module to run on all rows.

    Raises:
        UserError: for a layer that cannot be told whose its rows are.
    """
    first = routes[0]
    with ExitStack() as undo:
        for path, layer in first.named_modules():
            layers = [route.get_submodule(path) for route in routes]
            forward = _forward(path, layers, rows, {name for name in own if name.rpartition(".")[0] == path})
            if forward is not None:
                undo.enter_context(_replaced(layer, forward))
        yield first


def refuse_unroutable(module: nn.Module, own: Collection[str], *, all_count: bool) -> None:
    """Refuse what `joint_pass` cannot run.

    Raises:
        UserError: naming the layer.
    """
    rows = Rows((1, 1), (True, all_count))
    for path, layer in module.named_modules():
        _forward(path, [layer, layer], rows, {name for name in own if name.rpartition(".")[0] == path})


def _forward(path: str, layers: Sequence[nn.Module], rows: Rows, own: Collection[str]) -> Callable[..., Tensor] | None:
    """Return a layer's forward function in the joint pass; None: the usual one."""
    names = {name.rpartition(".")[2] for name in own}
    layer = layers[0]
    has_statistics = isinstance(layer, _BatchNorm)
    if has_statistics and not all(rows.counted):
        if names & STATISTICS:
            raise UserError(
                f"forward: joint_clean: the heads have statistics of their own in {path}; tie them (own: affine)"
            )
        if isinstance(layer, nn.SyncBatchNorm):
            raise UserError("forward: joint_clean: not with runtime.batch_norm=synchronised; write local")
    if names and next(layer.children(), None) is not None:
        raise UserError(
            f"forward: joint: {sorted(own)[0]} lies beside layers of its own module, so it cannot be told whose its "
            "rows are; use forward: separate"
        )
    if isinstance(layer, _BatchNorm) and not names & STATISTICS:
        if not names and all(rows.counted):
            return None
        if type(layer).forward not in _KNOWN and not hasattr(layer, "after"):
            raise UserError(
                f"forward: joint: {path} is a batch norm whose forward is its own ({type(layer).__name__}), so its "
                "affine map cannot be told apart; use forward: separate"
            )
        norms = cast("Sequence[_BatchNorm]", layers)
        return lambda x: _map_by_route(_normalised(norms[0], x, rows), norms, rows)
    if not names:
        return None
    return lambda x: torch.cat([type(of).forward(of, part) for of, part in zip(layers, rows.split(x), strict=True)])


def _normalised(layer: _BatchNorm, x: Tensor, rows: Rows) -> Tensor:
    """Normalise all rows by the statistics of those that count, or by running ones; move these once."""
    if all(rows.counted) or not (layer.training or layer.running_mean is None):
        return _without_affine(layer, x)
    parts, sizes = rows.split(x), [n for n, counts in zip(rows.sizes, rows.counted, strict=True) if counts]
    counting = torch.cat([part for part, counts in zip(parts, rows.counted, strict=True) if counts])
    done = iter(torch.split(_without_affine(layer, counting), sizes))
    dims = [0, *range(2, x.dim())]
    variance, mean = torch.var_mean(counting.float(), dims, correction=0, keepdim=True)
    scale = torch.rsqrt(variance + layer.eps)
    return torch.cat(
        [
            next(done) if counts else ((part.float() - mean) * scale).to(x.dtype)
            for part, counts in zip(parts, rows.counted, strict=True)
        ]
    )


def _without_affine(layer: _BatchNorm, x: Tensor) -> Tensor:
    """Run a batch norm as it is, but for its affine map."""
    held = {name: layer._parameters[name] for name in ("weight", "bias")}
    forward = nn.SyncBatchNorm.forward if isinstance(layer, nn.SyncBatchNorm) else _BatchNorm.forward
    layer._parameters.update(weight=None, bias=None)
    try:
        normalised: Tensor = forward(layer, x)  # type: ignore[arg-type]  # a SyncBatchNorm where it is one
    finally:
        layer._parameters.update(held)
    return normalised


def _map_by_route(normalised: Tensor, layers: Sequence[_BatchNorm], rows: Rows) -> Tensor:
    return torch.cat([affine_map(of, part) for of, part in zip(layers, rows.split(normalised), strict=True)])


def affine_map(layer: nn.Module, normalised: Tensor) -> Tensor:
    """Apply what a batch norm does behind its normalisation: weight and bias, and further maps that it names itself.

    Args:
        layer: with `weight` and `bias` [C] or None; a method `after(x)` is applied last if it has one.
        normalised: [B, C, ...].
    """
    shape = (1, -1, *[1] * (normalised.dim() - 2))
    out = normalised
    if layer.weight is not None:
        out = out * layer.weight.view(shape) + layer.bias.view(shape)  # type: ignore[operator]
    after = getattr(layer, "after", None)
    return (out if after is None else after(out)).to(normalised.dtype)


@contextmanager
def _replaced(layer: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    before = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before
