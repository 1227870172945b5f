"""How published models want their images: size, crop, filter, factor, channels and names of classes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from dualhead.errors import UserError
from dualhead.models.base import Preprocessing
from dualhead.models.timm_models import TimmBackbone
from dualhead.models.transformers_models import TransformersBackbone

pytest.importorskip("transformers")
BASE = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}


def published(folder, told, config=None):
    (folder / "preprocessor_config.json").write_text(json.dumps({**BASE, **told}))
    (folder / "config.json").write_text(json.dumps({"model_type": "resnet", **(config or {})}))
    return TransformersBackbone(str(folder), pretrained=True)


SQUARE = {"height": 224, "width": 224}


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"do_resize": False, "size": SQUARE}, None),
        ({}, None),
        ({"do_resize": True, "size": SQUARE, "resample": 2}, Preprocessing((224, 224), resample="bilinear")),
        ({"image_processor_type": "ViTImageProcessor", "size": 224}, Preprocessing((224, 224), resample="bilinear")),
        (
            {"image_processor_type": "CLIPImageProcessor", "size": 224, "do_center_crop": True, "crop_size": 224},
            Preprocessing((224, 224), 1.0),
        ),
        (
            {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": SQUARE, "resample": 3},
            Preprocessing((224, 224), 0.875),
        ),
        (
            {"size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": SQUARE, "resample": 1},
            Preprocessing((224, 224), 0.875, squash=True, resample="lanczos"),
        ),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}, "crop_pct": 0.875},
            Preprocessing((224, 224), 0.875, resample="bilinear"),
        ),
        (  # cut first: 224 / 256 of the shorter side
            {
                "feature_extractor_type": "PerceiverFeatureExtractor",
                "size": 224,
                "do_center_crop": True,
                "crop_size": 256,
            },
            Preprocessing((224, 224), 0.875),
        ),
        (
            {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 384, "resample": 3},
            Preprocessing((384, 384)),
        ),
    ],
)
def test_images_come_to_size_as_the_processor_says(tmp_path, told, expected):
    assert published(tmp_path, told).published_preprocessing() == expected


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"do_flip_channel_order": True}, "swaps red and blue"),
        ({"do_center_crop": True, "crop_size": 224}, "do_center_crop without do_resize"),
        ({"size": {"longest_edge": 500}}, "in a way that is not known"),
        ({"size": SQUARE, "do_center_crop": True, "crop_size": 256}, "crop_size .256, 256. of size .224, 224."),
        (
            {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 256},
            "crop_size .256, 256. of shortest_edge 224",
        ),
        (
            {"size": SQUARE, "do_center_crop": True, "crop_size": {"height": 200, "width": 100}},
            "say it with --image-size, --crop and --resample",
        ),
    ],
)
def test_what_cannot_be_done_likewise_is_refused(tmp_path, told, words):
    with pytest.raises(UserError, match=words):
        published(tmp_path, told).published_preprocessing()


@pytest.mark.parametrize(
    ("told", "mean", "std"),
    [
        ({}, 0.5, 0.25),
        ({"rescale_factor": 1 / 255}, 0.5, 0.25),
        ({"rescale_factor": 1 / 127.5}, 0.25, 0.125),
        ({"do_rescale": False}, 0.5 / 255, 0.25 / 255),
        ({"do_rescale": False, "do_normalize": False}, 0.0, 1 / 255),
        # ((x - 0.5) / 0.25 - 0) / 0.25, as its processor does for a classifier unless told otherwise
        ({"image_processor_type": "EfficientNetImageProcessor"}, 0.5, 0.0625),
        ({"image_processor_type": "EfficientNetImageProcessor", "include_top": False}, 0.5, 0.25),
        ({"image_processor_type": "EfficientNetImageProcessor", "do_normalize": False}, 0.0, 0.25),
        # (x / 127.5 * 255 - 1 - 0.5) / 0.25 / 0.25
        (
            {
                "image_processor_type": "EfficientNetImageProcessorFast",
                "rescale_factor": 1 / 127.5,
                "rescale_offset": True,
            },
            0.75,
            0.03125,
        ),
    ],
)
def test_the_factor_of_a_processor_is_part_of_its_normalisation(tmp_path, told, mean, std):
    found = published(tmp_path, told).published_normalisation()
    assert found[0] == pytest.approx((mean,) * 3)
    assert found[1] == pytest.approx((std,) * 3)


def test_names_of_classes_are_those_of_id2label(tmp_path):
    names = {"0": "zebra", "1": "ape", "2": "cat"}
    assert published(tmp_path, {}, {"id2label": names}).published_class_names() == ("zebra", "ape", "cat")
    many = {str(k): f"c{k}" for k in reversed(range(12))}
    assert published(tmp_path, {}, {"id2label": many}).published_class_names() == tuple(f"c{k}" for k in range(12))
    assert published(tmp_path, {}, {"num_labels": 3}).published_class_names() == ()
    assert published(tmp_path, {}, {"num_channels": 1}).published_channels() == 1


def test_timm_says_it_in_its_own_words(monkeypatch):
    told = SimpleNamespace(
        input_size=(3, 224, 224), test_input_size=(3, 288, 288), crop_pct=0.9, test_crop_pct=0.95, crop_mode="squash",
        interpolation="bilinear", label_names=("a", "b"),
    )  # fmt: skip
    monkeypatch.setattr(TimmBackbone, "_published", lambda self: told)
    model = TimmBackbone("tiny")
    assert model.published_preprocessing() == Preprocessing((288, 288), 0.95, squash=True, resample="bilinear")
    assert (model.published_class_names(), model.published_channels()) == (("a", "b"), 3)
    told.test_input_size = told.test_crop_pct = told.label_names = None
    told.crop_mode = "center"
    assert model.published_preprocessing() == Preprocessing((224, 224), 0.9, resample="bilinear")
    assert model.published_class_names() == ()
