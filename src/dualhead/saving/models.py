"""Models on disk: save, find and load. Nothing is unpickled, nothing is run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dualhead.components.plugins import reason, records_in, refuse_changed
from dualhead.errors import UserError, under
from dualhead.heads import DualHeadClassifier
from dualhead.models import (
    address_of,
    at_hand,
    backbones,
    describe_given,
    last_layer,
    load_state,
    logits_of,
    normalisation_in,
    other_types,
    read_state,
    with_tied,
    write_state,
)
from dualhead.names import AGGREGATE, AGGREGATOR, MODEL, TRUNK, head_id, is_head
from dualhead.saving.architecture import (
    ADDED,
    ANSWERS,
    CONFIG,
    OF_THE_WEIGHTS,
    PLUGINS,
    WEIGHTS,
    Architecture,
    holds_model,
    read_config,
    write_config,
)
from dualhead.saving.hub import download
from dualhead.system.generators import kept_generators
from dualhead.system.modes import in_eval_mode
from dualhead.system.outputs import two_at_least


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
        facts = {**facts, ADDED: model.added_parameters}
    answers = _answers(model, architecture) if _comes_from_outside(architecture) else None
    write_config(folder, architecture, facts if answers is None else {**facts, ANSWERS: answers.tolist()})


_ANSWERS_DIFFER = 0.05
"""By how much of the largest logit they may: a GPU rounds otherwise than a CPU, with TF32 in the third digit."""


def _comes_from_outside(architecture: Architecture) -> bool:
    """Tell whether a function of somebody's own makes the network, so that `load` may be given another one."""
    return architecture.backbone.get("name") in ("factory", "given")


def _answers(model: nn.Module, architecture: Architecture) -> Tensor | None:
    """Return logits of two images of noise, on the CPU; None of a network that answers differently each time."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    noise = torch.rand(2, *architecture.image_shape, generator=torch.Generator().manual_seed(0)).to(device)
    with in_eval_mode(model), torch.no_grad(), kept_generators(device):
        try:
            first, second = (logits_of(model(noise)).float().cpu() for _ in range(2))
        except Exception:  # whatever somebody else's model may raise; it is told where the model is used
            return None
    return first if bool(first.isfinite().all()) and torch.equal(first, second) else None


def _refuse_other_answers(model: nn.Module, architecture: Architecture, known: Any) -> None:
    """Refuse a network that reads weights otherwise than the one that was saved, such as by another activation."""
    found = None if known is None or not _comes_from_outside(architecture) else _answers(model, architecture)
    if found is None:
        return
    try:
        wanted = torch.tensor(known, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{CONFIG}: {ANSWERS} must be logits of two images; the file is damaged") from None
    if found.shape != wanted.shape:  # of one logit that was saved as two
        return
    apart, largest = float((found - wanted).abs().max()), float(wanted.abs().max())
    if apart > _ANSWERS_DIFFER * largest:
        raise UserError(
            "factory: makes a network that, with the same weights, answers otherwise than the one that was saved: by "
            f"another activation, say, or a constant (logits are {apart:.3g} apart, the largest is {largest:.3g})"
        )


@dataclass(frozen=True)
class _Origin:
    """The network that a model is a view of, None for itself, and what `save` writes beside its weights."""

    whole: nn.Module | None
    architecture: Architecture
    facts: Mapping[str, Any]


_ORIGIN = "_dualhead_origin"


def remember(model: nn.Module, whole: nn.Module, architecture: Architecture, facts: Mapping[str, Any]) -> None:
    """Note what a model that is handed out is made of, so that `save` can write it.

    Args:
        model: what is handed out: the network, or a view of one of its outputs.
        whole: the network.
        architecture: of the network.
        facts: as `save_model` takes them.
    """
    # In its dictionary, so that it is no submodule, and goes along when the model is copied.
    model.__dict__[_ORIGIN] = _Origin(None if whole is model else whole, architecture, dict(facts))


def save(model: nn.Module, path: str | Path, *, example: Tensor | None = None) -> Path:
    """Write a classifier as a folder that `load` reads: `config.json` and `model.safetensors`.

    The whole network is written, also where `model` is one output of it: `load` gives that output again.

    Args:
        model: of a run (`run.model`), of `load`, or any `nn.Module`.
        path: the folder; a model in it is replaced.
        example: images [B, C, H, W] that the model takes, of which the shape alone counts; needed for a model that no
            run and no `load` returned.

    Returns:
        The folder.

    Raises:
        UserError: for a folder with something else, or a model of unknown origin without an example of its images.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"save: must be given a torch.nn.Module first, got {type(model).__name__}: save(model, path)")
    folder, origin = Path(path), cast("_Origin | None", model.__dict__.get(_ORIGIN))
    if folder.exists() and not (folder.is_dir() and (holds_model(folder) or not any(folder.iterdir()))):
        raise UserError(f"{folder}: holds something that is no model; choose another folder")
    if origin is None:
        if example is None:
            raise UserError(
                "save: this model comes from no run and no load, so its images are not known; give example=images "
                "[B, C, H, W]"
            )
        origin = _Origin(None, _architecture_of(model, example), {"output": _deployed(model)})
    save_model(folder, origin.whole or model, origin.architecture, origin.facts)
    return folder


def _deployed(model: nn.Module) -> str:
    return AGGREGATE if isinstance(model, DualHeadClassifier) else MODEL


def _architecture_of(model: nn.Module, example: Tensor) -> Architecture:
    if not isinstance(example, Tensor) or example.dim() != 4 or not len(example):
        shape = list(getattr(example, "shape", ())) or type(example).__name__
        raise UserError(f"save: example must be a tensor of images [B, C, H, W], got {shape}")
    if wrong := other_types(model):
        raise UserError(f"save: the model's parameters are {wrong}; they must be torch.float32: give model.float()")
    channels, height, width = example.shape[1:]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    shown = torch.full((2, channels, height, width), 0.5, device=device)
    with in_eval_mode(model), torch.no_grad(), kept_generators(device):
        try:
            classes = two_at_least(logits_of(model(shown)), len(shown)).shape[1]
        except UserError:
            raise
        except Exception as error:  # whatever somebody else's model may raise
            raise UserError(
                f"save: the model fails on images of shape {list(example.shape[1:])} ({reason(error)}); give an "
                "example of the images that it takes"
            ) from error
    address = address_of(model, None, classes, (channels, height, width))
    backbone = describe_given(model) if address is None else {"name": "factory", "path": address}
    return Architecture(
        backbone=backbone, num_classes=classes, image_shape=(channels, height, width), mean=(0.0,) * channels,
        std=(1.0,) * channels,
    )  # fmt: skip


def load(path: str | Path, output: str | None = None, *, factory: Callable[..., nn.Module] | None = None) -> nn.Module:
    """Load a classifier from a run, an exported model's folder or a Hub name, in eval mode.

    The random number generators of Python, numpy and torch keep their states.

    Args:
        path: the folder, or a Hub name `OWNER/NAME`.
        output: for a dual-head model: `head1`, `head2`, ..., `mean` or `aggregate`; None for the deployed one.
        factory: makes the network, where that was given in Python or its code has moved; called with `num_classes=...`
            if it takes that argument.

    Returns:
        A module from images float [B, C, H, W] in [0, 1] to logits [B, num_classes].

    Raises:
        UserError: if there is no such model, it is not whole, or a function from outside makes a network that answers
            two images of noise otherwise with these weights than the one that was saved.
    """
    folder = find_model(path)
    config = read_config(folder)
    architecture = Architecture.parse(config["architecture"], str(folder / CONFIG))
    with kept_generators(torch.device("cpu")), at_hand(factory):  # its weights are drawn, and then replaced
        model = architecture.create()
    load_state(model, read_state(folder / WEIGHTS), str(folder / WEIGHTS))
    with under(str(folder)):
        _refuse_other_answers(model, architecture, config.get(ANSWERS))
    chosen = output or config.get("output", MODEL)
    shown = view(model, chosen).eval()
    own = ("architecture", PLUGINS, *OF_THE_WEIGHTS)
    facts = {key: value for key, value in config.items() if key not in own}
    remember(shown, model, architecture, {**facts, "output": chosen})
    return shown


class OneHeadError(UserError):
    """An output is asked for of a model that has one alone."""


def view(model: nn.Module, output: str) -> nn.Module:
    """Return one output of a model as a classifier of its own, on shared weights.

    Raises:
        UserError: if the model has no such output; `OneHeadError` if it has no second head.
    """
    if isinstance(model, DualHeadClassifier):
        if output not in model.outputs:
            raise UserError(f"output {output!r}: the model has {', '.join(model.outputs)}")
        return model if output == AGGREGATE else model.view(output)
    if output != MODEL:
        raise OneHeadError(f"output {output!r}: the model has no second head; leave it out")
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
    raise UserError(f"{path}: {_why_no_model(Path(path))}")


def _why_no_model(path: Path) -> str:
    """Say what lies at a path that is no model, and what would be one."""
    if path.suffix == ".py":
        return f"is a file of code; write {path}:FUNCTION, a function in it that makes the network"
    if path.is_file():
        return "is a file; name the folder of a run or of an exported model, or my_file.py:FUNCTION that loads it"
    if path.is_dir():
        inside = sorted(child.name for child in path.iterdir() if holds_model(child) or holds_model(child / "model"))
        named = f"; name one of those in it: {', '.join(inside[:8])}{', ...' if inside[8:] else ''}" if inside else ""
        return f"holds no finished model ({WEIGHTS} and {CONFIG}, also not in its folder model/){named}"
    known = "there is no such folder"
    try:
        backbones.build(str(path))
    except UserError:
        module, _, function = str(path).rpartition(".")
        return f"{known}; a function that makes a network is written {module}:{function}" if module else known
    return f"{known}; it is the name of a network, which has no weights before it is trained"


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
    if isinstance(plain, DualHeadClassifier):  # somebody's own, with its heads: nothing makes the network without them
        if replace_classifier:
            raise UserError(
                "replace_classifier: this network came with its heads, and its classifier cannot be told from them; "
                "give the network without heads"
            )
        with under(str(path)):
            cast("DualHeadClassifier", model).load_base_state_dict(state)
        return False
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
    return {head_id(1), head_id(2)} <= parts and all(part in (TRUNK, AGGREGATOR) or is_head(part) for part in parts)


def _classifier(plain: nn.Module, architecture: Architecture, name: bool | str) -> str:
    if isinstance(name, str):
        if name not in dict(plain.named_modules()):
            raise UserError(f"replace_classifier: the model has no layer {name!r}; `dualhead layers` lists them")
        return name
    with under("replace_classifier"):
        return last_layer(plain, architecture.num_classes, architecture.image_shape)


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


def class_names_of(path: str | Path) -> tuple[str, ...]:
    """Read the names of a trained model's classes, in the order of its logits; empty if its folder does not tell."""
    file = _weights_file(Path(path))
    told = read_config(file.parent) if file.name == WEIGHTS and _is_ours(file.parent / CONFIG) else {}
    return tuple(map(str, told.get("class_names") or ()))


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
