"""Layer-wise decay of the learning rate: the nearer a layer is to the images, the smaller its steps."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from dualhead.errors import UserError
from dualhead.training.optimisation import LR_SCALE
from dualhead.training.passes import Passes

_PART = re.compile(r"^(trunk|head\d+)\.")
_BLOCK = re.compile(r"(?:^|.*?\.)(?:layers?|blocks?|stages?)\.\d+(?:\.(?:layers?|blocks?)\.\d+)?(?=\.)")
_FIRST = re.compile(r"embed|_token\b|stem|pre_layrnorm|norm_pre")
"""Names of what lies in front of the first block: patch and position embeddings, class and mask tokens."""


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Return the factor of the learning rate of each parameter of a transformer, by its name in the model.

    As in BEiT (Bao et al. 2022): with n blocks, embeddings have decay^(n + 1), block i of 1 ... n has
    decay^(n + 1 - i), and whatever comes after the blocks has 1. Blocks are found by their names (`layers.3`,
    `blocks.3`, `stages.1.blocks.3`). A block of a second head
    counts as the one of the first head that it stands beside.

    Args:
        model: a classifier, with one head or several.
        decay: factor from one block to the one before it, in (0, 1].

    Raises:
        UserError: if the model has fewer than two such blocks, or no embeddings.
    """
    parts = {name: _PART.sub("", name) for name, _ in model.named_parameters()}
    found = {name: match[0] for name, bare in parts.items() if (match := _BLOCK.match(bare))}
    names = sorted(set(found.values()), key=_natural)
    holders = {block for block in names if any(other.startswith(f"{block}.") for other in names)}
    order = {block: number for number, block in enumerate((n for n in names if n not in holders), start=1)}
    for stage in holders:  # what reduces the tokens behind the blocks of a stage goes with the last of these
        order[stage] = max(order[block] for block in order if block.startswith(f"{stage}."))
    if len(set(order.values())) < 2 or not any(_FIRST.search(bare) for bare in parts.values()):
        raise UserError(
            "is for transformers, with embeddings and blocks that are called layers.0, blocks.0 or alike; this model "
            "has none; leave it out"
        )
    top = max(order.values()) + 1
    scales = {}
    for name, bare in parts.items():
        depth = order[found[name]] if name in found else 0 if _FIRST.search(bare) else top
        scales[name] = decay ** (top - depth)
    return scales


def decayed_groups(passes: Passes, decay: float) -> list[dict[str, Any]]:
    """Return what learns as groups for an optimiser, each with the factor of its rate, the largest factor first.

    Modules of the objective's own have factor 1. Errors as those of `layer_scales`.
    """
    scales = layer_scales(passes.model, decay)
    own = {id(parameter): scales[name] for name, parameter in passes.model.named_parameters()}
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in passes.parameters():
        groups.setdefault(own.get(id(parameter), 1.0), []).append(parameter)
    return [{"params": groups[scale], LR_SCALE: scale} for scale in sorted(groups, reverse=True)]
