"""Tied heads: a further head that shares every tensor with head 1 but those that are its own.

With all but batch norm tied, and the cut in front of the first layer, two heads are one network with dual batch norm
(Xie et al. 2020, arXiv 1911.09665; Zhang et al. 2024, arXiv 2403.19150).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Final

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from dualhead.errors import UserError
from dualhead.heads.splitting.base import Features, undisturbed

DEFAULT_OWN: Final = ("batch_norm",)
"""A tied head's own tensors by default: dual batch norm."""

_AFFINE: Final = frozenset({"weight", "bias"})
STATISTICS: Final = frozenset({"running_mean", "running_var", "num_batches_tracked"})
"""Names of the buffers of batch norm."""
_SHOWN = 4


def _is_norm(module: nn.Module) -> bool:
    """Whether a layer normalises: torch's layers, and others with statistics or with a class that says so.

    A linear layer of normalised weights, say, is none: it has a matrix.
    """
    if isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
        return True
    held = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    flat = all(sum(size > 1 for size in tensor.shape) <= 1 for tensor in held)
    return flat and ("norm" in type(module).__name__.lower() or "running_mean" in module._buffers)


def _is_batch_norm(module: nn.Module) -> bool:
    if isinstance(module, _InstanceNorm) or not _is_norm(module):
        return False
    return "running_mean" in module._buffers or "batchnorm" in type(module).__name__.lower()


WORDS: Final[Mapping[str, Callable[[nn.Module, str], bool]]] = {
    "batch_norm": lambda module, name: _is_batch_norm(module) and name in _AFFINE | STATISTICS,
    "affine": lambda module, name: _is_norm(module) and name in _AFFINE,
    "statistics": lambda module, name: _is_norm(module) and name in STATISTICS,
    "sandwich": lambda module, name: (
        "route_weight" in module._parameters and name in STATISTICS | {"route_weight", "route_bias"}
    ),
}
"""Words for what a head may own, each a rule over a layer and the name of a tensor that lies directly in it."""


def tensors_by_name(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all of their names."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return dict(named)


def own_names(head: nn.Module, own: Sequence[str]) -> frozenset[str]:
    """Names of the parameters and buffers of a head that are its own.

    Args:
        head: the head.
        own: words (`batch_norm`: weight, bias and statistics of batch norm; `affine`: weight and bias of all layers
            that normalise; `statistics`: running mean, variance and counter; `sandwich`: statistics and the second
            affine map of sandwich batch norm), each also within some layers alone (`batch_norm@block1`), or patterns
            with the wildcards of `fnmatch` over the names of parameters, buffers and layers; of a layer, all tensors
            in it are meant.

    Raises:
        UserError: if one of them matches nothing, or nothing is left to share.
    """
    tensors = tensors_by_name(head)
    if not own or isinstance(own, str):
        raise UserError(f"own: must list at least one of {', '.join(WORDS)} or a name in the head; got {own!r}")
    found: set[str] = set()
    for pattern in own:
        matched = {name for name in tensors if _matches(head, name, pattern)}
        if not matched:
            raise UserError(f"own: {pattern!r} matches nothing in the second head; {_offer(head, tensors)}")
        found |= matched
    # A tensor that the head itself holds under two names stays one.
    owned = {id(tensors[name]) for name in found}
    names = frozenset(name for name, tensor in tensors.items() if id(tensor) in owned)
    if names == tensors.keys():
        raise UserError("own: leaves the heads nothing to share; use clone for a second head that is all its own")
    return names


def own_words(head: nn.Module, names: Collection[str]) -> tuple[str, ...]:
    """Return what `own_names` reads as just these names of a head's tensors: one word if there is one, else the names.

    Args:
        head: the head.
        names: of some of its parameters and buffers, at least one.
    """
    for word in WORDS:
        with suppress(UserError):
            if own_names(head, [word]) == frozenset(names):
                return (word,)
    return tuple(sorted(names))


def _matches(head: nn.Module, name: str, pattern: str) -> bool:
    path = name.split(".")
    word, at, where = pattern.partition("@")
    if word in WORDS and (not at or _matches(head, name, where)):
        return WORDS[word](head.get_submodule(".".join(path[:-1])), path[-1])
    return any(fnmatchcase(".".join(path[:depth]), pattern) for depth in range(1, len(path) + 1))


def _offer(head: nn.Module, tensors: Collection[str]) -> str:
    """Name what could be matched instead, as a clause."""
    words = [word for word in WORDS if any(_matches(head, name, word) for name in tensors)]
    layers = list(dict.fromkeys(name.rpartition(".")[0] or name for name in tensors))
    shown = ", ".join(layers[:_SHOWN]) + (", ..." if len(layers) > _SHOWN else "")
    return f"it has {', '.join(words) or 'no layers that normalise'}, and by name or pattern {shown}"


def put_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Let a name in a module mean a certain parameter or buffer: this very tensor."""
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    (owner._parameters if last in owner._parameters else owner._buffers)[last] = tensor  # type: ignore[assignment]  # a parameter for a parameter


def share_tensors(source: nn.Module, head: nn.Module, names: Collection[str]) -> None:
    """Let a head hold the very tensors of another under these names."""
    tensors = tensors_by_name(source)
    for name in names:
        put_tensor(head, name, tensors[name])


def tie(source: nn.Module, head: nn.Module, own: Sequence[str]) -> frozenset[str]:
    """Tie a head, in place, to the one that it is a copy of.

    Layers stay two objects, with a mode each; the tensors in them become one, which both update in place.

    Args:
        source: the first head.
        head: a copy of it.
        own: what stays the head's own, see `own_names`.

    Returns:
        Names of the tensors shared.

    Raises:
        UserError: as `own_names`.
    """
    names = frozenset(tensors_by_name(head)) - own_names(head, own)
    share_tensors(source, head, names)
    return names


def refuse_reassigned(head: nn.Module, names: Collection[str], images: Tensor, trunk: nn.Module) -> None:
    """Refuse to share a buffer that a forward pass assigns anew: the heads would part without a word.

    Args:
        head: the tied head.
        names: of the tensors that it shares.
        images: at least two, [B, ...].
        trunk: images to what crosses the cut.

    Raises:
        UserError: naming the buffer.
    """
    before = {name: tensor for name, tensor in tensors_by_name(head).items() if name in names}
    with undisturbed(images, trunk, head):
        features: Features = trunk.train()(images.clone())
        head.train()(features)
        after = tensors_by_name(head)
    for name, tensor in before.items():
        if after.get(name) is not tensor:
            raise UserError(
                f"own: {name} cannot be shared, since the layer's forward pass assigns it anew and not in place; "
                "add it to own"
            )


def moving_modules(head: nn.Module, names: Collection[str]) -> Iterator[nn.Module]:
    """Modules of a head that hold shared buffers directly: in training mode they may move what is not theirs."""
    for path, module in head.named_modules():
        prefix = f"{path}." if path else ""
        if any(prefix + name in names for name, buffer in module._buffers.items() if buffer is not None):
            yield module
