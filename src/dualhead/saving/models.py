"""Models on disk: an architecture as data, and weights beside it. Nothing is unpickled, nothing is run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor, nn

from dualhead.components.registry import first_error
from dualhead.components.sections import Section
from dualhead.errors import RunError, UserError
from dualhead.heads import DualHeadClassifier, aggregators, attach_second_head, is_head
from dualhead.models import (
    Normalize,
    backbones,
    last_layer,
    load_state,
    normalisation_in,
    read_state,
    with_tied,
    write_state,
)
from dualhead.names import name_of, row_folder
from dualhead.report import ONNX_SECTION, model_card
from dualhead.saving.onnx import OnnxCheck, write_onnx
from dualhead.system.files import write_json, write_text
from dualhead.system.runtime import kept_generators

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
ONNX = "model.onnx"

WITHOUT_SECOND_HEAD: Final[Mapping[str, Any]] = {"attach_at": None, "aggregator": None, "heads": 2, "own": None}
"""Of an `Architecture`, for the plain network."""


class Architecture(Section):
    """All that makes a network, apart from its weights.

    Args:
        backbone: as a recipe writes it, in the long form.
        attach_at: layer whose output feeds the second head; None: a plain classifier.
        aggregator: as a recipe writes it, in the long form; None without a second head.
        heads: how many, if there is a second one.
        own: what each further head does not share with the first, if they are tied; None: they share nothing.
        num_classes: logits per image.
        image_shape: channels, height, width.
        mean: of each channel, for images in [0, 1].
        std: of each channel.
    """

    backbone: dict[str, Any]
    attach_at: str | None = None
    aggregator: dict[str, Any] | None = None
    heads: int = 2
    own: tuple[str, ...] | None = None
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def create(self) -> nn.Module:
        """The network with fresh weights, drawn from torch's global generator.

        Raises:
            UserError: if the parts do not fit one another.
        """
        normalize = Normalize(self.mean, self.std)
        backbone = backbones.build(self.backbone, where="model.backbone")
        model = backbone.create(self.num_classes, self.image_shape, normalize)
        if self.attach_at is None:
            return model
        return attach_second_head(
            model,
            self.attach_at,
            num_classes=self.num_classes,
            heads=self.heads,
            example=torch.rand(2, *self.image_shape, generator=torch.Generator().manual_seed(0)),
            init="reset" if self.own is None else "tied",
            own=self.own,
            aggregator=aggregators.build(self.aggregator or "pairwise_cnn", where="model.aggregator"),
        )

    def plain(self) -> nn.Module:
        """The network without a second head; random numbers stay where they are."""
        with kept_generators(torch.device("cpu")):
            return self.model_copy(update=WITHOUT_SECOND_HEAD).create()

    @classmethod
    def parse(cls, content: Mapping[str, Any], where: str) -> Self:
        """From plain data.

        Raises:
            UserError: naming the key that is wrong.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{where}: {first_error(error)}") from None


def save_model(folder: Path, model: nn.Module, architecture: Architecture, facts: Mapping[str, Any]) -> None:
    """Write `config.json` and `model.safetensors`.

    Args:
        folder: made if need be.
        model: whose weights are written.
        architecture: that made it.
        facts: what else to know of it: class names, threat model, which output is deployed.
    """
    write_state(model.state_dict(), folder / WEIGHTS)
    if isinstance(model, DualHeadClassifier):
        facts = {**facts, "added_parameters": model.added_parameters}
    write_config(folder, architecture, facts)


def write_config(folder: Path, architecture: Architecture, facts: Mapping[str, Any]) -> None:
    """Write `config.json` alone, for weights that lie beside it or below."""
    backbone = backbones.describe(backbones.build(architecture.backbone, where="model.backbone").on_its_own())
    alone = architecture.model_copy(update={"backbone": backbone})
    write_json(folder / CONFIG, {"architecture": alone.model_dump(mode="json"), **facts})


def write_card(folder: Path, run: Path | None) -> None:
    """Write the model's `README.md` from what lies in its folder and in its run's.

    Args:
        folder: of the model.
        run: of the run that made it; None if there is none.
    """
    recipe = results = None
    config = read_config(folder)
    if run is not None and (run / "config.yaml").is_file():
        recipe = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    if run is not None and (measured := _results_of(run, config)).is_file():
        results = json.loads(measured.read_text(encoding="utf-8"))
    write_text(folder / CARD, model_card(config, recipe, results, onnx=(folder / ONNX).is_file()))


def _results_of(run: Path, config: Mapping[str, Any]) -> Path:
    """Where a run keeps what it measured of a model of its own: the deployed output's results, or those of one head."""
    head: str | None = config.get("exported_output")
    if head is None or head == read_config(run / "model").get("output"):
        return run / "evaluation" / "results.json"
    return run / "evaluation" / "rows" / row_folder(name_of(head)) / "results.json"


def export(run: str | Path, folder: str | Path, *, output: str | None = None) -> Path:
    """Copy a finished run's model, with a card that says what was measured, to a folder that `load` reads.

    Args:
        run: of a finished run.
        folder: made if need be; must be empty, not exist, or hold this very export.
        output: a head, to be exported as a plain classifier with the original network's names of weights; None: the
            whole model.

    Returns:
        The folder.

    Raises:
        UserError: if the run has no finished model, the model no such head, or the folder holds something.
    """
    run, folder = Path(run), Path(folder)
    if not (run / "model" / WEIGHTS).is_file():
        raise UserError(f"{run}: holds no finished model; `dualhead train` with the same recipe goes on with it")
    state, config = read_state(run / "model" / WEIGHTS), read_config(run / "model")
    if output is not None:
        state, config = _of_one_head(run / "model", config, output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not _holds(folder, state, config):
        raise UserError(f"--to {folder}: holds something already; choose an empty or a new folder")
    write_state(state, folder / WEIGHTS)
    write_json(folder / CONFIG, config)
    write_card(folder, run)
    return folder


def _of_one_head(folder: Path, config: Mapping[str, Any], head: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and `config.json` of a head of a model as a plain classifier of its own.

    Raises:
        UserError: if the model has no such head.
    """
    architecture = Architecture.parse(config["architecture"], str(folder / CONFIG))
    model = load(folder, "aggregate" if architecture.attach_at else None)
    if not isinstance(model, DualHeadClassifier):
        raise UserError(f"--output-of {head}: the model has no second head; leave it out")
    if head not in model.heads:
        raise UserError(f"--output-of {head}: must be a head, one of {', '.join(model.heads)}")
    plain = architecture.model_copy(update=WITHOUT_SECOND_HEAD)
    facts = {name: fact for name, fact in config.items() if name != "added_parameters"}
    return model.base_state_dict(head), {
        **facts, "architecture": plain.model_dump(mode="json"), "output": "model", "exported_output": head,
    }  # fmt: skip


def _holds(folder: Path, made: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    """Whether a folder holds a model with these weights and this `config.json`, and nothing else."""
    files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not {CONFIG, WEIGHTS} <= files <= {CONFIG, WEIGHTS, CARD, ONNX}:
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
        folder: that `export` wrote.

    Returns:
        How far onnxruntime is from PyTorch on random images.

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


def push_to_hub(folder: str | Path, name: str, *, private: bool = False) -> str:
    """Upload an exported model to the Hugging Face Hub, with the credentials that `huggingface_hub` finds.

    Args:
        folder: that `export` wrote.
        name: `OWNER/NAME`; made if need be.
        private: whether a new one is private.

    Returns:
        Its address.

    Raises:
        UserError: if there is no model, or the name cannot be one.
        RunError: if the Hub does not take it.
    """
    from huggingface_hub import HfApi

    find_model(folder)
    check_hub_name(name)
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        info = api.upload_folder(repo_id=name, folder_path=str(folder), allow_patterns=[CONFIG, WEIGHTS, CARD, ONNX])
    except Exception as error:  # the network fails in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(
            f"--push {name}: the Hub did not take it ({reason}); the model is in {folder}, the same command tries again"
        ) from None
    return str(info)


def check_hub_name(name: str) -> None:
    """Refuse what is no name of a model on the Hub.

    Raises:
        UserError: saying what would be.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+", name):
        raise UserError(f"--push {name}: write OWNER/NAME, each of letters, digits, dots, hyphens and underscores")


def load_base_weights(
    model: nn.Module, path: str | Path, architecture: Architecture, *, replace_classifier: bool | str = False
) -> bool:
    """Start a network from weights that exist: a file, an exported model's folder or a run's.

    Weights of the whole network fill it; weights of the plain backbone fill trunk and head 1. Of tied heads, head 1
    holds what they share.

    Args:
        model: a plain or dual-head classifier.
        path: the weights.
        architecture: that made the model.
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


def _weights_file(path: Path) -> Path:
    if path.is_dir():
        return next((p for p in (path / WEIGHTS, path / "model" / WEIGHTS) if p.is_file()), path / WEIGHTS)
    return path


def _is_ours(config: Path) -> bool:
    """Whether a `config.json` is of a model of this package: other libraries write files of that name too."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "architecture" in content


def normalisation_of(path: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """By what mean and standard deviation a trained model normalises, where its weights or their folder tell.

    Raises:
        UserError: if there are no weights, or what they tell cannot be.
    """
    file = _weights_file(Path(path))
    if file.name == WEIGHTS and _is_ours(file.parent / CONFIG):
        known = Architecture.parse(read_config(file.parent)["architecture"], str(file.parent / CONFIG))
        return known.mean, known.std
    return normalisation_in(read_state(file), str(file))


def load(path: str | Path, output: str | None = None) -> nn.Module:
    """An ordinary classifier from a run, an exported model's folder or a Hub name, in eval mode.

    Random numbers stay where they are: those of Python, numpy and torch.

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
    """One output of a model as a classifier of its own, on shared weights.

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
    """The folder with `config.json` and weights: a run's `model/`, the folder itself, or a download from the Hub.

    Raises:
        UserError: if there is none.
    """
    for folder in (Path(path), Path(path) / "model"):
        if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file():
            return folder
    name = str(path)
    if not Path(path).exists() and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
        except Exception as error:  # the network fails in many ways
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{name}: no such folder, and the Hub gives no such model ({reason})") from None
        _refuse_code(name, folder)
        return folder
    raise UserError(f"{path}: holds no finished model ({WEIGHTS} and {CONFIG}, also not in its folder model/)")


def _refuse_code(name: str, folder: Path) -> None:
    """What a download names is not run: only what a user names is."""
    architecture = Architecture.parse(read_config(folder)["architecture"], str(folder / CONFIG))
    backbone = backbones.build(architecture.backbone, where=f"{folder / CONFIG}: backbone")
    if backbone.registered_name == "factory":
        raise UserError(
            f"{name}: its {CONFIG} names the function {architecture.backbone.get('path')!r}, and code that a download "
            f"names is not run; if you trust it, load the folder {folder}"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model.

    Raises:
        UserError: if it is not JSON or lacks the architecture.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG}: cannot be read ({error})") from None
    if not isinstance(config, dict) or "architecture" not in config:
        raise UserError(f"{folder / CONFIG}: has no key 'architecture'; is it a model of dualhead?")
    return config
