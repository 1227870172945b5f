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

from dualhead.errors import UserError, under
from dualhead.models.base import Wrapped
from dualhead.models.normalize import Normalize
from dualhead.system.files import write_atomically

logger = logging.getLogger(__name__)

NESTED_UNDER = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights")
OTHER_WEIGHTS = (
    "ema", "ema_state_dict", "model_ema", "state_dict_ema", "ema_model", "averaged", "swa", "best", "last",
    "unaveraged_model_state_dict",
)  # fmt: skip
"""Further keys under which checkpoints hold state dicts, of the same network at another moment or averaged."""
PREFIXES = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name
NORMALISERS = ("", "normalize.", "normalise.", "normalizer.", "normalization.", "norm.", "preprocess.",
               "data_preprocessor.", "0.")  # fmt: skip
"""Modules in which published models hold mean and standard deviation: the model itself, or the first of two."""
STATISTICS = (("mu", "sigma"), ("mean", "std"), ("new_mean", "new_std"), ("means", "sds"), ("means", "stds"))
"""Names of these buffers: RobustBench's, torchvision's, MadryLab/robustness', those of randomised smoothing."""
NORMALISED_BY = tuple((place + mean, place + std) for place in NORMALISERS for mean, std in STATISTICS)
"""Buffers under which published models hold the mean and the standard deviation by which they normalise images."""
SHOWN = 3


class _Inert:
    """Stands for an object that a checkpoint holds beside its tensors: takes whatever it is made from, does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _Inert:
        """Make one, and forget the arguments."""
        del args, kwargs
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Forget the state."""

    def __setitem__(self, key: object, value: object) -> None:
        """Forget an entry."""

    def append(self, value: object) -> None:
        """Forget an entry."""

    def extend(self, values: object) -> None:
        """Forget entries."""


BESIDE_TENSORS = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
    "numpy.dtype", "numpy.ndarray", "argparse.Namespace", "collections.defaultdict",
    "collections.deque", "datetime.datetime", "datetime.timedelta",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local")
      for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
)  # fmt: skip
"""Names that a file of torch may call for beside tensors: accuracies, options and dates, all read as `_Inert`."""


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file of safetensors or of `torch.save`; no code in it is run.

    A state dict that lies within a checkpoint (under `state_dict`, `model`, `net`, ...) is found, and the prefixes of
    DataParallel and `torch.compile` are taken off where all names have them, as is the second copy of the network that
    MadryLab/robustness keeps under `attacker`. Numbers of numpy, options and dates beside the tensors are passed over;
    nothing of them is made. `FILE#KEY` takes the state dict under that key.

    Args:
        path: the file.

    Returns:
        Names to tensors, on the CPU.

    Raises:
        UserError: if there is no such file, it can only be read by running code, or it holds no state dict.
    """
    path, key = file_and_key(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file of weights")
    with path.open("rb") as file:
        start = file.read(9)
    content = _read_safetensors(path) if start[8:9] == b"{" else _read_torch(path)
    where = str(path)
    if key is not None:
        if not isinstance(content, Mapping) or not isinstance(content.get(key), Mapping):
            inside = (
                [str(k) for k, v in content.items() if isinstance(v, Mapping)] if isinstance(content, Mapping) else []
            )
            raise UserError(f"{path}: holds no state dict under {key!r}; there is {', '.join(inside) or 'none'}")
        content, where = content[key], f"{path}[{key!r}]"
    return _without_copy(_without_prefixes(_state_in(content, where)), where)


def file_and_key(path: str | Path) -> tuple[Path, str | None]:
    """Split `FILE#KEY`; a file of that whole name comes first."""
    name, mark, key = str(path).rpartition("#")
    return (Path(name), key) if mark and key and not Path(path).exists() else (Path(path), None)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None


def _read_torch(path: Path) -> object:
    _refuse_bomb(path)
    try:
        # Pairs of an object and its name, which the annotations of torch 2.6 leave out.
        allowed: list[Any] = [(_Inert, name) for name in BESIDE_TENSORS]
        with torch.serialization.safe_globals([*allowed, _Inert]):
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
    try:
        if not zipfile.is_zipfile(path):  # which raises for an archive that says it spans several disks
            return
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
    inside = [key for key in (*NESTED_UNDER, *OTHER_WEIGHTS) if _is_nested(content.get(key))]
    if inside:
        return _one_of({key: _state_in(content[key], f"{where}[{key!r}]") for key in inside}, where)
    other = next((key for key, value in content.items() if not isinstance(value, Tensor)), None)
    raise UserError(
        f"{where}: not a state dict: entry {other!r} is {_kind(content.get(other))}, and none of "
        f"{', '.join(NESTED_UNDER)} holds one"
    )


def _is_nested(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _one_of(found: Mapping[str, dict[str, Tensor]], where: str) -> dict[str, Tensor]:
    """The state dict that a checkpoint with several means: they are equal, or all but one say that they are not it."""
    plain = {key: _without_prefixes(state) for key, state in found.items()}
    first = next(iter(plain))
    if all(_equal(plain[first], other) for other in plain.values()):
        return plain[first]
    if set(found) == {"model_state_dict", "unaveraged_model_state_dict"}:
        logger.warning("%s: took model_state_dict, the averaged weights; #unaveraged_model_state_dict names the others",
                       where)  # fmt: skip
        return plain["model_state_dict"]
    if "[" in where:
        raise UserError(f"{where}: holds several state dicts ({', '.join(found)}); save the one you mean by itself")
    raise UserError(f"{where}: holds several state dicts that differ ({', '.join(found)}); say which: {where}#{first}")


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        tensor is second[name] or torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def _without_copy(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The state without the network's second copy, which MadryLab/robustness keeps within its attacker."""
    copy = {name.removeprefix("attacker."): t for name, t in state.items() if name.startswith("attacker.model.")}
    if not copy:
        return state
    for name, tensor in copy.items():
        if name not in state or not torch.equal(state[name], tensor):
            raise UserError(f"{where}: attacker.{name} is not what {name} is; save the network that you mean by itself")
    return {name: tensor for name, tensor in state.items() if not name.startswith("attacker.")}


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
    names = _normalisation_names(state)
    if names is None:
        return None
    for name in names:
        # [C], [C, 1, 1] and [1, C, 1, 1] are one number per channel.
        sizes = list(state[name].shape)
        if sizes not in ([state[name].numel()], [state[name].numel(), 1, 1], [1, state[name].numel(), 1, 1]):
            raise UserError(f"{where}: {name} should hold one number per channel, but has shape {sizes}")
    mean, std = (state[name].flatten().tolist() for name in names)
    if max(*mean, *std) > 2.0:  # neither mean nor deviation of images in [0, 1], so of images from 0 to 255
        mean, std = [m / 255 for m in mean], [s / 255 for s in std]
        logger.warning(
            "%s: %s and %s are of images from 0 to 255, and read as %s and %s", where, *names,
            [round(m, 4) for m in mean], [round(s, 4) for s in std],
        )  # fmt: skip
    with under(f"{where}: {names[0]} and {names[1]}"):
        Normalize(mean, std)
    return tuple(mean), tuple(std)


def _normalisation_names(state: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The buffers of a normalisation, also below what all names begin with."""
    below = ""
    while True:
        for mean, std in NORMALISED_BY:
            place = mean.rpartition(".")[0]
            alone = {name for name in state if name.startswith(f"{below}{place}.")} <= {below + mean, below + std}
            if below + mean in state and below + std in state and (not place or alone):
                return below + mean, below + std
        common = _common(state, below)
        if common is None:
            return None
        below = common


def _common(names: Iterable[str], below: str = "") -> str | None:
    """The next component that all names begin with after `below`, with its dot; None if they part there."""
    heads = {name.removeprefix(below).partition(".")[:2] for name in names}
    if len(heads) != 1:
        return None
    head, dot = heads.pop()
    return f"{below}{head}." if dot else None


def _fitting(wanted: AbstractSet[str], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without what a wrapper put before all names (`model.`, `1.`), as far as the model lacks them all."""
    given = state
    while wanted.isdisjoint(given) and (common := _common(given)) is not None:
        given = {name.removeprefix(common): tensor for name, tensor in given.items()}
    return state if wanted.isdisjoint(given) else given


def _without_normalisation(
    model: nn.Module, wanted: AbstractSet[str], state: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """The state without the buffers of a normalisation that is not among the names wanted; the model must have it."""
    names = _normalisation_names(state)
    own_buffers = any(set(pair) <= wanted for pair in NORMALISED_BY) or (names is not None and set(names) <= wanted)
    found = None if own_buffers else normalisation_in(state, where)
    if found is None or names is None:
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
    return {name: tensor for name, tensor in state.items() if name not in names}


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
    state = _fitting(wanted.keys() | inside, state)
    descend = len(inside & state.keys()) > len(wanted.keys() & state.keys())
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
