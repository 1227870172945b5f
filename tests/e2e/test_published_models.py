"""A published model is measured by its own names, on images brought to size as its processor does.

The images lie in folders named by what the model itself answers, computed here by hand: accuracy is 1 if names, crop,
filter and factor are its own, and less otherwise.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.e2e import dualhead

transformers = pytest.importorskip("transformers")
NAMES = ("owl", "cat", "ape", "bat")
CROPPED = {
    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 10}, "resample": 2,
    "do_center_crop": True, "crop_size": {"height": 8, "width": 8}, "do_rescale": True, "rescale_factor": 1 / 127.5,
    "do_normalize": True, "image_mean": [1.0] * 3, "image_std": [0.5] * 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(1)
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: k for k, name in enumerate(NAMES)}}
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], downsample_in_first_stage=False, **names
    )
    network = transformers.ResNetForImageClassification(config).eval()
    rng = np.random.default_rng(0)
    images = [Image.fromarray(one) for one in rng.integers(0, 256, (60, 20, 30, 3), dtype=np.uint8)]
    # The middle of each is another colour than its sides, which the crop has to leave out.
    for one in images:
        one.paste(tuple(rng.integers(0, 256, 3).tolist()), (5, 0, 25, 20))
    side = [one.resize((8, 8), Image.Resampling.BILINEAR, (7, 2, 23, 18)) for one in images]
    pixels = torch.stack([torch.tensor(np.asarray(one)).permute(2, 0, 1) for one in side]) / 127.5
    with torch.no_grad():
        logits = network((pixels - 1) / 0.5).logits
        network.classifier[-1].bias -= logits.mean(0)  # no class for all
        answers = network((pixels - 1) / 0.5).logits.argmax(1).tolist()
    assert len(set(answers)) > 1
    network.save_pretrained(folder / "model")
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(CROPPED))
    for name in NAMES:
        (folder / "photos" / "test" / name).mkdir(parents=True)
    for n, (one, answer) in enumerate(zip(images, answers, strict=True)):
        one.save(folder / "photos" / "test" / NAMES[answer] / f"{n}.png")
    for name in NAMES:
        if not any((folder / "photos" / "test" / name).iterdir()):
            (folder / "photos" / "test" / name).rmdir()
    return folder


def measured(model, output, *more):
    ended = dualhead(
        "evaluate", f"hf:{model / 'model'}", "--data", model / "photos", "--attack", "fgsm", "--eps", "0.001",
        "--device", "cpu", "--output", output, "--json", *more,
    )  # fmt: skip
    assert ended.status == 0, ended.err
    return json.loads(ended.out)["clean_accuracy"]


def test_a_published_model_is_measured_as_its_files_say(model, tmp_path):
    assert measured(model, tmp_path / "a") == 1


def test_options_override_the_processor(model, tmp_path):
    assert measured(model, tmp_path / "a", "--crop", "none", "--resample", "nearest") < 1
    assert measured(model, tmp_path / "b", "--crop", "0.8", "--resample", "bilinear", "--image-size", "8x8") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--crop", "2"], "--crop 2: write a fraction in (0, 1], e.g. 0.875, or none to stretch images"),
        (["--resample", "cubic"], "--resample cubic: use one of nearest, bilinear"),
        (["--channels", "2"], "--channels 2: use 1 (grey) or 3 (colour)"),
        (["--channels", "1"], "which is for 3-channel images; --channels 3 reads them so"),
    ],
)
def test_impossible_options_are_one_line(model, options, words):
    ended = dualhead("evaluate", f"hf:{model / 'model'}", "--data", model / "photos", "--eps", "0.1", *options)
    assert ended.status == 2
    assert words in ended.err.splitlines()[-1]
