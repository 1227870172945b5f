"""What is asked of a data set, and images as they come from its files: in memory, cached, or left on disk."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dualhead.data import cache
from dualhead.data.decode import FULL_DEPTH, Encoded, Framing, decode, decode_readable, unreadable
from dualhead.data.files import Part
from dualhead.data.split import Split, held_rows
from dualhead.data.stored import Encodings, StoredImages
from dualhead.errors import UserError, under
from dualhead.noise import Streams

ROWS: Final = 1024  # read at once
PROBED: Final = 64  # images, evenly spread, that tell whether a set on disk is grey
_TEST_SEED: Final = 0  # the test part is the same whatever the seed of a run

_log = logging.getLogger(__name__)

Choice = Literal["first", "sample"]


@dataclass(frozen=True)
class Storage:
    """Where the images of a set are while they are used.

    Args:
        stream: True: on disk, decoded when they are needed; False: decoded into memory; None: on disk if they would
            take more than `room` in memory.
        room: bytes; None: any number.
        workers: processes that decode streamed images; 0: the one that uses them decodes.
    """

    stream: bool | None = None
    room: int | None = None
    workers: int = 0

    def streams(self, count: int, shape: Callable[[], tuple[int, int, int]]) -> bool:
        """Whether so many images of such a shape stay on disk."""
        if self.stream is not None:
            return self.stream
        if self.room is None:
            return False
        size = count * math.prod(shape())
        if size > self.room:
            _log.info("%d images take %d bytes decoded, more than %d: read from disk", count, size, self.room)
        return size > self.room


IN_MEMORY: Final = Storage()


@dataclass(frozen=True)
class Options:
    """Which images of a data set are asked for, and how: the arguments of `load_split`."""

    part: Part
    image_column: str | None
    label_column: str | None
    framing: Framing
    skip: bool
    test: float | None
    limit: int | None
    choice: Choice

    def chosen(self, labels: NDArray[np.int64], names: Sequence[str], *, shared: bool) -> NDArray[np.int64]:
        """Positions of the images that are used, of all that have these labels, in order.

        Args:
            labels: of all.
            names: of the classes.
            shared: they are the images of both parts.
        """
        rows: NDArray[np.int64] = np.arange(len(labels))
        if shared and self.test is not None:
            with under("data.test"):
                held = held_rows(torch.from_numpy(labels), names, self.test, _TEST_SEED, "test_part")
            rows = (held if self.part == "test" else ~held).nonzero()[:, 0].numpy()
        count = len(rows) if self.limit is None else min(self.limit, len(rows))
        if self.choice == "first" or count == len(rows):
            return rows[:count]
        lot = Streams.of(0, torch.arange(len(rows))).fork("train_limit").bits(1)[:, 0]
        sample: NDArray[np.int64] = rows[np.sort(lot.argsort(stable=True)[:count].numpy())]
        return sample

    def for_cache(self) -> list[object]:
        """All that decides what is decoded, as plain values."""
        return [list(values) if isinstance(values, tuple) else values for values in astuple(self)]


def cached(files: Sequence[Path], options: Options, extra: object, make: Callable[[], Split]) -> Split:
    """Read from the cache what was made of these files with these options; make and write it the first time."""
    key = cache.key_of(files, [options.for_cache(), extra])
    split = cache.read(key)
    if split is None:
        split = make()
        cache.write(key, split)
    return split


def in_memory(encoded: Iterable[Encoded], labels: torch.Tensor, names: Sequence[str], options: Options) -> Split:
    """Decoded images and their labels, without those that cannot be read, if these are to be skipped."""
    decoded = decode_readable(encoded, options.framing, skip=options.skip)
    if len(decoded.pixels) + len(decoded.unreadable) != len(labels):
        raise UserError(f"is damaged: {len(labels)} labels, but {len(decoded.pixels)} images")
    kept = _without(decoded.unreadable, labels, names)
    return Split(torch.from_numpy(decoded.pixels), labels[kept], tuple(names), tuple(decoded.unreadable.values()))


def _without(unreadable: Mapping[int, str], labels: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """Bool [N]: the images that can be read."""
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[list(unreadable)] = False
    gone = set(labels.tolist()) - set(labels[kept].tolist())
    if gone:
        raise UserError(f"class {names[min(gone)]!r} has no image that can be read: {next(iter(unreadable.values()))}")
    return kept


def shape_like(first: Encoded, options: Options) -> tuple[int, int, int]:
    """Three channels, and the height and width that images have: the given ones, else those of the first."""
    height, width = options.framing.size or decode([first], Framing(depth=FULL_DEPTH)).shape[2:]
    return options.framing.channels or 3, height, width


def stored(
    encodings: Encodings, rows: torch.Tensor, labels: torch.Tensor, names: Sequence[str], options: Options,
    storage: Storage,
) -> Split:  # fmt: skip
    """Images that stay on disk; a sample of them tells channels, size and depth."""
    skipped: dict[int, str] = {}
    if options.skip:
        _log.info("reading %d images to find those that cannot be read", len(rows))
        for first in range(0, len(rows), ROWS):
            piece = encodings.read(rows[first : first + ROWS].numpy())
            one_size = replace(options.framing, size=(1, 1), depth=options.framing.depth or FULL_DEPTH)
            skipped |= {first + n: reason for n, reason in unreadable(piece, one_size).items()}
        kept = _without(skipped, labels, names)
        rows, labels = rows[kept], labels[kept]
    probed = rows[torch.linspace(0, len(rows) - 1, min(PROBED, len(rows)), dtype=torch.float64).round().long()]
    _, channels, height, width = decode(encodings.read(probed.numpy()), options.framing).shape
    images = StoredImages(encodings, rows, options.framing, (channels, height, width), storage.workers)
    return Split(images, labels, tuple(names), tuple(skipped.values()))
