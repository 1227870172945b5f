"""Precision costs no verdict: gradients in float32, what needs none in bf16 where that pays, audited in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dualhead.evaluation import evaluate
from dualhead.evaluation.diagnostics import Audit, check_precision
from dualhead.evaluation.model import Subject, worth_reducing
from dualhead.heads import attach_second_head
from dualhead.heads.classifier import DualHeadClassifier
from helpers.evaluation import THREAT, StopAfter, StoppedError, assert_same, patterns, trained

ATTACKS = ["apgd-ce-5", "square-30"]


@pytest.fixture
def bf16_pays(monkeypatch, tmp_path):
    """A machine on which a forward pass in bf16 takes a hundredth of the time."""
    monkeypatch.setenv("DUALHEAD_CACHE", str(tmp_path / "cache"))
    told = []

    def seconds(self, x, y, size, *, backward=True, budget=0.15):
        told.append(self.arithmetic.name)
        return 0.001 if self.reduced else 0.1

    monkeypatch.setattr(Subject, "seconds_per_image", seconds)
    return told


def measure(model=None, count=120, **options):
    images, labels = patterns(count)
    settings = {"threat": THREAT, "attacks": ATTACKS, "diagnostics": False}
    return evaluate(model or trained(), images, labels, **{**settings, **options})


def precisions(result):
    return [part["precision"] for record in result.results["attacks"].values() for part in record["parts"]]


def test_gradients_are_searched_in_float32_and_queries_in_bf16(bf16_pays):
    result, full = measure(), measure(precision="float32")
    environment = result.results["environment"]
    assert precisions(result) == ["float32", "bf16"]
    assert environment["precision"] == "float32"
    assert environment["chosen"].startswith("measured on ")
    assert environment["seconds_per_image"] == {"float32": 0.1, "bf16": 0.001}
    assert precisions(full) == ["float32", "float32"]
    gradients = {key: found.verdicts.pop("apgd-ce-5") for key, found in (("auto", result), ("float32", full))}
    np.testing.assert_array_equal(gradients["auto"].margin, gradients["float32"].margin)


def test_it_is_measured_once(bf16_pays):
    first = measure()
    assert {"float32", "bf16"} <= set(bf16_pays)
    bf16_pays.clear()
    assert_same(measure(), first)
    assert not bf16_pays


def test_all_in_bf16_only_by_word(monkeypatch):
    result = measure(precision="bf16")
    assert precisions(result) == ["bf16", "bf16"]
    assert result.results["environment"]["chosen"] == "as asked for"
    monkeypatch.setenv("DUALHEAD_PRECISION", "bf16")
    overridden = measure()
    assert_same(overridden, result)
    assert "DUALHEAD_PRECISION" in overridden.results["environment"]["chosen"]


@pytest.mark.parametrize(
    ("seconds", "left", "pays"),
    [
        ({}, 10_000, False),
        ({"float32": 1.0, "bf16": 0.5}, 10_000, True),
        ({"float32": 1.0, "bf16": 0.5}, 129, True),
        ({"float32": 1.0, "bf16": 0.5}, 128, False),  # the audit takes what bf16 saves
        ({"float32": 1.0, "bf16": 0.5}, 10, False),
        ({"float32": 1.0, "bf16": 0.9}, 10_000, False),
        ({"float32": 1.0, "bf16": 1.5}, 10_000, False),
    ],
)
def test_where_bf16_pays(seconds, left, pays):
    assert worth_reducing(seconds, left, 64) is pays


def test_the_choice_survives_an_interruption(bf16_pays, tmp_path, monkeypatch):
    whole = measure(diagnostics=True)
    with pytest.raises(StoppedError):
        measure(diagnostics=True, output_dir=tmp_path, progress=StopAfter(20))
    monkeypatch.setenv("DUALHEAD_CACHE", str(tmp_path / "of another machine"))
    monkeypatch.setattr(Subject, "seconds_per_image", lambda *_, **__: pytest.fail("measured"))
    again = measure(diagnostics=True, output_dir=tmp_path)
    assert_same(again, whole)
    timeless = [{**found.results["attacks"]["square-30"]["audit"], "seconds": 0.0} for found in (again, whole)]
    assert timeless[0] == timeless[1]


def audit_of(result):
    (entry,) = [entry for entry in result.results["diagnostics"] if entry["name"] == "precision"]
    return entry


def test_a_sample_of_what_withstood_bf16_is_searched_again(bf16_pays):
    result = measure(diagnostics=True)
    record = result.results["attacks"]["square-30"]["audit"]
    survivors = int(result.verdicts["square-30"].robust.sum())
    assert record["parts"] == ["square-30"]
    assert (record["survivors"], record["audited"]) == (survivors, min(survivors, 64))
    assert f"of {record['audited']} images" in audit_of(result)["message"]
    full = measure(precision="float32").verdicts["square-30"].robust
    assert record["fell"] <= (result.verdicts["square-30"].robust & ~full).sum()


def test_what_was_in_float32_is_not_audited():
    result = measure(diagnostics=True, precision="float32")
    assert "audit" not in result.results["attacks"]["square-30"]
    assert "precision" not in {entry["name"] for entry in result.results["diagnostics"]}


def test_merging_that_is_broken_in_bf16_is_found_out(monkeypatch):
    merged = attach_second_head(trained(), "3", aggregator="mean", example=torch.rand(2, 3, 8, 8)).eval()
    merged.head2.load_state_dict(merged.head1.state_dict())
    options = {"diagnostics": True, "precision": "bf16", "count": 80, "attacks": ["apgd-ce-5"]}
    honest = measure(merged, **options)
    assert audit_of(honest)["status"] == "ok"

    def in_low_precision(self, *given):
        merged_logits = plain(self, *given)
        return merged_logits.detach().round() if torch.is_autocast_enabled("cpu") else merged_logits

    plain = DualHeadClassifier.aggregate
    monkeypatch.setattr(DualHeadClassifier, "aggregate", in_low_precision)
    broken = measure(merged, **options)
    assert broken.robust_accuracy["apgd-ce-5"] > honest.robust_accuracy["apgd-ce-5"] + 0.1
    found = audit_of(broken)
    assert found["status"] == "failed"
    assert "--precision float32" in found["message"]
    assert broken.results["attacks"]["apgd-ce-5"]["audit"]["fell"] > 10


def test_what_the_audit_says():
    def said(fell, audited=64):
        (finding,) = check_precision([Audit(["square"], 0.03, 250, audited, fell, 1.0)])
        return finding.status, finding.message

    assert check_precision([]) == []
    status, message = said(0)
    assert (status, "0 of 64" in message, "0.0% to 5.7%" in message) == ("ok", True, True)
    assert said(1)[0] == "warning"
    status, message = said(7)
    assert status == "failed"
    assert "of the 250" in message
