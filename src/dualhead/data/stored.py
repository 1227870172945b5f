"""Images that stay on disk: decoded when they are asked for, by worker processes where they are asked for in a row."""

from __future__ import annotations

import multiprocessing
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dualhead.data.decode import Encoded, Framing, decode_as
from dualhead.errors import RunError, UserError


class Images(Protocol):
    """N images, uint8 [N, C, H, W]: a tensor, or `StoredImages`."""

    @property
    def shape(self) -> Sequence[int]:
        """N, C, H, W."""

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: Tensor | slice, /) -> Tensor: ...


class Encodings(ABC):
    """Encoded images by position. Goes to worker processes, so it holds places on disk and no open file."""

    @abstractmethod
    def read(self, positions: NDArray[np.int64]) -> list[Encoded]:
        """The encoded images at positions, in that order, repeated where a position is."""


class Files(Encodings):
    """Image files. Millions of names lie in one tensor, which worker processes share rather than copy.

    Args:
        root: the folder in relation to which messages name a file.
        paths: the files, below it or absolute.
    """

    def __init__(self, root: Path, paths: Sequence[Path]) -> None:
        self._root = root
        names = [os.fsencode(named_from(root, path)) for path in paths]
        self._ends = torch.tensor([len(name) for name in names], dtype=torch.int64).cumsum(0)
        self._names = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8)

    def read(self, positions: NDArray[np.int64]) -> list[Encoded]:
        """See `Encodings.read`."""
        found = []
        for position in positions.tolist():
            start = int(self._ends[position - 1]) if position else 0
            name = os.fsdecode(self._names[start : int(self._ends[position])].numpy().tobytes())
            found.append(Encoded(self._root / name, name, None))
        return found


def named_from(root: Path, path: Path) -> Path:
    """A path in relation to a folder; as it is where it does not lie below, as a list of files may have it."""
    return path.relative_to(root) if path.is_relative_to(root) else path


class Rows(Encodings):
    """Rows of one column of a `datasets.Dataset`, which reads them from Arrow files that it maps into memory.

    Args:
        dataset: it.
        column: that holds the images.
        tables: names for messages, numbers of rows, and folders (for `encoded_row`) of the tables that the data set
            joins.
    """

    def __init__(self, dataset: Any, column: str, tables: Sequence[tuple[str, int, Path | None]]) -> None:
        self._dataset = dataset.select_columns([column]).with_format("arrow")
        self._names = [name for name, _, _ in tables]
        self._ends = np.cumsum([rows for _, rows, _ in tables])
        self._folders = [folder for _, _, folder in tables]

    def read(self, positions: NDArray[np.int64]) -> list[Encoded]:
        """See `Encodings.read`."""
        values = self._dataset[positions].column(0).to_pylist()
        return [self._encoded(value, row) for value, row in zip(values, positions.tolist(), strict=True)]

    def _encoded(self, value: Any, row: int) -> Encoded:
        table = int(np.searchsorted(self._ends, row, side="right"))
        first = int(self._ends[table - 1]) if table else 0
        return encoded_row(value, self._names[table], row - first, self._folders[table])


def encoded_row(value: Any, table: str, row: int, folder: Path | None) -> Encoded:
    """Content of a cell of an image column: bytes, bytes and a path, or a path.

    Args:
        value: the cell.
        table: its table's name, for messages.
        row: its number there.
        folder: that of the table, to which paths may be relative.
    """
    content = value if isinstance(value, bytes | str | None) else value.get("bytes")
    if content is None and isinstance(value, dict):
        content = value.get("path") or None
    if isinstance(content, str):
        beside = None if folder is None else folder / content
        content = beside if beside is not None and beside.exists() else Path(content)
    return Encoded(content, table, row)


@dataclass(frozen=True, eq=False)
class StoredImages:
    """Images on disk, which stand where a tensor of them would: indexing decodes what is asked for.

    Args:
        encodings: where they are.
        rows: which of those, int64 [N].
        framing: how they come to one size.
        decoded: channels, height and width of all of them.
        workers: processes that decode for `in_turn`; 0: this one decodes.
        middle: height and width of the middle part that is shown; None: all.
    """

    encodings: Encodings
    rows: Tensor
    framing: Framing
    decoded: tuple[int, int, int]
    workers: int = 0
    middle: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, C, H, W."""
        return len(self.rows), self.decoded[0], *(self.middle or self.decoded[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, positions: Tensor) -> StoredImages:
        """The images at the given positions, int64 [M]; nothing is decoded."""
        return replace(self, rows=self.rows[positions.cpu()])

    def show_middle(self, height: int, width: int) -> StoredImages:
        """The middle of each image."""
        return replace(self, middle=(height, width))

    def __getitem__(self, chosen: Tensor | slice, /) -> Tensor:
        """Decode some images: positions int64 [M], or a range; uint8 [M, C, H, W].

        Raises:
            UserError: naming an image that cannot be read or is unlike the others.
        """
        rows = self.rows[chosen.cpu() if isinstance(chosen, Tensor) else chosen]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return self._decode(rows.numpy(), pool)

    def _decode(self, rows: NDArray[np.int64], pool: ThreadPoolExecutor | None = None) -> Tensor:
        images = torch.from_numpy(decode_as(self.encodings.read(rows), self.framing, self.decoded, pool))
        return images if self.middle is None else middle(images, *self.middle)

    def in_turn(self, pieces: Sequence[Tensor], device: torch.device | str) -> Iterator[Tensor]:
        """`self[piece]` for one piece after another, decoded ahead by worker processes.

        Args:
            pieces: positions, int64 [M] each.
            device: where the images go.

        Raises:
            UserError: as for `__getitem__`.
            RunError: if a worker process dies.
        """
        if not self.workers or not pieces:
            yield from (self[piece].to(device) for piece in pieces)
            return
        away = torch.device(device).type != "cpu"
        loader: DataLoader[Any] = DataLoader(
            _Pieces(self),
            batch_size=None,
            sampler=[self.rows[piece.cpu()].numpy() for piece in pieces],
            num_workers=min(self.workers, len(pieces)),
            multiprocessing_context=_context(),
            worker_init_fn=_leave_interrupts_alone,
            pin_memory=away,
            generator=torch.Generator(),  # or it would draw from torch's own, and dropout with it
        )
        try:
            for found in loader:
                if isinstance(found, UserError):
                    raise found
                yield found.to(device, non_blocking=away)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise RunError(
                f"a process that decodes images has died ({reason}); memory, or shared memory (/dev/shm), may be too "
                "small: lower data.workers (0: no such processes), or the batch size"
            ) from error


class _Pieces(Dataset[Any]):
    """Pieces as a worker process reads them: the images of each, or the error that says why not."""

    def __init__(self, images: StoredImages) -> None:
        self._images = images

    def __getitem__(self, rows: NDArray[np.int64]) -> Tensor | UserError:
        try:
            return self._images._decode(rows)
        except UserError as error:  # raised here it would come out with a traceback for its message
            return error


def _context() -> Any:
    """Starts processes afresh: a copy of one that has threads, or an accelerator, may hang."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dualhead.data"])
    return context


def _leave_interrupts_alone(worker: int) -> None:
    """Ctrl-C goes to all processes of a terminal; the one that trains ends its workers when it has saved itself."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def middle(images: Tensor, height: int, width: int) -> Tensor:
    """The middle [..., height, width] of images [..., H, W], which are at least as large."""
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def in_turn(images: Images, pieces: Sequence[Tensor], device: torch.device | str) -> Iterator[Tensor]:
    """`images[piece]` for one piece after another, on a device; stored images are decoded ahead.

    Args:
        images: uint8 [N, C, H, W].
        pieces: positions, int64 [M] each.
        device: where the images go.
    """
    if isinstance(images, StoredImages):
        yield from images.in_turn(pieces, device)
    else:
        for piece in pieces:
            yield images[piece].to(device)
