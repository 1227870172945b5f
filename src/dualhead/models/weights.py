"""Weights on disk: read without running anything, load strictly, write whole or not at all."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dualhead.errors import UserError
from dualhead.files import write_atomically
from dualhead.models.base import Wrapped

logger = logging.getLogger(__name__)

NESTED_UNDER = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights")
PREFIXES = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name
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


def load_state(model: nn.Module, state: Mapping[str, Tensor], where: str) -> tuple[str, ...]:
    """Put weights into a model; every tensor must fit.

    Two things that published checkpoints are known for are mended, each only where nothing else can be meant: parts
    that the model's class names in `unused_in_published` are left out where they repeat the named part tensor by
    tensor (said in the log); and `num_batches_tracked`, which checkpoints from before torch 0.4.1 lack altogether,
    starts at 0, as torch itself has it. Weights of the model inside a `Wrapped` may go without its prefix.

    Args:
        model: what to load into; unchanged if the weights do not fit.
        state: names to tensors, as `read_state` gives them.
        where: the file, for messages.

    Returns:
        The names left out.

    Raises:
        UserError: naming how many tensors are missing, unexpected or of another shape, and the first of each.
    """
    wanted = model.state_dict()
    if isinstance(model, Wrapped):
        inside = model.model.state_dict()
        if len(inside.keys() & state.keys()) > len(wanted.keys() & state.keys()):
            return load_state(model.model, state, where)
    given, left_out = _without_unused(model, state)
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

    Args:
        state: names to tensors, on any device; shared memory is written once per name.
        path: the file; its folder is made if need be.
    """
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    write_atomically(Path(path), lambda aside: safetensors.torch.save_file(copies, aside, metadata={"format": "pt"}))
