"""Image classifiers of the `transformers` library, where it is installed."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

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

logger = logging.getLogger(__name__)
_PREPROCESSOR: Final = "preprocessor_config.json"
_ROUNDING: Final = 1e-6
_FILTERS: Final = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""By Pillow's numbers, which such a file has."""
_BICUBIC: Final = ("CLIP", "DeiT", "Beit", "Bit", "Levit", "Siglip", "PoolFormer", "Perceiver")
"""Processors that take this filter if their file names none; all others take the bilinear one."""
_BY_SHORTER_SIDE: Final = ("CLIP", "ConvNext", "Bit", "PoolFormer", "MobileNet", "MobileViT", "Levit")
"""Processors to which one number means the shorter side, and to the others both."""


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
        """Read `preprocessor_config.json` beside the weights; log a warning if there is none."""
        if not self.pretrained:
            return None
        try:
            told = self._preprocessor()
            # What is normalised is the bytes times this factor, and images here are the bytes over 255.
            factor = float(told.get("rescale_factor", 1 / 255)) if told.get("do_rescale", True) else 1.0
            scale = 255 * factor
            if abs(scale - 1) < _ROUNDING:
                scale = 1.0
            efficientnet = _kind(told).startswith("EfficientNet")
            offset = 1.0 if efficientnet and told.get("do_rescale", True) and told.get("rescale_offset") else 0.0
            again = efficientnet and told.get("include_top", True)  # divided by the deviation once more
            if told.get("do_normalize", True):
                mean, std = (tuple(map(float, told[key])) for key in ("image_mean", "image_std"))
            else:
                channels = self.published_channels()
                if channels is None or (scale == 1 and not offset and not again):
                    return None
                mean, std = (0.0,) * channels, (1.0,) * channels
            divisors = tuple(s * float(t) for s, t in zip(std, told["image_std"], strict=True)) if again else std
            return tuple((m + offset) / scale for m in mean), tuple(s / scale for s in divisors)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            logger.warning("model 'hf:%s': no %s says how its images are normalised", self.config, _PREPROCESSOR)
            return None

    def published_preprocessing(self) -> Preprocessing | None:
        """How `preprocessor_config.json` brings images to size; None if it does not, or is not there.

        Raises:
            UserError: if it does what cannot be done here, such as to swap red and blue.
        """
        try:
            told = self._preprocessor()
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None  # the normalisation's word tells it
        where = f"model 'hf:{self.config}': {_PREPROCESSOR}"
        if told.get("do_flip_channel_order"):
            raise UserError(f"{where} swaps red and blue (do_flip_channel_order); give it as package.module:factory")
        try:
            return _preprocessing(told)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{where} brings images to size in a way that is not known ({type(error).__name__}: {error}); "
                "say it with --image-size, --crop and --resample"
            ) from None

    def published_class_names(self) -> tuple[str, ...]:
        """The names that `id2label` has; none where it holds the words that transformers puts there by default."""
        try:
            labels = self._configuration(_transformers()).id2label
        except Exception:  # whoever builds the model is told why
            return ()
        names = tuple(str(labels[k]) for k in sorted(labels))
        return () if names == tuple(f"LABEL_{k}" for k in range(len(names))) else names

    def published_channels(self) -> int | None:
        """As its configuration says."""
        try:
            found = getattr(self._configuration(_transformers()), "num_channels", None)
        except Exception:  # whoever builds the model is told why
            return None
        return None if found is None else int(found)

    def _preprocessor(self) -> dict[str, Any]:
        transformers = _transformers()
        if self._is_only_a_type(transformers):  # no name on the Hub, where it would be asked for again and again
            raise UserError(f"model 'hf:{self.config}': {self._no_weights()}")
        folder = Path(self.config).parent if Path(self.config).is_file() else Path(self.config)
        path = folder / _PREPROCESSOR
        if not folder.is_dir():
            if self.config in transformers.CONFIG_MAPPING:  # a type of model is no name at the Hub
                raise LookupError(f"{self.config} is a type of model, and has no {_PREPROCESSOR}")
            path = transformers.utils.cached_file(self.config, _PREPROCESSOR)
        told: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        return told

    def on_its_own(self) -> Self:
        """With the configuration itself in place of where it lies."""
        if self._is_only_a_type(_transformers()):
            return self
        config = self._configuration(_transformers())
        return replace(self, config=config.to_json_string(), pretrained=False)

    def _is_only_a_type(self, transformers: Any) -> bool:
        return self.config in transformers.CONFIG_MAPPING and not Path(self.config).exists()

    def _no_weights(self) -> str:
        return f"{self.config!r} is a type of model and has no weights; name a folder or a Hub model"

    def _configuration(self, transformers: Any) -> Any:
        if self.config.lstrip().startswith("{"):
            content = json.loads(self.config)
            return transformers.AutoConfig.for_model(content.pop("model_type"), **content)
        is_local = Path(self.config).is_file() or Path(self.config, "config.json").is_file()
        if is_local or self.config not in transformers.CONFIG_MAPPING:
            return transformers.AutoConfig.from_pretrained(self.config)
        if self.pretrained:
            raise UserError(self._no_weights())
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


def _kind(told: Mapping[str, Any]) -> str:
    """The class of the processor that a `preprocessor_config.json` is of."""
    return str(told.get("image_processor_type", told.get("feature_extractor_type", "")))


def _preprocessing(told: Mapping[str, Any]) -> Preprocessing | None:
    """Size, crop and filter in the words of a `preprocessor_config.json`."""
    kind = _kind(told)
    size, resizes = told.get("size"), told.get("do_resize", "size" in told)
    cuts = _pair(told["crop_size"]) if told.get("do_center_crop") and told.get("crop_size") else None
    if not resizes or size is None:
        if cuts is not None:
            raise ValueError("do_center_crop without do_resize")
        return None
    number = told.get("resample")
    usual = "bicubic" if kind.startswith(_BICUBIC) else "bilinear"
    resample = usual if number is None else _FILTERS[number] if isinstance(number, int) else str(number).lower()
    if isinstance(size, Mapping) and "height" not in size and "shortest_edge" not in size:
        raise ValueError(f"size {dict(size)}")
    by_side = "shortest_edge" in size if isinstance(size, Mapping) else kind.startswith(_BY_SHORTER_SIDE)
    if by_side:
        side = int(size["shortest_edge"] if isinstance(size, Mapping) else size)
        if kind.startswith("Levit"):
            side = side * 256 // 224
        if kind.startswith("ConvNext"):  # it enlarges first, and cuts its size out, unless that is large
            return Preprocessing((side, side), float(told.get("crop_pct") or 224 / 256) if side < 384 else None,
                                 resample=resample)  # fmt: skip
        if kind.startswith("PoolFormer") and told.get("crop_pct"):
            return Preprocessing(cuts or (side, side), float(told["crop_pct"]), resample=resample)
        seen = cuts or (side, side)
        if min(seen) > side:
            raise ValueError(f"crop_size {seen} of shortest_edge {side}")
        return Preprocessing(seen, min(seen) / side, resample=resample)
    whole = _pair(size)
    if cuts is None or cuts == whole:
        return Preprocessing(whole, resample=resample)
    first = kind.startswith("Perceiver")  # it cuts size / crop_size of the shorter side out, and resizes that
    inner, outer = (whole, cuts) if first else (cuts, whole)
    shares = (inner[0] / outer[0], inner[1] / outer[1])
    if abs(shares[0] - shares[1]) > _ROUNDING or shares[0] > 1:
        raise ValueError(f"crop_size {cuts} of size {whole}")
    return Preprocessing(inner, shares[0], squash=not first, resample=resample)


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        return (int(size["height"]), int(size["width"])) if "height" in size else _pair(size["shortest_edge"])
    return (int(size[0]), int(size[1])) if isinstance(size, Sequence) else (int(size), int(size))


def _fit(config: Any, image_shape: ImageShape) -> None:
    """Give a configuration the channels and the image size of the data, where it has such entries."""
    channels, height, width = image_shape
    if hasattr(config, "num_channels"):
        config.num_channels = channels
    if hasattr(config, "image_size"):
        config.image_size = height if height == width else (height, width)
