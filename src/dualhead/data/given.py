"""Images and labels that a program holds: a source of data like a file, named by a digest of what they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dualhead.errors import UserError

GIVEN: Final = "given:"
"""Begins the name of a source that a program holds."""

Labelled = tuple[NDArray[Any], NDArray[Any]]
"""Images and labels."""


@dataclass(frozen=True, eq=False)
class GivenImages:
    """The parts of a data set that a program holds.

    Args:
        parts: of `train` and `test`: images [N, C, H, W], [N, H, W, C] or [N, H, W] with labels [N], as
            `dualhead.data.arrays` takes them from a file, or the name of a source.
        class_names: in the order of the labels; None for numbers.
    """

    parts: Mapping[str, Labelled | str]
    class_names: tuple[str, ...] | None = None

    @property
    def source(self) -> str:
        """Return the name of these images, which equal ones share."""
        known = hashlib.sha256(repr(self.class_names).encode())
        for part, content in sorted(self.parts.items()):
            known.update(part.encode())
            for piece in (content,) if isinstance(content, str) else content:
                known.update(piece.encode() if isinstance(piece, str) else _bytes(piece))
        return f"{GIVEN}{known.hexdigest()[:24]}"


def _bytes(values: NDArray[Any]) -> bytes:
    return f"{values.dtype} {values.shape}".encode() + np.ascontiguousarray(values).tobytes()


_held: dict[str, GivenImages] = {}


@contextmanager
def holding(images: GivenImages | None) -> Iterator[None]:
    """Let recipes name these images by `images.source` while inside."""
    if images is None:
        yield
        return
    name = images.source
    before = _held.get(name)
    _held[name] = images
    try:
        yield
    finally:
        if before is None:
            del _held[name]


def held(source: str) -> GivenImages:
    """Return the images of a name.

    Raises:
        UserError: if nobody holds them now.
    """
    if source not in _held:
        raise UserError(
            "these images were given in Python, and are not stored; give equal ones to dualhead.fit again, or name "
            "others (evaluate, gallery, play: --data)"
        )
    return _held[source]
