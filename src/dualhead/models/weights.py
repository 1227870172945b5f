"""Weights on disk: read without running anything, load strictly, write whole or not at all."""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dualhead.errors import UserError
from dualhead.models.base import Wrapped
from dualhead.models.normalize import Normalize
from dualhead.system.files import write_atomically

logger = logging.getLogger(__name__)

NESTED_UNDER = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights")
PREFIXES = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name
NORMALISED_BY = (("mu", "sigma"), ("mean", "std"), ("normalize.mean", "normalize.std"))
"""Buffers under which published models hold the mean and the standard deviation by which they normalise images."""
SHOWN = 3


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file of safetensors or of `torch.save`; no code in it is run.

    A state dict that lies within a checkpoint (under `state_dict`, `model`, `net`, ...) is found, and the prefixes of
    DataParallel and `torch.compile` are taken off where all names have them.

    Args:
        path: the file.

    Returns:
        Names to tensors, on the CPU.

    Raises:
        UserError: if there is no such file, it can only be read by running code, or it holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file of weights")
    with path.open("rb") as file:
        start = file.read(9)
    content = _read_safetensors(path) if start[8:9] == b"{" else _read_torch(path)
    return _without_prefixes(_state_in(content, str(path)))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None


def _read_torch(path: Path) -> object:
    _refuse_bomb(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise UserError(f"{path}: neither a safetensors file nor one of torch.save, or damaged") from None
        raise UserError(
            f"{path}: refused, since reading it would run code ({refused[1]}); save only tensors: "
            "torch.save(model.state_dict(), path), or safetensors"
        ) from None
    except Exception as error:  # a damaged file fails in many ways: EOFError, RuntimeError, KeyError, ...
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path}: neither a safetensors file nor one of torch.save, or damaged ({reason})") from None


def _refuse_bomb(path: Path) -> None:
    """Torch packs tensors without compressing them; what unpacks to far more than the file is not of its making."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise UserError(f"{path}: neither a safetensors file nor one of torch.save, or damaged ({error})") from None
    if unpacked > 2 * path.stat().st_size + 2**20:
        raise UserError(
            f"{path}: unpacks to {unpacked:,} bytes from {path.stat().st_size:,}, possibly a decompression bomb; "
            "torch.save does not compress"
        )


def _state_in(content: object, where: str) -> dict[str, Tensor]:
    """The one state dict in a checkpoint."""
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{where}: holds {_kind(content)}, not a state dict (names to tensors)")
    if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        return {key: value.detach() for key, value in content.items()}
    inside = [key for key in NESTED_UNDER if isinstance(content.get(key), Mapping)]
    if len(inside) == 1:
        return _state_in(content[inside[0]], f"{where}[{inside[0]!r}]")
    if inside:
        raise UserError(f"{where}: holds several state dicts ({', '.join(inside)}); save the one you mean by itself")
    other = next((key for key, value in content.items() if not isinstance(value, Tensor)), None)
    raise UserError(
        f"{where}: not a state dict: entry {other!r} is {_kind(content.get(other))}, and none of "
        f"{', '.join(NESTED_UNDER)} holds one"
    )


def _kind(value: object) -> str:
    return f"an empty {type(value).__name__}" if isinstance(value, Mapping) and not value else type(value).__name__


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes that wrappers put before all of them, in whatever order they were put."""
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            return _without_prefixes({name.removeprefix(prefix): value for name, value in state.items()})
    return state


def _with_prefixes(wanted: Iterable[str], state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Names with a prefix that the model itself has before all of its own, and `read_state` took for a wrapper's."""
    wanted = list(wanted)
    for prefix in PREFIXES:
        own = bool(wanted) and all(name.startswith(prefix) for name in wanted)
        if own and not any(name.startswith(prefix) for name in state):
            inner = _with_prefixes((name.removeprefix(prefix) for name in wanted), state)
            return {f"{prefix}{name}": value for name, value in inner.items()}
    return state


def normalisation_in(state: Mapping[str, Tensor], where: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The normalisation that a checkpoint carries as buffers, as models of RobustBench do; None if it has none.

    Args:
        state: names to tensors.
        where: the file, for messages.

    Returns:
        Mean and standard deviation of each channel, in units of images in [0, 1].

    Raises:
        UserError: if the buffers are not one number per channel.
    """
    for mean, std in NORMALISED_BY:
        if mean in state and std in state:
            for name in (mean, std):
                # [C], [C, 1, 1] and [1, C, 1, 1] are one number per channel.
                sizes = list(state[name].shape)
                if sizes not in ([state[name].numel()], [state[name].numel(), 1, 1], [1, state[name].numel(), 1, 1]):
                    raise UserError(f"{where}: {name} should hold one number per channel, but has shape {sizes}")
            found = state[mean].flatten().tolist(), state[std].flatten().tolist()
            try:
                Normalize(*found)
            except UserError as error:
                raise UserError(f"{where}: {mean} and {std}: {error}") from None
            return tuple(found[0]), tuple(found[1])
    return None


def _without_normalisation(
    model: nn.Module, wanted: AbstractSet[str], state: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """The state without the buffers of a normalisation that is not among the names wanted; the model must have it."""
    found = None if any(set(names) <= wanted for names in NORMALISED_BY) else normalisation_in(state, where)
    if found is None:
        return dict(state)
    own = next((module for module in model.modules() if isinstance(module, Normalize)), None)
    same = own is not None and all(
        len(numbers) == own.channels and torch.equal(torch.tensor(numbers), buffer.flatten().cpu())
        for numbers, buffer in zip(found, (own.mean, own.std), strict=True)
    )
    if not same:
        raise UserError(
            f"{where}: these weights normalise images by other numbers than the model; set model.normalize: "
            f"{{mean: {[round(x, 6) for x in found[0]]}, std: {[round(x, 6) for x in found[1]]}}}, or leave it out"
        )
    buffers = {name for names in NORMALISED_BY for name in names}
    given = {name: tensor for name, tensor in state.items() if name not in buffers}
    if all(name.startswith("model.") for name in given) and not any(name.startswith("model.") for name in wanted):
        return {name.removeprefix("model."): tensor for name, tensor in given.items()}
    return given


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], where: str, *, replaced: str | None = None
) -> tuple[str, ...]:
    """Put weights into a model; every tensor must fit.

    Weights that `read_state` took a prefix from get it again where the model's own names have it.

    Two things that published checkpoints are known for are mended, each only where nothing else can be meant: parts
    that the model's class names in `unused_in_published` are left out where they repeat the named part tensor by
    tensor (said in the log); and `num_batches_tracked`, which checkpoints from before torch 0.4.1 lack altogether,
    starts at 0, as torch itself has it. Weights of the model inside a `Wrapped` may go without its prefix. Buffers of a
    normalisation (see `normalisation_in`) must say what the model's own `Normalize` does. What is one tensor in the
    model, such as what tied heads share, may stand under one of its names, and must have one value.

    Args:
        model: what to load into; unchanged if the weights do not fit.
        state: names to tensors, as `read_state` gives them.
        where: the file, for messages.
        replaced: a layer that keeps the model's own weights, such as a classifier for other classes; in the file it
            may have another number of outputs, or be absent.

    Returns:
        The names left out.

    Raises:
        UserError: naming how many tensors are missing, unexpected or of another shape, and the first of each; or two
            names of one tensor for which the weights hold two values.
    """
    wanted = model.state_dict()
    state = _with_prefixes(wanted, state)
    inside = model.model.state_dict().keys() if isinstance(model, Wrapped) else set()
    descend = len(inside & state.keys()) > len(wanted.keys() & state.keys())
    # Where the weights are of the model inside, it is its `mean` and `std` that are not taken for a normalisation's.
    state = _without_normalisation(model, inside if descend else wanted.keys(), state, where)
    if isinstance(model, Wrapped) and descend:
        inner = None if replaced is None else replaced.removeprefix("model.")
        return load_state(model.model, state, where, replaced=inner)
    given, left_out = _without_unused(model, state)
    if replaced is not None:
        own = {name: tensor for name, tensor in wanted.items() if name.startswith(f"{replaced}.")}
        given |= {n: t for n, t in own.items() if n not in given or given[n].shape[1:] == t.shape[1:]}
    given = with_tied(model, given, where)
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}
    if counters.isdisjoint(given):
        given |= {name: torch.zeros_like(wanted[name]) for name in counters}
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    reshaped = [
        f"{name} is {tuple(given[name].shape)}, {tuple(tensor.shape)} in the model"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if missing or unexpected or reshaped:
        parts = [("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)]
        raise UserError(
            f"{where}: these weights are not for this {type(model).__name__}: "
            + "; ".join(f"{len(names)} {kind} ({_first(names)})" for kind, names in parts if names)
            + f"; right are the {len(wanted)} tensors {_first(list(wanted))}"
        )
    model.load_state_dict(given, strict=True)
    if left_out:
        logger.warning("%s: left out %d tensors that no forward uses: %s", where, len(left_out), _first(left_out))
    return left_out


def with_tied(model: nn.Module, state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The state with a tensor that is one in the model under all of its names, if it has it under any.

    Args:
        model: which tensors are one.
        state: names to tensors, as `read_state` gives them.
        where: the file, for messages.

    Raises:
        UserError: if the state has two values for one tensor: the last one would win without a word.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    filled = dict(state)
    for alike in names.values():
        given = [name for name in alike if name in state]
        if not given:
            continue
        first = state[given[0]]
        for name in given[1:]:
            if state[name] is not first and state[name].shape == first.shape and not torch.equal(state[name], first):
                raise UserError(
                    f"{where}: {given[0]} and {name} differ in these weights, and are one tensor in the model; "
                    "were they trained without being tied?"
                )
        filled |= {name: first for name in alike if name not in state}
    return filled


def _without_unused(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state without parts that publications carry unused, and the names of those."""
    known: Mapping[str, str] = getattr(model, "unused_in_published", {})
    given, left_out = dict(state), []
    for unused, repeats in known.items():
        shapes = {
            name.removeprefix(f"{unused}."): t.shape for name, t in state.items() if name.startswith(f"{unused}.")
        }
        twin = {
            name.removeprefix(f"{repeats}."): t.shape for name, t in state.items() if name.startswith(f"{repeats}.")
        }
        if shapes and shapes == twin:
            left_out += [f"{unused}.{name}" for name in shapes]
    return {name: tensor for name, tensor in given.items() if name not in set(left_out)}, tuple(left_out)


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def write_state(state: Mapping[str, Any], path: str | Path) -> None:
    """Write a state dict as safetensors: after a crash at any moment, `path` holds the old file or the new one, whole.

    A tensor that several parts of a model hold under one name, as tied heads do (`head1.fc.weight`, `head2.fc.weight`),
    is written once, for the first of them; `load_state` knows from the model what it belongs to besides.

    Args:
        state: names to tensors, on any device.
        path: the file; its folder is made if need be.

    Raises:
        OSError: if it cannot be written.
    """
    copies: dict[str, Tensor] = {}
    written = set()
    for name, tensor in state.items():
        inside = name.partition(".")[2]
        memory = (inside, tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if not inside or tensor.numel() == 0 or memory not in written:
            copies[name] = tensor.detach().to("cpu", copy=True).contiguous()
        written.add(memory)

    def write(aside: Path) -> None:
        try:
            safetensors.torch.save_file(copies, aside, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # a full disk, among others
            raise OSError(f"{path}: {error}") from error

    write_atomically(Path(path), write)
