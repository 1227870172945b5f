"""Models of the `timm` library by name, where it is installed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import nn

from dualhead.errors import UserError
from dualhead.models.base import (
    Backbone,
    ChannelStatistics,
    ImageShape,
    Preprocessing,
    Wrapped,
    backbones,
    check_logits,
)
from dualhead.models.normalize import Normalize


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except Exception as error:  # it needs torchvision, which fails in its own ways beside another build of torch
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"timm cannot be imported ({reason}); install it with: pip install timm") from error


@backbones.register("timm", text="model")
@dataclass(frozen=True)
class TimmBackbone(Backbone):
    """A model of `timm`: `timm:resnet18`. Its layers are named `model.LAYER`.

    Args:
        model: as `timm.list_models()` writes it.
        pretrained: start from the weights that timm names for it (fetched from the Hugging Face Hub), with a new
            classifier where the number of classes differs, and normalise as they want it unless the recipe has
            `model.normalize`; else from timm's own initialisation.
    """

    model: str
    pretrained: bool = False

    def published(self, num_classes: int, image_shape: ImageShape) -> nn.Module:
        """The classifier with the weights that timm names for it.

        Raises:
            UserError: if it is for another number of classes.
        """
        found = replace(self, pretrained=True)
        known, classes = found.published_normalisation(), getattr(found._published(), "num_classes", None)
        if classes != num_classes:
            raise UserError(
                f"model 'timm:{self.model}': it is for {classes} classes, and the images have {num_classes}"
            )
        normalize = Normalize.identity(image_shape[0]) if known is None else Normalize(*known)
        return found.create(num_classes, image_shape, normalize)

    def published_normalisation(self) -> ChannelStatistics | None:
        """As timm's configuration of the weights says."""
        config = self._published() if self.pretrained else None
        return None if config is None else (tuple(map(float, config.mean)), tuple(map(float, config.std)))

    def published_preprocessing(self) -> Preprocessing | None:
        """As timm's configuration of the weights says, for a test image."""
        config = self._published()
        if config is None or not getattr(config, "input_size", None):
            return None
        size = tuple(getattr(config, "test_input_size", None) or config.input_size)[1:]
        crop = getattr(config, "test_crop_pct", None) or getattr(config, "crop_pct", None)
        squash = getattr(config, "crop_mode", "center") == "squash"
        resample = getattr(config, "interpolation", None) or "bicubic"
        return Preprocessing((int(size[0]), int(size[1])), None if crop is None else float(crop), squash, str(resample))

    def published_class_names(self) -> tuple[str, ...]:
        """The names that timm's configuration of the weights has, if any."""
        names = getattr(self._published(), "label_names", None)
        return tuple(map(str, names or ()))

    def published_channels(self) -> int | None:
        """As timm's configuration of the weights says."""
        size = getattr(self._published(), "input_size", None)
        return None if size is None else int(size[0])

    def on_its_own(self) -> Self:
        """Without weights to fetch."""
        return replace(self, pretrained=False)

    def _published(self) -> Any:
        return _timm().get_pretrained_cfg(self.model)

    def _build(self, num_classes: int, image_shape: ImageShape, normalize: Normalize) -> nn.Module:
        timm, where = _timm(), f"model 'timm:{self.model}'"
        sizes: dict[str, Any] = {"num_classes": num_classes, "in_chans": image_shape[0]}
        try:
            # Convolutional networks take any size and know no such argument; transformers are built for one.
            if getattr(timm.get_pretrained_cfg(self.model), "fixed_input_size", False):
                sizes["img_size"] = image_shape[1:]
            model = timm.create_model(self.model, pretrained=self.pretrained, **sizes)
        except Exception as error:  # an unknown name, no such weights, no network: timm says which
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"{where}: {reason}; `timm.list_models('*NAME*')` lists names") from error
        check_logits(model, num_classes, image_shape, where)
        return Wrapped(normalize, model)
