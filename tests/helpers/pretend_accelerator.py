"""A device that is not the CPU, on any machine: tensors that live elsewhere, mix with nothing, and count who waits.

`install` makes torch know a device of the type `pretend`, by torch's own way to write a backend in Python. It computes
on the CPU, to the bit what the CPU computes, and is strict where accelerators are:

* an operation on tensors of both devices raises, except for scalar tensors (0-d) of the CPU where torch takes those;
* numpy and the CPU see a tensor only after it was copied;
* autocast is accepted, and leaves float32 as it is;
* what makes a real accelerator's host wait for it is noted in `waits`, with the line of the package that asked.

There is no way back: torch can rename that backend once in a process, so this is for processes of their own.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import backend_registration

NAME: Final = "pretend"
PACKAGE: Final = f"{Path('src', 'dualhead')}/"

_COPIES: Final = {"aten::copy_", "aten::_to_copy", "aten::_foreach_copy_", "aten::_foreach_copy"}
"""Take tensors of two devices: that is what they are for."""
_INDEXING: Final = {
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index",
    "aten::_unsafe_index_put",
}  # fmt: skip
"""Take indices of the CPU as well, and send them over."""
_SHAPES_BY_VALUE: Final = {
    "aten::nonzero", "aten::masked_select", "aten::_unique", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::bincount",
}  # fmt: skip
"""The host must know values before it knows the shape of what comes out."""


@dataclass(frozen=True)
class Wait:
    """A moment at which the host of a real accelerator would wait for it.

    Args:
        what: `a number`, `to the CPU`, `to the device`, or the operation whose result has a shape that values decide.
        where: `file:function` of the innermost frame in the package's source; `backward` where autograd asks in a
            thread of its own; `outside` if the package does not take part.
    """

    what: str
    where: str


waits: Counter[Wait] = Counter()
"""How often the host has waited since the counter was last cleared."""


def _place() -> str:
    frame = sys._getframe(2)
    inside = False
    while frame is not None:
        path = frame.f_code.co_filename
        if PACKAGE in path and frame.f_code.co_name != "__torch_dispatch__":  # a mode that looks on asks for nothing
            return f"{path.rpartition(PACKAGE)[2]}:{frame.f_code.co_name}"
        inside = inside or "threading.py" in path or "pytest" in path or frame.f_code.co_name == "<module>"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside" if inside else "backward"


def _note(what: str) -> None:
    waits[Wait(what, _place())] += 1


class Away(torch.Tensor):
    """A tensor on the pretend accelerator; `inner` holds its values on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Away:
        """Wrap a tensor of the CPU, with its sizes and strides."""
        made: Away = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=torch.device(NAME, 0), requires_grad=False,
        )  # type: ignore[attr-defined]  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: OpOverload, types: Sequence[type], args=(), kwargs=None) -> Any:
        return _run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl  # an operation's result is Away by its device alone

    @property
    def data(self) -> Tensor:
        """The tensor without its graph."""
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]  # sizes and strides, not what is inside
        self.inner = value.inner  # type: ignore[attr-defined]

    def tolist(self) -> Any:
        """Copy the values to Python."""
        _note("to the CPU")
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """Refuse, as every accelerator does."""
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy; copy it to the CPU first")

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        return self.numpy()

    def data_ptr(self) -> int:
        """The address of the values."""
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The memory of the values."""
        return self.inner.untyped_storage()

    def __reduce_ex__(self, protocol: int) -> Any:
        _note("to the CPU")
        return self.inner.clone().__reduce_ex__(protocol)  # a file of it is read on the CPU

    def __repr__(self, **_: object) -> str:
        return f"{self.inner!r} on {NAME}"


def _is_away(device: object) -> bool:
    return torch.device(device).type == NAME  # type: ignore[arg-type]


def _taken_out(value: Any, tensors: list[Tensor]) -> Any:
    """Arguments with what is inside their tensors; the tensors are added to a list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.inner if isinstance(value, Away) else value
    if isinstance(value, list | tuple):
        return [_taken_out(one, tensors) for one in value]
    return value


def _handed_out(value: Any, known: Mapping[int, Away]) -> Any:
    """Results as tensors of this device; those that were written in place as the tensors that they came in."""
    if isinstance(value, Tensor) and not isinstance(value, Away):
        return known[id(value)] if id(value) in known else Away(value)
    if isinstance(value, list | tuple):
        return type(value)(_handed_out(one, known) for one in value)
    return value


def _run(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Do an operation on the CPU, and hand its result out as this device's."""
    tensors: list[Tensor] = []
    values = [_taken_out(one, tensors) for one in args]
    named = {name: _taken_out(one, tensors) for name, one in kwargs.items()}
    away = [tensor for tensor in tensors if isinstance(tensor, Away)]
    to_away = bool(away)
    if named.get("device") is not None:
        to_away = _is_away(named["device"])
        named["device"] = torch.device("cpu")
        named.pop("pin_memory", None)
    if away and len(away) < len(tensors):
        _refuse_mixed(func, args, tensors)
    if away or func.name() == "aten::_to_copy":
        _note_waits(func, args, kwargs, to_away=to_away)
    result = func(*values, **named)
    if func._schema.is_mutable:
        for tensor in away:
            if tensor.shape != tensor.inner.shape or tensor.stride() != tensor.inner.stride():  # given to `out`
                torch.Tensor.data.__set__(tensor, Away(tensor.inner))  # type: ignore[attr-defined]
    return _handed_out(result, {id(tensor.inner): tensor for tensor in away}) if to_away else result


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between devices, below the place where torch asks Python."""
    copied: Tensor = _run(torch.ops.aten.copy_.default, (target, source, non_blocking), {})
    return copied


def _refuse_mixed(func: OpOverload, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    name = func._schema.name
    if name in _COPIES:
        return
    scalars_allowed = not name.startswith(("aten::_foreach", "aten::_fused", "aten::cat", "aten::stack"))
    checked = [one for one in (args[0], *args[2:]) if isinstance(one, Tensor)] if name in _INDEXING else tensors
    for tensor in checked:
        if not isinstance(tensor, Away) and (tensor.dim() > 0 or not scalars_allowed):
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {func} got {tuple(tensor.shape)} on the CPU beside "
                f"others on {NAME}:0"
            )
    if func._schema.is_mutable and isinstance(args[0], Tensor) and not isinstance(args[0], Away):
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} writes to the CPU from {NAME}:0")


def _note_waits(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], *, to_away: bool) -> None:
    name = func._schema.name
    if name in _COPIES:
        _note_copies(name, args, kwargs, to_away=to_away)
    elif name in ("aten::_local_scalar_dense", "aten::equal"):
        _note("a number")
    elif name in _SHAPES_BY_VALUE or (name == "aten::repeat_interleave" and kwargs.get("output_size") is None):
        _note(name.removeprefix("aten::"))
    elif name in _INDEXING:
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
        fills = len(args) > 2 and len(indices) == 1 and args[2].numel() == 1
        if masks and not fills:  # one value written where one mask says needs no list of places
            _note("boolean indexing")
        if not all(isinstance(index, Away) for index in indices):
            _note("to the device")


def _note_copies(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], *, to_away: bool) -> None:
    """Note copies between devices; those to the device only if they are blocking, those to the CPU in any case."""
    blocking = not kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    if name == "aten::_to_copy":
        pairs = [(to_away, isinstance(args[0], Away))]
    else:
        targets, sources = ([one] if isinstance(one, Tensor) else one for one in args[:2])
        pairs = [(isinstance(t, Away), isinstance(s, Away)) for t, s in zip(targets, sources, strict=True)]
    for target, source in pairs:
        if source and not target:
            _note("to the CPU")
        elif target and not source and blocking:
            _note("to the device")


class _Device(backend_registration._DummyBackendModule):
    """What torch asks the module of a device for."""

    def synchronize(self, device: object = None) -> None:
        """Wait: for nothing."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_device_name(self, device: object = None) -> str:
        return "pretend accelerator"

    def set_device(self, device: object) -> None:
        """Take the only one."""

    def manual_seed(self, seed: int) -> None:
        """Leave the CPU's generator, which this device's random numbers come from, to `torch.manual_seed`."""

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        torch.set_rng_state(state)


_library: list[torch.library.Library] = []


def install() -> torch.device:
    """Make torch know the device, for the rest of this process.

    Raises:
        RuntimeError: if torch has another backend in that place.
    """
    if not _library:
        backend_registration._setup_privateuseone_for_python_backend(NAME, _Device())
        library = torch.library.Library("_", "IMPL")  # every operation that is asked with a device and no tensor of it
        library.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
        library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # autocast casts nothing here
        copies = torch.library.Library("aten", "IMPL")  # asked for where torch sends Python's values over
        copies.impl("_copy_from", _copy_from, "PrivateUse1")
        _library.extend((library, copies))
        torch.accelerator.synchronize = lambda device=None: None  # torch's Python backends have no way to say it
    return torch.device(NAME, 0)
