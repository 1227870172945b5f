"""Image classifiers of the `transformers` library, where it is installed."""

from __future__ import annotations

import importlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from torch import nn

from dualhead.errors import UserError
from dualhead.models.base import Backbone, ChannelStatistics, ImageShape, Wrapped, backbones, check_logits
from dualhead.models.normalize import Normalize

logger = logging.getLogger(__name__)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except Exception as error:  # an installation may fail in other ways than by being absent
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"transformers cannot be imported ({reason}); pip install transformers") from error


@backbones.register("hf", text="config")
@dataclass(frozen=True)
class TransformersBackbone(Backbone):
    """An image classifier of `transformers`: `hf:resnet`, `hf:path/to/folder`, `hf:microsoft/resnet-18`.

    Its layers are named `model.LAYER`. With fresh weights, the configuration's numbers of channels and classes and its
    image size become those of the data; with pretrained ones only the number of classes does.

    Args:
        config: a model type of transformers (its default configuration), a folder with a `config.json`, such a file,
            a name on the Hugging Face Hub, or the configuration itself as JSON, as trained models store it.
        pretrained: start from the weights in that folder or on the Hub, with a new classifier where the number of
            classes differs; anything else that does not fit is an error. Images are then normalised as the
            `preprocessor_config.json` beside the weights says, unless the recipe has `model.normalize`.
    """

    config: str
    pretrained: bool = False

    def _build(self, num_classes: int, image_shape: ImageShape, normalize: Normalize) -> nn.Module:
        transformers, where = _transformers(), f"model 'hf:{self.config}'"
        try:
            config = self._configuration(transformers)
            published_classes = config.num_labels
            config.num_labels = num_classes
            if self.pretrained:
                model = self._pretrained(transformers, config, published_classes)
            else:
                _fit(config, image_shape)
                model = transformers.AutoModelForImageClassification.from_config(config)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except Exception as error:  # not a classifier, no such name, no network: transformers says which
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"{where}: {reason}") from error
        check_logits(model, num_classes, image_shape, where)
        return Wrapped(normalize, model)

    def published(self, num_classes: int, image_shape: ImageShape) -> nn.Module:
        """The classifier in the folder or on the Hub.

        Raises:
            UserError: if it is for another number of classes.
        """
        found, where = replace(self, pretrained=True), f"model 'hf:{self.config}'"
        try:
            classes = found._configuration(_transformers()).num_labels
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except Exception as error:  # no such name, no network: transformers says which
            raise UserError(f"{where}: {f'{type(error).__name__}: {error}'.splitlines()[0]}") from error
        if classes != num_classes:
            raise UserError(f"{where}: it is for {classes} classes, and the images have {num_classes}")
        known = found.published_normalisation()
        normalize = Normalize.identity(image_shape[0]) if known is None else Normalize(*known)
        return found.create(num_classes, image_shape, normalize)

    def published_normalisation(self) -> ChannelStatistics | None:
        """What `preprocessor_config.json` says beside the weights; a word in the log if there is none."""
        if not self.pretrained:
            return None
        transformers, file = _transformers(), "preprocessor_config.json"
        folder = Path(self.config).parent if Path(self.config).is_file() else Path(self.config)
        try:
            path = folder / file if folder.is_dir() else transformers.utils.cached_file(self.config, file)
            told = json.loads(Path(path).read_text(encoding="utf-8"))
            if not told.get("do_normalize", True):
                return None
            return tuple(map(float, told["image_mean"])), tuple(map(float, told["image_std"]))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            logger.warning("model 'hf:%s': no %s says how its images are normalised", self.config, file)
            return None

    def on_its_own(self) -> Self:
        """With the configuration itself in place of where it lies."""
        if self.config in _transformers().CONFIG_MAPPING and not Path(self.config).exists():
            return self
        config = self._configuration(_transformers())
        return replace(self, config=config.to_json_string(), pretrained=False)

    def _configuration(self, transformers: Any) -> Any:
        if self.config.lstrip().startswith("{"):
            content = json.loads(self.config)
            return transformers.AutoConfig.for_model(content.pop("model_type"), **content)
        is_local = Path(self.config).is_file() or Path(self.config, "config.json").is_file()
        if is_local or self.config not in transformers.CONFIG_MAPPING:
            return transformers.AutoConfig.from_pretrained(self.config)
        if self.pretrained:
            raise UserError(f"{self.config!r} is a type of model and has no weights; name a folder or a Hub model")
        return transformers.AutoConfig.for_model(self.config)

    def _pretrained(self, transformers: Any, config: Any, published_classes: int) -> nn.Module:
        """The published weights; only a classifier for another number of classes may differ."""
        model, info = transformers.AutoModelForImageClassification.from_pretrained(
            self.config, config=config, ignore_mismatched_sizes=True, output_loading_info=True
        )
        wrong = set(info["missing_keys"]) | set(info["unexpected_keys"])
        for key, published, wanted in info["mismatched_keys"]:
            wrong.discard(key)
            if (published[0], *wanted) != (published_classes, config.num_labels, *published[1:]):
                wrong.add(key)
        if wrong:
            raise UserError(f"the published weights do not fit the model in {len(wrong)} tensors: {sorted(wrong)[:3]}")
        module: nn.Module = model
        return module


def _fit(config: Any, image_shape: ImageShape) -> None:
    """Give a configuration the channels and the image size of the data, where it has such entries."""
    channels, height, width = image_shape
    if hasattr(config, "num_channels"):
        config.num_channels = channels
    if hasattr(config, "image_size"):
        config.image_size = height if height == width else (height, width)
