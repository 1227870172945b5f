"""The processes of a run: which of them this one is, and what they tell one another.

`torchrun` starts them, on one machine or several, and starts them again when one fails; here they meet. A process that
is alone is a group of one, for which all of this does nothing. Texts and flags go over gloo, tensors over what suits
the device that they lie on.
"""

from __future__ import annotations

import itertools
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualhead.errors import RunError
from dualhead.system.told import silent_unless

T = TypeVar("T")

_PATIENCE: Final = timedelta(days=1)
"""How long a process waits for the others: they end an evaluation hours apart. If one dies, torchrun ends the rest."""


_meetings = itertools.count()


@dataclass(frozen=True)
class Group:
    """The processes that work together, as one of them sees them.

    Every method that speaks to the others must be called by all of them, in the same order.

    Args:
        rank: number of this process; the one of number 0 alone writes and prints.
        world: their number.
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the value of each process, in order of rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with _others():
            dist.all_gather_object(values, value)
        return values

    def agreed(self, do: Callable[[], T]) -> T:
        """Do something in every process; if it fails in one, it fails in all, with the error of the first that failed.

        So nobody waits for a process that has given up, and bad input is told once.
        """
        result, error = _tried(do)
        errors = [found for found in self.gather(error) if found is not None]
        if errors:
            raise errors[0]
        return result  # type: ignore[return-value]  # there is one, since nothing was raised

    def in_turn(self, do: Callable[[], T]) -> T:
        """`agreed`, with the first process of each machine going ahead: what it leaves in a cache serves the others."""
        ahead = local_rank() in (None, 0)
        early = self.agreed(lambda: do() if ahead else None)
        late = self.agreed(lambda: None if ahead else do())
        return early if ahead else late  # type: ignore[return-value]  # `do` has been called in one of them

    def lead(self, do: Callable[[], T]) -> T:
        """Do something in the first process alone, and give its result, or its error, to all."""
        if self.world == 1:
            return do()
        told: list[Any] = [_tried(do) if self.first else None]
        with _others():
            dist.broadcast_object_list(told, src=0)
        result, error = told[0]
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]  # pickled by `do`'s process, so of its type

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Tell for each flag whether it is true in any process; does not wait for an accelerator."""
        if self.world == 1:
            return flags
        said = torch.tensor(flags, dtype=torch.int32)
        with _others():
            dist.all_reduce(said, dist.ReduceOp.MAX)
        return tuple(bool(flag) for flag in said.tolist())

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add up over the processes, in place; one exchange for all tensors, which lie on one device.

        Whole numbers travel as float32, exact up to 2**24.
        """
        if self.world == 1 or not tensors:
            return
        kind = reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
        flat = torch.cat([t.detach().reshape(-1).to(kind) for t in tensors])
        with _others():
            dist.all_reduce(flat)
        for tensor, piece in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.detach().copy_(piece.view(tensor.shape))

    def share_state(self, model: nn.Module) -> None:
        """Give every process the parameters and buffers of the first one's model."""
        if self.world == 1:
            return
        with _others(), torch.no_grad():
            for tensor in model.state_dict().values():
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, src=0)
                tensor.copy_(whole)

    def share_of(self, count: int) -> slice:
        """Return this process's share of `count` things in a row; shares differ by one at most."""
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)


ALONE: Final = Group()


def group() -> Group:
    """Return the group that this process is in; alone if it has joined none."""
    if dist.is_available() and dist.is_initialized():
        return Group(dist.get_rank(), dist.get_world_size())
    return ALONE


def local_rank() -> int | None:
    """Return this process's number among those that torchrun started on this machine; None without torchrun."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


@contextmanager
def joined() -> Iterator[Group]:
    """Put a process that torchrun started in a group with the others while inside; any other is alone.

    The first process alone warns: all of them read the same recipe and images.
    """
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ or dist.is_initialized():
        with silent_unless(first=group().first):
            yield group()
        return
    with _others():
        store, rank, world = next(dist.rendezvous("env://", timeout=_PATIENCE))  # type: ignore[attr-defined]  # not in torch's list
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # One torchrun keeps one store over its restarts; in it still stand the addresses of processes that died.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]  # likewise
        store = dist.PrefixStore(str(next(_meetings)), store)  # type: ignore[attr-defined]  # a program may meet again
        # Without a backend's name: gloo, and what fits the accelerators of this machine.
        dist.init_process_group(store=store, rank=rank, world_size=world, timeout=_PATIENCE)
    try:
        with silent_unless(first=group().first):
            yield group()
    finally:
        dist.destroy_process_group()


def _tried(do: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return do(), None
    except Exception as error:
        try:
            pickle.dumps(error)  # it is raised again, here and in the others
        except Exception:
            return None, RunError(f"{type(error).__name__}: {error}")
        return None, error


@contextmanager
def _others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL say in many words that somebody is gone
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RunError(f"process {os.environ.get('RANK', '0')} has lost the others of the run ({reason})") from None
