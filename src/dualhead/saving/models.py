"""Models on disk: save, find and load. Nothing is unpickled, nothing is run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dualhead.components.plugins import records_in, refuse_changed
from dualhead.errors import UserError
from dualhead.heads import DualHeadClassifier, is_head
from dualhead.models import last_layer, load_state, normalisation_in, read_state, with_tied, write_state
from dualhead.saving.architecture import CONFIG, PLUGINS, WEIGHTS, Architecture, holds_model, read_config, write_config
from dualhead.saving.hub import download
from dualhead.system.generators import kept_generators


def save_model(folder: Path, model: nn.Module, architecture: Architecture, facts: Mapping[str, Any]) -> None:
    """Write `config.json` and `model.safetensors`.

    Args:
        folder: made if need be.
        model: its weights are written.
        architecture: the one that made the model.
        facts: further keys of `config.json`: class names, threat model, the deployed output.
    """
    write_state(model.state_dict(), folder / WEIGHTS)
    if isinstance(model, DualHeadClassifier):
        facts = {**facts, "added_parameters": model.added_parameters}
    write_config(folder, architecture, facts)


def load(path: str | Path, output: str | None = None) -> nn.Module:
    """Load a classifier from a run, an exported model's folder or a Hub name, in eval mode.

    The random number generators of Python, numpy and torch keep their states.

    Args:
        path: the folder, or a Hub name `OWNER/NAME`.
        output: for a dual-head model: `head1`, `head2`, ..., `mean` or `aggregate`; None for the deployed one.

    Returns:
        A module from images float [B, C, H, W] in [0, 1] to logits [B, num_classes].

    Raises:
        UserError: if there is no such model, or it is not whole.
    """
    folder = find_model(path)
    config = read_config(folder)
    architecture = Architecture.parse(config["architecture"], str(folder / CONFIG))
    with kept_generators(torch.device("cpu")):  # its weights are drawn, and then replaced
        model = architecture.create()
    load_state(model, read_state(folder / WEIGHTS), str(folder / WEIGHTS))
    return view(model, output or config.get("output", "model")).eval()


def view(model: nn.Module, output: str) -> nn.Module:
    """Return one output of a model as a classifier of its own, on shared weights.

    Raises:
        UserError: if the model has no such output.
    """
    if isinstance(model, DualHeadClassifier):
        if output not in model.outputs:
            raise UserError(f"output {output!r}: the model has {', '.join(model.outputs)}")
        return model if output == "aggregate" else model.view(output)
    if output != "model":
        raise UserError(f"output {output!r}: the model has no second head; leave it out")
    return model


def find_model(path: str | Path) -> Path:
    """Find the folder with `config.json` and weights: the folder itself, a run's `model/`, or a download from the Hub.

    Raises:
        UserError: if there is none.
    """
    for folder in (Path(path), Path(path) / "model"):
        if holds_model(folder):
            records = records_in(read_config(folder).get(PLUGINS, []), str(folder / CONFIG))
            exported = (folder / PLUGINS).is_dir()
            copies = (folder if exported else folder.parent) / PLUGINS
            refuse_changed(records, str(folder), copies, stand_in=exported)
            return folder
    name = str(path)
    if not Path(path).exists() and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return download(name)
    raise UserError(f"{path}: holds no finished model ({WEIGHTS} and {CONFIG}, also not in its folder model/)")


def load_base_weights(
    model: nn.Module, path: str | Path, architecture: Architecture, *, replace_classifier: bool | str = False
) -> bool:
    """Start a network from existing weights: a file, an exported model's folder or a run's.

    Weights of the whole network fill it; weights of the plain backbone fill trunk and head 1. Of tied heads, head 1
    holds what they share.

    Args:
        model: a plain or dual-head classifier.
        path: the weights.
        architecture: the one that made the model.
        replace_classifier: leave the layer that gives the logits as it is in the model, which may have other classes:
            true to find that layer, or its name in the plain backbone. Of a dual-head model's weights, those of its
            trunk and head 1 are then taken.

    Returns:
        Whether the weights were those of the whole network, so that further heads are filled too.

    Raises:
        UserError: if they are of neither shape.
    """
    path = _weights_file(Path(path))
    state = read_state(path)
    if isinstance(model, DualHeadClassifier):
        if not replace_classifier and set(with_tied(model, state, str(path))) == set(model.state_dict()):
            load_state(model, state, str(path))
            return True
        if replace_classifier and _is_of_heads(state):  # of however many, and merged by whatever they were
            parts = ("trunk.", "head1.")
            state = {name.split(".", 1)[1]: tensor for name, tensor in state.items() if name.startswith(parts)}
    plain = architecture.plain() if isinstance(model, DualHeadClassifier) or replace_classifier else model
    replaced = _classifier(plain, architecture, replace_classifier) if replace_classifier else None
    if not isinstance(model, DualHeadClassifier):
        load_state(model, state, str(path), replaced=replaced)
        return True
    plain.load_state_dict(model.base_state_dict())
    load_state(plain, state, str(path), replaced=replaced)
    model.load_base_state_dict(plain.state_dict())
    return False


def _is_of_heads(state: Mapping[str, Any]) -> bool:
    """Whether weights are those of a dual-head classifier."""
    parts = {name.split(".", 1)[0] for name in state}
    return {"head1", "head2"} <= parts and all(part in ("trunk", "aggregator") or is_head(part) for part in parts)


def _classifier(plain: nn.Module, architecture: Architecture, name: bool | str) -> str:
    if isinstance(name, str):
        if name not in dict(plain.named_modules()):
            raise UserError(f"replace_classifier: the model has no layer {name!r}; `dualhead layers` lists them")
        return name
    try:
        return last_layer(plain, architecture.num_classes, architecture.image_shape)
    except UserError as error:
        raise UserError(f"replace_classifier: {error}") from None


def normalisation_of(path: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Read a trained model's mean and standard deviation for normalisation; None if neither weights nor folder tell.

    Raises:
        UserError: if there are no weights, or the values cannot be.
    """
    file = _weights_file(Path(path))
    if file.name == WEIGHTS and _is_ours(file.parent / CONFIG):
        known = Architecture.parse(read_config(file.parent)["architecture"], str(file.parent / CONFIG))
        return known.mean, known.std
    return normalisation_in(read_state(file), str(file))


def _weights_file(path: Path) -> Path:
    if path.is_dir():
        return next((p for p in (path / WEIGHTS, path / "model" / WEIGHTS) if p.is_file()), path / WEIGHTS)
    return path


def _is_ours(config: Path) -> bool:
    """Whether a `config.json` was written by this package: other libraries write files of that name too."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "architecture" in content
