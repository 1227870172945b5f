"""Where a second head can start: what `dualhead layers` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dualhead.errors import UserError
from dualhead.heads.splitting.base import Cut, How, is_shape_only, undisturbed
from dualhead.heads.splitting.cut import (
    NOTHING_BEHIND,
    attempt,
    attempt_checked,
    backward_of,
    calls_complaint,
    check_pass,
    pass_of,
    two_images,
)

_USUAL, _STAGE_BONUS = 0.3, 0.15
"""Share of the cost in front of the paper's cut (a third of WRN-34-10, after block 1); weight of a stage's end."""


@dataclass(frozen=True)
class LayerInfo:
    """A layer at whose output a second head might start.

    Args:
        name: name of the submodule.
        shapes: shapes of the tensors that cross the cut, without the batch; the layer's own output comes first.
        parameters_before: numbers in the trunk's parameters.
        parameters_after: numbers in a head's parameters: what a second head adds.
        cost_after: share of one forward pass's floating-point operations behind the layer, in [0, 1].
        how: the way of cutting that serves (see `Cut`), or None.
        why_not: why it cannot be cut there; empty if it can.
        recommended: whether this is the layer to begin with.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    parameters_before: int
    parameters_after: int
    cost_after: float
    how: How | None
    why_not: str = ""
    recommended: bool = False


def layers(model: nn.Module, example: Tensor) -> list[LayerInfo]:
    """Return the layers at which a second head can start, in the order of the forward pass.

    Listed are stages and blocks: the model's submodules (of a network within a wrapper, its own), and inwards as far as
    submodules hold lists of blocks. Of layers between which nothing costly happens, one is listed. A submodule within a
    block, where a residual connection has to cross too, can be cut as well and is not listed. Cuts are checked in
    evaluation mode, on one image, and the one recommended in full, as `split_model` does.

    One is recommended: where about 30 % of the cost is done, preferably at the end of a stage, that is, before the
    shape changes. On WRN-34-10 this is block 1, as in the paper.

    Args:
        model: images to logits; left as it is.
        example: images [B, ...] that the model accepts; one is used.

    Raises:
        UserError: if no layer can be cut.
    """
    images = example[:1]
    expected = backward_of(model, images, False) or pass_of(model, images, False, backward=False)
    done, calls = _costs(model, images)

    def check(cut: Cut) -> None:
        check_pass(cut, images, False, expected)

    def check_in_full(info: LayerInfo) -> LayerInfo:
        cut = attempt_checked(model, info.name, two_images(example), calls[info.name])
        if isinstance(cut, str):
            return LayerInfo(info.name, (), 0, 0, info.cost_after, None, cut)
        return info if cut.how == info.how else _info(cut, images, info.cost_after)

    found = []
    for name in _distinct([name for name in _candidates(model) if done.get(name, 0) > 0], done):
        cut = calls_complaint(calls[name]) or attempt(model, name, images, (False,), check)
        cost_after = 1 - done[name] / done[""]
        if isinstance(cut, Cut):
            found.append(_info(cut, images, cost_after))
        elif cut != NOTHING_BEHIND:
            found.append(LayerInfo(name, (), 0, 0, cost_after, None, cut))
    return _with_recommendation(_without_insides(found), check_in_full)


def _info(cut: Cut, images: Tensor, cost_after: float) -> LayerInfo:
    with undisturbed(images, cut.trunk):
        features = cut.trunk.eval()(images.clone())
    crossing = (features,) if isinstance(features, Tensor) else features
    shapes = tuple(tuple(f.shape[1:]) for f in crossing if not is_shape_only(f))
    before, after = (sum(p.numel() for p in part.parameters()) for part in (cut.trunk, cut.tail))
    return LayerInfo(cut.at, shapes, before, after, cost_after, cut.how)


def _distinct(names: list[str], done: dict[str, int]) -> list[str]:
    """Keep one layer of each group that costs the same: the outermost, and of those the last to run."""
    kept: dict[int, str] = {}
    for name in sorted(names, key=list(done).index):
        other = kept.get(done[name])
        if other is None or name.count(".") <= other.count("."):
            kept[done[name]] = name
    return list(kept.values())


def _without_insides(found: list[LayerInfo]) -> list[LayerInfo]:
    """Leave out layers inside a block, where more crosses than at the block's end: a residual connection, say."""
    crossing = {info.name: len(info.shapes) for info in found if info.how is not None}

    def inside(info: LayerInfo) -> bool:
        path = info.name.split(".")
        blocks = [".".join(path[:i]) for i in range(len(path) - 1, 0, -1) if path[i - 1].isdigit()]
        nearest = next((crossing[block] for block in blocks if block in crossing), None)
        return nearest is not None and len(info.shapes) > nearest

    return [info for info in found if not inside(info)]


def _candidates(model: nn.Module) -> list[str]:
    """Return stages and blocks: submodules, and inwards as far as they hold lists of alike submodules.

    A network within a wrapper, such as one behind a normalisation, is looked into as if it stood alone.
    """
    names: list[str] = []

    def descend(module: nn.Module, prefix: str, wraps: bool) -> None:
        learning = [child for child in module.children() if next(child.parameters(), None) is not None]
        wraps = wraps and len(learning) == 1
        for name, child in module.named_children():
            names.append(prefix + name)
            wrapped = wraps and child is learning[0]
            if wrapped or isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict) or _holds_blocks(child):
                descend(child, f"{prefix}{name}.", wrapped)

    descend(model, "", True)
    return names


def _holds_blocks(module: nn.Module) -> bool:
    """Whether a list of submodules of one class, which themselves hold submodules, lies within."""
    for held in module.modules():
        if isinstance(held, nn.Sequential | nn.ModuleList):
            kinds = Counter(type(child) for child in held.children() if next(child.children(), None) is not None)
            if any(count > 1 for count in kinds.values()):
                return True
    return False


def _costs(model: nn.Module, images: Tensor) -> tuple[dict[str, int], Counter[str]]:
    """Run one forward pass: floating-point operations done when each submodule has run, and how often it ran.

    The whole model's name is ''.
    """
    done: dict[str, int] = {}
    calls: Counter[str] = Counter()
    counter = FlopCounterMode(display=False)

    def passed(name: str) -> None:
        done[name] = counter.get_total_flops()
        calls[name] += 1

    handles = [m.register_forward_hook(lambda *_, name=name: passed(name)) for name, m in model.named_modules()]
    try:
        with undisturbed(images, model), counter:
            model.eval()(images.clone())
    finally:
        for handle in handles:
            handle.remove()
    return done, calls


def _with_recommendation(found: list[LayerInfo], check_in_full: Callable[[LayerInfo], LayerInfo]) -> list[LayerInfo]:
    """Mark the layer to begin with; of equals the outermost. What a full check finds otherwise is put right."""
    while True:
        best = _best(found)
        checked = check_in_full(found[best])
        if checked.how == found[best].how:
            return [replace(info, recommended=i == best) for i, info in enumerate(found)]
        found = [*found[:best], checked, *found[best + 1 :]]


def _best(found: list[LayerInfo]) -> int:
    usable = [i for i, info in enumerate(found) if info.how is not None and info.how != "functional"] or [
        i for i, info in enumerate(found) if info.how is not None
    ]
    if not usable:
        reason = f": {found[0].name}: {found[0].why_not}" if found else ""
        raise UserError(f"the model can be cut at none of its layers{reason}")

    def distance(index: int) -> tuple[float, int]:
        info = found[index]
        later = next(
            (other for other in found[index + 1 :] if other.cost_after < info.cost_after and other.shapes), None
        )
        ends_stage = later is not None and later.shapes[:1] != info.shapes[:1]
        return round(abs(1 - info.cost_after - _USUAL) - _STAGE_BONUS * ends_stage, 6), len(info.name)

    return min(usable, key=distance)
