"""Exports: a finished run's model in a folder of its own, with its card, and as ONNX beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from dualhead.components.plugins import copy_name, is_file, records_in
from dualhead.errors import UserError
from dualhead.heads import DualHeadClassifier, aggregators
from dualhead.models import read_state, write_state
from dualhead.names import AGGREGATE, MODEL, name_of, row_folder
from dualhead.report import ONNX_SECTION, lights, model_card
from dualhead.saving.architecture import (
    CARD,
    CONFIG,
    OF_THE_WEIGHTS,
    ONNX,
    PLUGINS,
    UNTOLD,
    WEIGHTS,
    WITHOUT_SECOND_HEAD,
    Architecture,
    read_config,
)
from dualhead.saving.models import find_model, load
from dualhead.saving.onnx import OnnxCheck, write_onnx
from dualhead.system.files import head_sentence, write_atomically, write_json, write_text


def write_card(folder: Path, run: Path | None) -> None:
    """Write the model's `README.md` from the files in its folder and in its run's.

    Args:
        folder: the model's.
        run: folder of the run that made it; None if there is none.
    """
    recipe = None
    config = read_config(folder)
    if run is not None and (run / "config.yaml").is_file():
        recipe = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    results = None if run is None else _measured(run, config)
    about = _about(str(config.get("recipe", "")))
    card = model_card(config, recipe, results, onnx=(folder / ONNX).is_file(), about=about, paper=_paper(config))
    write_text(folder / CARD, card)


def _paper(config: Mapping[str, Any]) -> str:
    """Return the paper of a model's aggregator; "" if it tells none, or is code from outside that is not loaded."""
    name = (config["architecture"].get("aggregator") or {}).get("name", UNTOLD)
    return aggregators.get(name).paper if name in aggregators.names() else ""


def _about(recipe: str) -> str:
    """Return the first sentence of a recipe that ships; empty for any other."""
    path = Path(str(resources.files("dualhead"))) / "recipe" / "shipped" / f"{recipe}.yaml"
    return head_sentence(path) if recipe == Path(recipe).name and path.is_file() else ""


def checks_of(folder: Path, run: Path) -> list[dict[str, str]]:
    """Return the failed and warning checks of what a run measured of an exported model: name, status and message."""
    return lights((_measured(run, read_config(folder)) or {}).get("diagnostics"))


def _measured(run: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return `results.json` of a run's own measurement of a model; None if there is none."""
    path = _results_of(run, config)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _results_of(run: Path, config: Mapping[str, Any]) -> Path:
    """Find what a run measured of a model of its own: results of the deployed output, or of one head."""
    head: str | None = config.get("exported_output")
    if head is None or head == read_config(run / "model").get("output"):
        return run / "evaluation" / "results.json"
    return run / "evaluation" / "rows" / row_folder(name_of(head)) / "results.json"


def export(run: str | Path, folder: str | Path, *, output: str | None = None) -> Path:
    """Copy a finished run's model, with a card that says what was measured, to a folder that `load` reads.

    Args:
        run: folder of a finished run.
        folder: made if need be; must be empty, not exist, or hold this very export.
        output: a head, to be exported as a plain classifier with the original network's names of weights; None: the
            whole model.

    Returns:
        The folder.

    Raises:
        UserError: if the run has no finished model, the model no such head, or the folder holds something.
    """
    run, folder = Path(run), Path(folder)
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; name a finished run (runs/NAME)")
    if not (run / "model" / WEIGHTS).is_file():
        raise UserError(f"{run}: holds no finished model; `dualhead train` with the same recipe goes on with it")
    state, config = read_state(run / "model" / WEIGHTS), read_config(run / "model")
    if output is not None:
        state, config = _of_one_head(run / "model", config, output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not _holds(folder, state, config):
        raise UserError(f"--to {folder}: holds something already; choose an empty or a new folder")
    write_state(state, folder / WEIGHTS)
    write_json(folder / CONFIG, config)
    for record in records_in(config.get(PLUGINS, []), str(run / "model" / CONFIG)):
        kept = run / PLUGINS / copy_name(record)
        if is_file(record["name"]) and kept.is_file():
            write_atomically(folder / PLUGINS / kept.name, partial(shutil.copyfile, kept))
    write_card(folder, run)
    return folder


def _of_one_head(folder: Path, config: Mapping[str, Any], head: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return weights and `config.json` of a head of a model as a plain classifier of its own.

    Raises:
        UserError: if the model has no such head.
    """
    architecture = Architecture.parse(config["architecture"], str(folder / CONFIG))
    model = load(folder, AGGREGATE if architecture.attach_at else None)
    if not isinstance(model, DualHeadClassifier):
        raise UserError(f"--output-of {head}: the model has no second head; leave it out")
    if head not in model.heads:
        raise UserError(f"--output-of {head}: must be a head, one of {', '.join(model.heads)}")
    plain = architecture.model_copy(update=WITHOUT_SECOND_HEAD)
    if isinstance(architecture.plain(), DualHeadClassifier):
        raise UserError(
            f"--output-of {head}: the network came with its heads, and nothing makes it without them; leave it out, "
            f"and take the head by dualhead.load({str(folder)!r}, {head!r})"
        )
    facts = {name: fact for name, fact in config.items() if name not in OF_THE_WEIGHTS}
    if architecture.own is not None:
        facts["exported_own"] = list(architecture.own)  # of tied heads, which the card tells
    return model.base_state_dict(head), {
        **facts, "architecture": plain.model_dump(mode="json"), "output": MODEL, "exported_output": head,
    }  # fmt: skip


def _holds(folder: Path, made: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    """Whether a folder holds a model with these weights and this `config.json`, and nothing else."""
    files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not {CONFIG, WEIGHTS} <= files <= {CONFIG, WEIGHTS, CARD, ONNX, PLUGINS}:
        return False
    try:
        exported = read_state(folder / WEIGHTS)
        alike = read_config(folder) == config and exported.keys() == made.keys()
    except UserError:
        return False
    return alike and all(torch.equal(exported[name], made[name]) for name in made)


def export_onnx(folder: str | Path) -> OnnxCheck:
    """Add `model.onnx` to an exported model: its deployed forward, for engines without PyTorch. The card then says so.

    Args:
        folder: one that `export` wrote.

    Returns:
        The difference between onnxruntime and PyTorch on random images.

    Raises:
        UserError: if there is no model, the extra `onnx` is not installed, the model cannot be written as ONNX, or the
            file would compute something else.
    """
    folder = find_model(folder)
    architecture = Architecture.parse(read_config(folder)["architecture"], str(folder / CONFIG))
    check = write_onnx(load(folder), architecture.image_shape, folder / ONNX)
    card = folder / CARD
    if card.is_file() and ONNX_SECTION not in (text := card.read_text(encoding="utf-8")):
        write_text(card, text + ONNX_SECTION)
    return check
