"""What a run's folder holds, and whether a recipe and its images may go on with it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch.nn import functional

from dualhead.data import Digests, Split, digests, one_form
from dualhead.errors import UserError
from dualhead.recipe import Recipe, read_recipe_file
from dualhead.saving import CONFIG, read_config
from dualhead.system.files import check_folder, write_atomically
from dualhead.system.lock import NAME as LOCK

_HOW = re.compile(r"data\.(workers|stream)|runtime\.(save_minutes|tensorboard)|stages\.\d+\.checkpoint_activations")
"""Keys that say how the work is done, and nothing of what comes of it."""
_MAY_CHANGE = re.compile(rf"{_HOW.pattern}|stages\.\d+\.micro_batch")
"""Keys that may change while a run goes on, as on a machine that has too little memory; with batch norm `micro_batch`
also says a little of what comes of it."""
DIGESTS = "images.safetensors"
"""In `checkpoints/`: a number for each image that the run learns from."""
SKETCHED = 128
"""Images of which a run keeps a thumbnail."""
DECODERS_DIFFER = 2
"""By how much of 255 the thumbnails of one image may, from one library to another."""


def read_recipe(folder: Path) -> Recipe:
    """The resolved recipe of a run.

    Raises:
        UserError: if the folder holds no run.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: holds no run (config.yaml is missing)")
    return read_recipe_file(path)


def changes(folder: Path, recipe: Recipe, option: str = "--run-dir") -> dict[str, Any]:
    """In what a recipe differs from that of the run in a folder, of all that may change while a run goes on.

    Args:
        folder: of a run, or one that is new or empty.
        recipe: in full.
        option: what chose the folder.

    Returns:
        The recipe's values by dotted key; none where there is no run yet.

    Raises:
        UserError: if the folder holds a run of a recipe that differs in anything else, or something that is no run.
    """
    check_folder(folder, option)
    if not (folder / "config.yaml").is_file():
        if folder.is_dir() and not _unused(folder):
            raise UserError(f"{folder}: holds something that is not a run; choose another {option}")
        return {}
    found = dict(_differences(read_recipe(folder).resolved(), recipe.resolved()))
    different = sorted(key for key in found if not _MAY_CHANGE.fullmatch(key))
    if different:
        more = f" and {len(different) - 4} more" if len(different) > 4 else ""
        raise UserError(
            f"{folder}: holds a run of another recipe, which differs in {', '.join(different[:4])}{more}; "
            f"choose another {option}"
        )
    return found


def _unused(folder: Path) -> bool:
    """Whether nothing lies in a folder but what a run leaves there that was ended while it made the folder."""
    written = (path for path in folder.rglob("*") if path.is_file())
    aside = (".", ".tmp")  # as `write_atomically` calls what it has not finished
    return all(
        path.name.startswith(LOCK) or (path.name[0], path.suffix) == aside or path == folder / "checkpoints" / CONFIG
        for path in written
    )


def without_how(recipe: Any, place: str = "") -> Any:
    """A plain recipe, less the keys that say how the work is done and nothing of what comes of it."""
    if isinstance(recipe, dict):
        inside = ((key, f"{place}.{key}" if place else str(key), value) for key, value in recipe.items())
        kept = ((key, at, value) for key, at, value in inside if not _HOW.fullmatch(at))
        return {key: without_how(value, at) for key, at, value in kept}
    if isinstance(recipe, list):
        return [without_how(value, f"{place}.{index}") for index, value in enumerate(recipe)]
    return recipe


def data_facts(split: Split) -> dict[str, Any]:
    """What tells training images from others at little cost: JSON values, for `checkpoints/config.json`."""
    return {
        "classes": list(split.class_names),
        "images": len(split),
        "labels": hashlib.sha256(split.labels.cpu().numpy().tobytes()).hexdigest(),
        "sketch": _sketch(split).numpy().tobytes().hex(),
    }


def write_digests(folder: Path, sets: Mapping[str, Split | None]) -> None:
    """Keep a number for each image that a run learns from, to find those that it is measured on later.

    Args:
        folder: of the run.
        sets: by what they are for; those on disk are left out, since all would have to be decoded.
    """
    found = {name: digests(split) for name, split in sets.items() if split is not None and not split.is_stored}
    write_atomically(folder / "checkpoints" / DIGESTS, lambda aside: save_file(found, aside))


def read_digests(folder: Path) -> dict[str, Digests]:
    """The numbers that `write_digests` kept; none for a run of a version that did not."""
    path = folder / "checkpoints" / DIGESTS
    if not path.is_file():
        return {}
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it to go without the check for duplicates") from None


def _sketch(split: Split) -> torch.Tensor:
    """Some images, evenly spread, as 2x2 grey pixels: uint8.

    One image that comes or goes moves all behind it; as thumbnails they are the same for any decoder of JPEG.
    """
    chosen = torch.linspace(0, len(split) - 1, min(len(split), SKETCHED)).round().to(torch.int64)
    grey = split.images[chosen].float().mean(1, keepdim=True)
    return functional.adaptive_avg_pool2d(grey, 2).round().to(torch.uint8).flatten()


def _alike(sketch: str, other: str) -> bool:
    a, b = bytes.fromhex(sketch), bytes.fromhex(other)
    return len(a) == len(b) and all(abs(x - y) <= DECODERS_DIFFER for x, y in zip(a, b, strict=True))


def refuse_other_data(folder: Path, now: dict[str, Any], source: str, part: str = "data") -> None:
    """Refuse to go on with a run on other images: held-out ones might be among those it was trained on.

    Args:
        folder: of the run; one that is new, or of a version that did not write the facts down, refuses nothing.
        now: `data_facts` of all training images, the held-out ones included; or of those of `data.extra`.
        source: as the recipe names it.
        part: the key of `checkpoints/config.json` under which such facts lie.

    Raises:
        UserError: saying what differs.
    """
    checkpoints = folder / "checkpoints"
    if not (folder / "config.yaml").is_file() or not (checkpoints / CONFIG).is_file():
        return
    before = now | read_config(checkpoints).get(part, {})
    before["classes"] = [one_form(name) for name in before["classes"]]  # an earlier version took a disk's form
    now = {**now, "classes": [one_form(name) for name in now["classes"]]}
    different = [key for key in now if before[key] != now[key]]
    if different == ["sketch"] and _alike(before["sketch"], now["sketch"]):
        return
    if different:
        told = {
            "classes": f"the classes {_listed(now['classes'])} in place of {_listed(before['classes'])}",
            "images": f"{now['images']:,} training images in place of {before['images']:,}",
            "labels": "other labels than those",
            "sketch": "other images than those",
        }[different[0]]
        raise UserError(
            f"{'data.source' if part == 'data' else part} {source}: has {told} with which the run in {folder} began; "
            "put them back, or choose another --run-dir"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _differences(before: Any, now: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys in which two plain structures differ, with the second one's values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from _differences(before.get(key), now.get(key), f"{place}.{key}" if place else str(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(*pair, f"{place}.{index}")
    elif before != now:
        yield place, now
