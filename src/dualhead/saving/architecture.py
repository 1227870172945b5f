"""A network's architecture as data: `config.json`, which lies beside the weights. Nothing in it is run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

import torch
from pydantic import ValidationError
from torch import nn

from dualhead.components.plugins import sources_in
from dualhead.components.registry import first_error
from dualhead.components.sections import Section
from dualhead.errors import UserError
from dualhead.heads import DualHeadClassifier, aggregators, attach_second_head
from dualhead.models import Normalize, backbones
from dualhead.system.files import write_json
from dualhead.system.generators import kept_generators

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
ONNX = "model.onnx"
PLUGINS = "plugins"
"""Key of the configuration with the code from outside that makes the model, and folder of an export with its files."""
ADDED = "added_parameters"
"""Key of `config.json`: parameters of what was added to the network."""
ANSWERS = "answers"
"""Key of `config.json`: logits of two images of noise, by which a function that makes another network is found out."""
OF_THE_WEIGHTS = (ADDED, ANSWERS)
"""Keys of `config.json` that a part of the network has of its own."""

UNTOLD: Final = "pairwise_cnn"
"""The aggregator of two heads where an `Architecture` names none."""
WITHOUT_SECOND_HEAD: Final[Mapping[str, Any]] = {"attach_at": None, "aggregator": None, "heads": 2, "own": None}
"""Fields of an `Architecture` that make the plain network of it."""


class Architecture(Section):
    """A network as data: everything but its weights.

    Args:
        backbone: as a recipe writes it, in the long form.
        attach_at: layer whose output feeds the second head; None: a plain classifier.
        aggregator: as a recipe writes it, in the long form; None without a second head.
        heads: their number, if there is a second one.
        own: what each further head does not share with the first, if they are tied; None: they share nothing.
        num_classes: logits per image.
        image_shape: channels, height, width.
        mean: mean of each channel, for images in [0, 1].
        std: standard deviation of each channel.
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
        """Make the network with fresh weights, drawn from torch's global generator.

        Raises:
            UserError: if the parts do not fit one another.
        """
        normalize = Normalize(self.mean, self.std)
        backbone = backbones.build(self.backbone, where="model.backbone")
        model = backbone.create(self.num_classes, self.image_shape, normalize)
        if self.attach_at is None or isinstance(model, DualHeadClassifier):  # somebody's own, with its heads
            return model
        return attach_second_head(
            model,
            self.attach_at,
            num_classes=self.num_classes,
            heads=self.heads,
            example=torch.rand(2, *self.image_shape, generator=torch.Generator().manual_seed(0)),
            init="reset" if self.own is None else "tied",
            own=self.own,
            aggregator=aggregators.build(self.aggregator or UNTOLD, where="model.aggregator"),
        )

    def plain(self) -> nn.Module:
        """Make the network without a second head; random number generators keep their states."""
        with kept_generators(torch.device("cpu")):
            return self.model_copy(update=WITHOUT_SECOND_HEAD).create()

    @classmethod
    def parse(cls, content: Mapping[str, Any], where: str) -> Self:
        """Validate plain data.

        Raises:
            UserError: naming the key that is wrong.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{where}: {first_error(error)}") from None


def write_config(folder: Path, architecture: Architecture, facts: Mapping[str, Any]) -> None:
    """Write `config.json` alone, for weights beside it or in a folder below."""
    backbone = backbones.describe(backbones.build(architecture.backbone, where="model.backbone").on_its_own())
    alone = architecture.model_copy(update={"backbone": backbone}).model_dump(mode="json")
    code = [source.describe() for source in sources_in(alone)]
    write_json(folder / CONFIG, {"architecture": alone, **({PLUGINS: code} if code else {}), **facts})


def read_config(folder: Path) -> dict[str, Any]:
    """Read a model's `config.json`.

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


def holds_model(folder: Path) -> bool:
    """Whether `config.json` and weights lie in a folder."""
    return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()
