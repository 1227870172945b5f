"""Helpers that poisons with a trigger share: which images carry it, and the patch."""

from __future__ import annotations

import torch
from torch import Tensor

from dualhead.data.poisons.base import choose, members
from dualhead.data.split import Split
from dualhead.errors import UserError


def backdoored(clean: Split, target: int, share: float | None, seed: int, *, clean_label: bool) -> Tensor:
    """Return the positions of the images that carry a trigger, int64 [M].

    Args:
        clean: all images.
        target: the class.
        share: of all images, drawn from the other classes; with `clean_label` of the class. None: 0.05 and 0.5.
        seed: of the choice.
        clean_label: images of the class alone.

    Raises:
        UserError: if there are not as many.
    """
    if clean_label:
        candidates = members(clean, target)
        return choose(candidates, round((0.5 if share is None else share) * len(candidates)), seed)
    candidates = (clean.labels != target).nonzero()[:, 0]
    return choose(candidates, round((0.05 if share is None else share) * len(clean)), seed)


def add_patch(images: Tensor, size: int, gap: int, pattern: str) -> Tensor:
    """Return images with a patch at the bottom right.

    Args:
        images: uint8 [B, C, H, W].
        size: its side.
        gap: pixels between it and the edges.
        pattern: `white`, or `checker`, which is white in its corners and centre and black between.

    Raises:
        UserError: if it does not fit into the images.
    """
    height, width = images.shape[2:]
    if size + gap > min(height, width):
        raise UserError(f"a patch of {size} pixels with a gap of {gap} does not fit into {height}x{width}")
    lit = torch.ones(size, size, dtype=torch.bool)
    if pattern == "checker":
        steps = torch.arange(size)
        lit = (steps[:, None] + steps) % 2 == 0
    marked = images.clone()
    rows = slice(height - gap - size, height - gap)
    columns = slice(width - gap - size, width - gap)
    marked[:, :, rows, columns] = lit.to(torch.uint8) * 255
    return marked
