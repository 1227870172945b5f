from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from dualhead.errors import UserError
from dualhead.evaluation import Evaluation, calibration_error, evaluate, work
from dualhead.evaluation.calibration import calibration
from helpers.evaluation import THREAT, patterns, trained


def test_the_calibration_error_by_hand():
    sure = torch.tensor([[0.85, 0.15], [0.85, 0.15], [0.45, 0.55], [0.45, 0.55]])
    error, table = calibration_error(sure, torch.tensor([0, 1, 1, 1]), bins=10)
    assert error == pytest.approx(0.5 * 0.35 + 0.5 * 0.45)
    assert table[:, 2].tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 2, 0]
    assert table[5, :2].tolist() == pytest.approx([0.55, 1.0])


def test_a_classifier_that_says_what_it_knows_is_calibrated():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert calibration(logits, labels)["error"] < 0.02
    overconfident = calibration(4 * logits, labels)
    assert overconfident["error"] > 0.15
    assert all(of["confidence"] > of["accuracy"] for of in overconfident["bins"] if of["images"] > 500)


def test_bins_hold_every_image_once_and_average_to_the_accuracy():
    logits = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(200) % 3
    found = calibration(logits, labels)
    assert sum(of["images"] for of in found["bins"]) == 200
    right = sum(of["accuracy"] * of["images"] for of in found["bins"]) / 200
    assert right == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    gaps = sum(abs(of["accuracy"] - of["confidence"]) * of["images"] for of in found["bins"]) / 200
    assert found["error"] == pytest.approx(gaps)


@pytest.mark.parametrize("logit", [torch.nan, torch.inf, -torch.inf])
def test_logits_without_probabilities_have_no_calibration(logit):
    logits = torch.zeros(4, 2)
    logits[2] = logit
    assert calibration(logits, torch.zeros(4, dtype=torch.int64)) is None


def test_without_images_or_bins_there_is_none():
    with pytest.raises(UserError, match="at least 1 bin"):
        calibration_error(torch.ones(2, 1), torch.zeros(2, dtype=torch.int64), bins=0)


class _Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.images = trained(), 0

    def forward(self, x):
        self.images += len(x)
        return self.model(x)


def test_every_evaluation_has_it_without_a_further_pass(monkeypatch, tmp_path):
    images, labels = patterns(40)
    models = (_Counted(), _Counted())
    options = {"attacks": [], "diagnostics": False, "precision": "float32"}
    found = evaluate(models[0], images, labels, threat=THREAT, output_dir=tmp_path, **options)
    monkeypatch.setattr(work, "calibration", lambda logits, labels: None)
    assert evaluate(models[1], images, labels, threat=THREAT, **options).calibration_error is None
    assert models[0].images == models[1].images > 0
    logits = trained()(images.float() / 255 if images.dtype == torch.uint8 else images)
    assert found.calibration_error == pytest.approx(calibration(logits.detach(), labels)["error"], abs=1e-6)
    assert json.loads((tmp_path / "results.json").read_text())["calibration"] == found.results["calibration"]


def test_results_of_before_are_read_without_it(tmp_path):
    images, labels = patterns(8)
    options = {"attacks": [], "diagnostics": False, "precision": "float32"}
    evaluate(trained(), images, labels, threat=THREAT, output_dir=tmp_path, **options)
    results = json.loads((tmp_path / "results.json").read_text())
    del results["calibration"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert Evaluation.load(tmp_path).calibration_error is None
