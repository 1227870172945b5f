"""The folder of a run: its layout, and whether a recipe and its images may go on with what lies in it."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.nn import functional

from dualhead.components import plugins
from dualhead.data import GIVEN, Digests, Poisoned, Split, digests, one_form
from dualhead.errors import UserError
from dualhead.evaluation import write_arrays
from dualhead.models import load_state, read_state
from dualhead.names import row_folder
from dualhead.recipe import Recipe, read_recipe_file
from dualhead.saving import CONFIG, Architecture, read_config, write_config
from dualhead.system.files import check_folder, write_atomically, write_json, write_text
from dualhead.system.lock import NAME as LOCK
from dualhead.system.lock import FolderLock
from dualhead.system.processes import group
from dualhead.training import Stage

_log = logging.getLogger(__name__)

_HOW = re.compile(
    r"data\.(workers|stream)|evaluate\.(clean_model|outputs)|runtime\.(save_minutes|tensorboard)|stages\.\d+\.checkpoint_activations"
)
"""Keys that do not change results: speed, memory, logging, and what else is measured."""
MAY_CHANGE = re.compile(rf"{_HOW.pattern}|stages\.\d+\.micro_batch")
"""Keys that may change while a run goes on, as on a machine that has too little memory; with batch norm `micro_batch`
changes results a little."""
PLUGINS = "plugins"
"""Folder with a copy of each source file from outside, and the name of the JSON file that lists them."""
GALLERY = "gallery.npz"
"""Images under attack, for the report; it lies beside the results of an evaluation."""
SHOWN = 8
"""Poisoned images that the record keeps for the report, before and after."""
SKETCHED = 128
"""Images of which a run keeps a thumbnail."""
DECODERS_DIFFER = 2
"""By how much of 255 the thumbnails of one image may, from one library to another."""


@dataclass(frozen=True)
class RunFolder:
    """Paths in the folder of a run.

    Args:
        path: the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """Return the resolved recipe's path; where it lies, a run has begun."""
        return self.path / "config.yaml"

    @property
    def begun(self) -> bool:
        """Tell whether a run has begun here."""
        return self.config.is_file()

    @property
    def environment(self) -> Path:
        """Return the path of versions, machine and arithmetic."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """Return the path of the log of epochs."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Return the folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def profile(self) -> Path:
        """Return the folder of profiles."""
        return self.path / "profile"

    @property
    def checkpoints(self) -> Path:
        """Return the folder of weights by stage, beside facts about network and images."""
        return self.path / "checkpoints"

    @property
    def states(self) -> Path:
        """Return the folder of states that an unfinished run goes on from."""
        return self.checkpoints / "states"

    @property
    def digests(self) -> Path:
        """Return the path of a number for each image that the run learns from."""
        return self.checkpoints / "images.safetensors"

    @property
    def poison(self) -> Path:
        """Return the path of the record of a poison: which training images it changed, and how."""
        return self.path / "poison.npz"

    @property
    def crafted(self) -> Path:
        """Return the folder of the surrogates of a poison, and of what was found with them."""
        return self.path / "poison"

    @property
    def evaluations(self) -> Path:
        """Return the folder of later evaluations, each in its own."""
        return self.path / "evaluations"

    def weights(self, stage: str, which: str) -> Path:
        """Return the path of a stage's weights, `best` or `last`."""
        return self.checkpoints / stage / f"{which}.safetensors"

    def summary(self, stage: str) -> Path:
        """Return the path of what a finished stage cost and reached; where it lies, the stage is finished."""
        return self.checkpoints / stage / "summary.json"

    @property
    def model(self) -> Path:
        """Return the folder of the finished model."""
        return self.path / "model"

    @property
    def comparison(self) -> Path:
        """Return the path of all rows side by side."""
        return self.path / "comparison.json"

    @property
    def evaluation(self) -> Path:
        """Return the folder of the deployed output's results."""
        return self.path / "evaluation"

    def row(self, name: str) -> Path:
        """Return the folder of another row's results, by the row's name."""
        return self.evaluation / "rows" / row_folder(name)

    def visit(self, stage: str) -> Path:
        """Return the folder of what was measured after a stage of a sequence."""
        return self.evaluation / "sequence" / stage

    @property
    def gallery(self) -> Path:
        """Return the path of images under attack, for the report."""
        return self.evaluation / GALLERY

    @property
    def report(self) -> Path:
        """Return the path of the report, the last file that a run writes."""
        return self.path / "report.html"


@contextmanager
def taken(folder: RunFolder) -> Iterator[None]:
    """Keep other runs out of a folder while inside; of several processes the first one holds the lock.

    Raises:
        UserError: if another run works there.
    """
    with ExitStack() as held:

        def take() -> None:
            held.enter_context(FolderLock(folder.path))

        group().lead(take)
        yield


def open_folder(folder: RunFolder, recipe: Recipe, architecture: Architecture, facts: Mapping[str, Any]) -> None:
    """Write down what a new run is; for a run that goes on, remove unfinished files and note changed keys.

    Args:
        folder: held by this process.
        recipe: in full.
        architecture: of the network.
        facts: about model and images, for `checkpoints/config.json`.

    Raises:
        UserError: if the folder holds something else by now.
    """
    # Again, since another process may have been here before the folder was locked.
    changed = changes(folder.path, recipe)
    for unfinished in folder.path.rglob(".*.tmp"):  # of a process that was killed while it wrote
        unfinished.unlink()
    if changed:
        told = ", ".join(f"{key}={value}" for key, value in sorted(changed.items()))
        _log.warning("%s: goes on with %s", folder.path, told)
    elif folder.begun:
        return
    else:
        keep_plugins(folder.path, plugins.sources_in(recipe.resolved()))
        write_config(folder.checkpoints, architecture, facts)
    write_text(folder.config, yaml.safe_dump(recipe.resolved(), sort_keys=False))


def load_kept(folder: RunFolder, stage: Stage, model: nn.Module) -> None:
    """Load into a network the weights that a finished stage keeps."""
    path = folder.weights(stage.name, stage.keep)
    load_state(model, group().lead(lambda: read_state(path)), str(path))


def load_stage(path: Path, stage: str | None = None, checkpoint: str | None = None) -> tuple[nn.Module, str]:
    """Load the network of a run as a finished stage left it.

    Args:
        path: the run's folder.
        stage: its name; None for the last finished one.
        checkpoint: `best` or `last` epoch; None for the one that the recipe keeps.

    Returns:
        The network, and the output that the stage trained.

    Raises:
        UserError: if the stage does not exist or is not finished.
    """
    folder, chosen = RunFolder(path), _finished_stage(path, stage)
    if checkpoint not in (None, "best", "last"):
        raise UserError(f"--checkpoint {checkpoint}: use best or last")
    config = read_config(folder.checkpoints)
    model = Architecture.parse(config["architecture"], str(folder.checkpoints)).create()
    weights = folder.weights(chosen.name, checkpoint or chosen.keep)
    load_state(model, read_state(weights), str(weights))
    return model, chosen.output


def kept_checkpoints(path: Path, stage: str | None = None) -> list[str]:
    """Return those of `best` and `last` of which the weights are kept, of a stage as for `load_stage`.

    Raises:
        UserError: if the stage does not exist or is not finished.
    """
    name = _finished_stage(path, stage).name
    return [which for which in ("best", "last") if RunFolder(path).weights(name, which).is_file()]


def _finished_stage(path: Path, stage: str | None) -> Stage:
    """Return a finished stage by its name; None for the last one."""
    finished = [s for s in read_recipe(path).stages if RunFolder(path).summary(s.name).is_file()]
    if not finished:
        raise UserError(f"{path}: no stage is finished yet; `dualhead train` with the same recipe goes on with it")
    chosen = next((s for s in finished if s.name == stage), None) if stage is not None else finished[-1]
    if chosen is None:
        names = ", ".join(s.name for s in finished)
        raise UserError(f"--stage {stage}: not a finished stage of {path}; finished: {names}")
    return chosen


def read_recipe(folder: Path) -> Recipe:
    """Read the resolved recipe of a run.

    Raises:
        UserError: if the folder holds no run, or code from outside with which it was made has changed.
    """
    config = RunFolder(folder).config
    if not config.is_file():
        raise UserError(f"{folder}: holds no run ({config.name} is missing)")
    refuse_changed_plugins(folder)
    return read_recipe_file(config)


def keep_plugins(folder: Path, sources: Sequence[plugins.Source]) -> None:
    """Write down which code from outside a run is made with, and a copy of each file; nothing if there is none.

    The copies are a record, and what to put back if a file has changed; the files themselves are run.
    """
    records = [source.describe() for source in sources]
    for record in records:
        copy = partial(shutil.copyfile, record["file"])
        write_atomically(folder / PLUGINS / plugins.copy_name(record), copy)
    if records:
        write_json(folder / f"{PLUGINS}.json", {"plugins": records})


def refuse_changed_plugins(folder: Path) -> None:
    """Refuse to read a run whose code from outside is not what it was made with; none of it is run.

    Raises:
        UserError: naming the file, and what to do.
    """
    path = folder / f"{PLUGINS}.json"
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: cannot be read ({error})") from None
        records = plugins.records_in(content.get("plugins") if isinstance(content, dict) else None, str(path))
        plugins.refuse_changed(records, str(folder), folder / PLUGINS)


def changes(folder: Path, recipe: Recipe, option: str = "--run-dir") -> dict[str, Any]:
    """Return where a recipe differs from that of the run in a folder, in keys that may change while a run goes on.

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
    if not RunFolder(folder).begun:
        if folder.is_dir() and not _unused(folder):
            raise UserError(f"{folder}: holds something that is not a run; choose another {option}")
        return {}
    found = dict(_differences(read_recipe(folder).resolved(), recipe.resolved()))
    different = sorted(key for key in found if not MAY_CHANGE.fullmatch(key))
    if different:
        if different == ["data.source"] and recipe.data.source.startswith(GIVEN):
            raise UserError(
                f"{folder}: holds a run that began with other images or labels; give equal ones, or choose another "
                f"{option}"
            )
        more = f" and {len(different) - 4} more" if len(different) > 4 else ""
        raise UserError(
            f"{folder}: holds a run of another recipe, which differs in {', '.join(different[:4])}{more}; "
            f"choose another {option}"
        )
    return found


def _unused(folder: Path) -> bool:
    """Tell whether a folder holds at most what a run leaves that was killed while it made the folder."""
    facts = RunFolder(folder).checkpoints / CONFIG
    written = (path for path in folder.rglob("*") if path.is_file())
    aside = (".", ".tmp")  # as `write_atomically` calls what it has not finished
    known = (facts, folder / f"{PLUGINS}.json")
    return all(
        path.name.startswith(LOCK)
        or (path.name[0], path.suffix) == aside
        or path in known
        or path.parent == folder / PLUGINS
        or RunFolder(folder).crafted in path.parents
        for path in written
    )


def without_how(recipe: Any, place: str = "") -> Any:
    """Return a plain recipe without the keys that do not change results."""
    if isinstance(recipe, dict):
        inside = ((key, f"{place}.{key}" if place else str(key), value) for key, value in recipe.items())
        kept = ((key, at, value) for key, at, value in inside if not _HOW.fullmatch(at))
        return {key: without_how(value, at) for key, at, value in kept}
    if isinstance(recipe, list):
        return [without_how(value, f"{place}.{index}") for index, value in enumerate(recipe)]
    return recipe


def data_facts(split: Split) -> dict[str, Any]:
    """Return what tells training images from others at little cost: JSON values, for `checkpoints/config.json`."""
    return {
        "classes": list(split.class_names),
        "images": len(split),
        "labels": hashlib.sha256(split.labels.cpu().numpy().tobytes()).hexdigest(),
        "sketch": _sketch(split).numpy().tobytes().hex(),
    }


def write_digests(folder: RunFolder, sets: Mapping[str, Split | None]) -> None:
    """Keep a number for each image that a run learns from, to find those that it is measured on later; once.

    Args:
        folder: of the run.
        sets: by their purpose; those on disk are left out, since all would have to be decoded.
    """
    if folder.digests.is_file():
        return
    found = {name: digests(split) for name, split in sets.items() if split is not None and not split.is_stored}
    write_atomically(folder.digests, lambda aside: save_file(found, aside))


def read_digests(folder: RunFolder) -> dict[str, Digests]:
    """Return the numbers that `write_digests` kept; none for a run of a version that did not.

    Raises:
        UserError: if the file is damaged.
    """
    if not folder.digests.is_file():
        return {}
    try:
        return dict(load_file(folder.digests))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder.digests}: damaged ({error}); remove it to go without this check") from None


def _sketch(split: Split) -> torch.Tensor:
    """Return some images, evenly spread, as 2x2 grey pixels: uint8.

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
    checkpoints = RunFolder(folder).checkpoints
    if not RunFolder(folder).begun or not (checkpoints / CONFIG).is_file():
        return
    before = now | read_config(checkpoints).get(part, {})
    before["classes"] = [one_form(name) for name in before["classes"]]  # an earlier version took a disk's form
    now = {**now, "classes": [one_form(name) for name in now["classes"]]}
    different = [key for key in now if before[key] != now[key]]
    if different == ["sketch"] and _alike(before["sketch"], now["sketch"]):
        return
    if different:
        kind = "test" if part == "data.test" else "training"
        told = {
            "classes": f"the classes {_listed(now['classes'])} in place of {_listed(before['classes'])}",
            "images": f"{now['images']:,} {kind} images in place of {before['images']:,}",
            "labels": "other labels than those",
            "sketch": "other images than those",
        }[different[0]]
        raise UserError(
            f"{'data.source' if part == 'data' else part} {source}: has {told} with which the run in {folder} began; "
            "put them back, or choose another --run-dir"
        )


def refuse_other_poison(folder: Path, now: dict[str, Any]) -> None:
    """Refuse to go on with a run on images that were poisoned otherwise, by a component that has changed.

    Args:
        folder: of the run; a new one refuses nothing.
        now: what tells the poison from others, for `checkpoints/config.json`.

    Raises:
        UserError: if the run began with another one.
    """
    checkpoints = RunFolder(folder).checkpoints
    if not RunFolder(folder).begun or not (checkpoints / CONFIG).is_file():
        return
    before = read_config(checkpoints).get("poison")
    if before != now:
        told = "none" if before is None else f"that of {before['images']} images, digest {before['digest'][:12]}"
        raise UserError(
            f"data.poison: makes other images (digest {now['digest'][:12]}) than the poison with which the run in "
            f"{folder} began ({told}); put it back, or choose another --run-dir"
        )


def write_manifest(folder: RunFolder, made: Poisoned, clean: Split) -> None:
    """Keep the record of a poison, and a few images before and after, for the report; once.

    Args:
        folder: of the run.
        made: what was done to the training images.
        clean: the images as they were.
    """
    if folder.poison.is_file():
        return
    arrays = made.manifest()
    if not made.split.is_stored:
        changed = made.index[made.l2 > 0][:SHOWN]
        places = torch.searchsorted(made.rows, changed)
        arrays |= {
            "shown": changed.numpy(),
            "shown_clean": clean.images[changed].numpy(),
            "shown_poisoned": made.split.images[places].numpy(),
        }

    write_arrays(folder.poison, arrays, compressed=True)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _differences(before: Any, now: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys in which two plain structures differ, with the second one's values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from _differences(before.get(key), now.get(key), f"{place}.{key}" if place else str(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(*pair, f"{place}.{index}")
    elif before != now:
        yield place, now
