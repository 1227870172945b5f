"""Models of RobustBench by name, where that package is installed and the file of weights lies there."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dualhead.errors import UserError
from dualhead.models.base import Backbone, ImageShape, Wrapped, backbones, check_logits
from dualhead.models.normalize import Normalize
from dualhead.models.weights import NORMALISED_BY, load_state, read_state

LAST = ("Kireev2021Effectiveness", "Andriushchenko2020Understanding")
"""Models whose files hold several moments of training, of which RobustBench takes the last."""


def _zoo() -> Any:
    try:
        return importlib.import_module("robustbench.model_zoo").model_dicts
    except Exception as error:  # it needs timm, gdown and others, which fail in their own ways
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"robustbench cannot be imported ({reason}); install it with: "
            "pip install git+https://github.com/RobustBench/robustbench"
        ) from error


@backbones.register("robustbench", text="model")
@dataclass(frozen=True)
class RobustBenchModel(Backbone):
    """A model of RobustBench (Croce et al. 2021): `robustbench:Carmon2019Unlabeled`; its layers are `model.LAYER`.

    The package makes the network, which normalises images by itself; its weights are read here, strictly and without
    running anything. Nothing is fetched: the file must lie where the package puts it,
    `FOLDER/DATASET/THREAT/MODEL.pt`.

    Args:
        model: as the leaderboard writes it.
        dataset: cifar10, cifar100 or imagenet.
        threat: Linf, L2 or corruptions.
        folder: where the package keeps its weights.
    """

    model: str
    dataset: str = field(default="cifar10", kw_only=True)
    threat: str = field(default="Linf", kw_only=True)
    folder: str = field(default="models", kw_only=True)

    def published(self, num_classes: int, image_shape: ImageShape) -> nn.Module:
        """The classifier with its published weights."""
        return self.create(num_classes, image_shape, Normalize.identity(image_shape[0]))

    def _build(self, num_classes: int, image_shape: ImageShape, normalize: Normalize) -> nn.Module:
        where = f"model 'robustbench:{self.model}'"
        if not normalize.is_identity:
            raise UserError(f"{where}: it normalises images by itself; set model.normalize: none")
        entry = self._entry(where)
        file = Path(self.folder) / self.dataset / self.threat / f"{self.model}.pt"
        if isinstance(entry.get("gdrive_id"), list):
            raise UserError(f"{where}: an ensemble of several files; load it by a function of yours")
        if not file.is_file():
            raise UserError(
                f"{where}: its weights are not at {file}; fetch them once with "
                f"robustbench.utils.load_model({self.model!r}, {self.folder!r}, {self.dataset!r}, {self.threat!r})"
            )
        network = entry["model"]()
        several = self.model.startswith(LAST)
        _fill(network, read_state(f"{file}#last" if several else file), str(file))
        check_logits(network, num_classes, image_shape, where)
        return Wrapped(normalize, network)

    def _entry(self, where: str) -> Mapping[str, Any]:
        """The package's own entry; its keys are enumerations, which are strings here."""
        known: Mapping[Any, Any] = _zoo()
        for key, name in ((self.dataset, "dataset"), (self.threat, "threat"), (self.model, "model")):
            named = {str(getattr(k, "value", k)): k for k in known}
            if key not in named:
                near = sorted(named)[:8]
                raise UserError(f"{where}: {name} {key!r} is not in RobustBench; there is {', '.join(near)}, ...")
            known = known[named[key]]
        return known


def _fill(network: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load weights into RobustBench's network, whose normalisation many of its files leave to the code."""
    wanted = network.state_dict()
    own = {name for pair in NORMALISED_BY for name in pair if name in wanted}
    prefixed, given = (
        all(name.startswith("model.") for name in names - own) for names in (wanted.keys(), state.keys())
    )
    if prefixed and not given:
        state = {name if name in own else f"model.{name}": tensor for name, tensor in state.items()}
    elif given and not prefixed:
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    load_state(network, {name: wanted[name] for name in own - state.keys()} | state, where)
