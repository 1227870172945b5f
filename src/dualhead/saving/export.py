"""Exports: a finished run's model in a folder of its own, with its card, and as ONNX beside it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

from dualhead.errors import UserError
from dualhead.models import read_state, write_state
from dualhead.report import ONNX_SECTION, model_card
from dualhead.saving.architecture import CARD, CONFIG, ONNX, WEIGHTS, Architecture, read_config
from dualhead.saving.models import find_model, load
from dualhead.saving.onnx import OnnxCheck, write_onnx
from dualhead.system.files import write_json, write_text


def write_card(folder: Path, run: Path | None) -> None:
    """Write the model's `README.md` from the files in its folder and in its run's.

    Args:
        folder: the model's.
        run: folder of the run that made it; None if there is none.
    """
    recipe = results = None
    if run is not None and (run / "config.yaml").is_file():
        recipe = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    if run is not None and (run / "evaluation" / "results.json").is_file():
        results = json.loads((run / "evaluation" / "results.json").read_text(encoding="utf-8"))
    write_text(folder / CARD, model_card(read_config(folder), recipe, results, onnx=(folder / ONNX).is_file()))


def export(run: str | Path, folder: str | Path) -> Path:
    """Copy a finished run's model, with a card that says what was measured, to a folder that `load` reads.

    Args:
        run: folder of a finished run.
        folder: made if need be; must be empty, not exist, or hold this very export.

    Returns:
        The folder.

    Raises:
        UserError: if the run has no finished model, or the folder holds something.
    """
    run, folder = Path(run), Path(folder)
    if not (run / "model" / WEIGHTS).is_file():
        raise UserError(f"{run}: holds no finished model; `dualhead train` with the same recipe goes on with it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not _holds_export(folder, run):
        raise UserError(f"--to {folder}: holds something already; choose an empty or a new folder")
    write_state(read_state(run / "model" / WEIGHTS), folder / WEIGHTS)
    write_json(folder / CONFIG, read_config(run / "model"))
    write_card(folder, run)
    return folder


def _holds_export(folder: Path, run: Path) -> bool:
    """Whether a folder holds exactly the files that `export` of this run writes."""
    files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not {CONFIG, WEIGHTS} <= files <= {CONFIG, WEIGHTS, CARD, ONNX}:
        return False
    try:
        exported, made = read_state(folder / WEIGHTS), read_state(run / "model" / WEIGHTS)
        alike = read_config(folder) == read_config(run / "model") and exported.keys() == made.keys()
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
