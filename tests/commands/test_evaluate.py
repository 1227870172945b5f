"""What `dualhead evaluate` is asked for reaches the evaluation."""

from __future__ import annotations

import torch

from dualhead.commands import evaluate as assess
from dualhead.data import load_split


def handed_over(monkeypatch, **options):
    """The folder, and what `assess` gives to `evaluate` for a request of digits."""
    given = {}

    def evaluate(model, images, labels, **more):
        given.update(model=model, images=images, labels=labels, **more)

    monkeypatch.setattr(assess, "_model", lambda request, test: torch.nn.Identity())
    monkeypatch.setattr(assess, "evaluate", evaluate)
    asked = {"model": "torch.nn:Identity", "data": "digits", "eps": "0.1", "device": "cpu", **options}
    folder, _ = assess.assess(assess.Request(**asked))
    return folder, given


def test_what_is_asked_for_is_what_is_evaluated(monkeypatch, tmp_path):
    told = {"seed": 5, "batch_size": 16, "precision": "float32", "attacks": ("fgsm",), "save_adversarial": True}
    more = {"eps": "0, 0.02, 0.08, 0.01", "norm": "L2", "limit": 7, "overwrite": True, "output_dir": tmp_path / "out"}
    folder, given = handed_over(monkeypatch, **told, **more)
    test = load_split("digits", "test")
    assert folder == tmp_path / "out" == given["output_dir"]
    assert torch.equal(given["images"], test.images[:7])
    assert torch.equal(given["labels"], test.labels[:7])
    assert (given["threat"].norm, given["threat"].eps) == ("L2", 0.08)
    assert list(map(float, given["eps"])) == [0.0, 0.02, 0.08, 0.01]
    assert {name: given[name] for name in told} == told
    assert not given["resume"]
    assert not given["model"].training


def test_what_is_not_asked_for_is_as_it_is_by_default(monkeypatch, tmp_path):
    _, given = handed_over(monkeypatch, output_dir=tmp_path / "out")
    assert (given["seed"], given["resume"], list(given["eps"]), len(given["images"])) == (0, True, [], 400)
    assert (given["threat"].norm, given["threat"].eps, given["precision"]) == ("Linf", 0.1, "auto")


def test_images_come_to_size_as_the_exported_model_says(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(assess, "find_model", lambda name: tmp_path)
    monkeypatch.setattr(assess, "read_config", lambda folder: {"image_size": [24, 20], "crop": 0.875})
    monkeypatch.setattr(
        assess, "load_split", lambda source, part, **more: asked.update(source=source, part=part, **more)
    )
    assess._load_images(assess.Request(model="someone/model", data="there", device="cpu"))
    assert (asked["source"], asked["part"], asked["image_size"], asked["crop"]) == ("there", "test", [24, 20], 0.875)
    assess._load_images(assess.Request(model="someone/model", data="there", image_size="32x16", device="cpu"))
    assert (asked["image_size"], asked["crop"]) == ((32, 16), 0.875)
