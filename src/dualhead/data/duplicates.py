"""Images that occur in two sets, pixel by pixel."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dualhead.data.split import Split

Digests = NDArray[np.uint64]


class Shared(NamedTuple):
    """Images of one set that are in another too.

    Attributes:
        of: the name of the set.
        also: the name of the other.
        number: how many of its images.
        total: of how many.
        first: the position of the first one.
    """

    of: str
    also: str
    number: int
    total: int
    first: int


def digests(split: Split) -> Digests:
    """A number for each image, equal where shape and pixels are: uint64 [N]. Images on disk are all decoded for it."""
    shape = str(tuple(split.image_shape)).encode()
    found = [
        hashlib.blake2b(image.tobytes(), digest_size=8, person=shape[:16]).digest()
        for piece in torch.split(torch.arange(len(split)), 1024)
        for image in split.images[piece].cpu().numpy()
    ]
    return np.frombuffer(b"".join(found), np.uint64)


def shared_images(sets: Mapping[str, Digests]) -> list[Shared]:
    """The images that occur in several sets.

    Args:
        sets: `digests` of each, those that are measured on last.

    Returns:
        For each pair that shares some, what the later one has of the earlier one.
    """
    found = []
    for (also, theirs), (of, ours) in combinations(sets.items(), 2):
        hits = np.isin(ours, theirs).nonzero()[0]
        if len(hits):
            found.append(Shared(of, also, len(hits), len(ours), int(hits[0])))
    return found
