"""What earlier code has finished stays of use: a run, a model exported from it and a published one.

`tools/freeze_run.py` left them in `tests/data`, with the logits and verdicts of then. They are made again in processes
in which x86-64 processors of any make agree.
"""

from __future__ import annotations

import json
import platform
import shutil

import numpy as np
import pytest

from helpers.e2e import dualhead
from helpers.frozen_models import (
    EXPORTED,
    HEADS,
    LOGITS,
    MERGED,
    MODELS,
    RUN,
    VERDICTS,
    evaluate_published,
    logits_apart,
)
from helpers.frozen_models import dualhead as dualhead_apart

same_bits = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="the bits are those of x86-64 processors"
)


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(RUN, tmp_path / "finished_run")


def shown(*arguments):
    ended = dualhead(*arguments)
    assert ended.status == 0, ended.err
    return json.loads(ended.out)


@pytest.mark.slow
@same_bits
def test_logits_of_every_output_are_the_same_to_the_bit():
    found = logits_apart()
    with np.load(LOGITS) as frozen:
        expected = {f"{model}/{output}" for model in MODELS for output in ("deployed", *HEADS, *MERGED)}
        assert set(found) == set(frozen) == expected
        other = [name for name in frozen if found[name].tobytes() != frozen[name].tobytes()]
        assert not other
        assert all(frozen[name].shape == (16, 10) and np.ptp(frozen[name]) > 0.1 for name in frozen)


@pytest.mark.slow
@same_bits
def test_evaluating_a_run_again_finds_the_verdicts_that_it_holds(run, tmp_path):
    folder = tmp_path / "again"
    options = ("--limit", 32, "--attack", "fgsm", "--device", "cpu", "--precision", "float32", "--output", folder)
    dualhead_apart("evaluate", run, *options, "--quiet", folder=tmp_path)
    with np.load(folder / "samples.npz") as now, np.load(RUN / "evaluation" / "samples.npz") as then:
        for name in ("index", "label", "clean_prediction", "robust_fgsm"):
            assert now[name].tolist() == then[name][:32].tolist()


@pytest.mark.slow
@same_bits
def test_evaluating_a_published_model_finds_the_same_verdicts(tmp_path):
    assert evaluate_published(tmp_path) == json.loads(VERDICTS.read_text(encoding="utf-8"))


def test_a_run_is_evaluated_where_it_lies_by_stage_and_output(run):
    found = shown("evaluate", run, "--limit", 32, "--attack", "fgsm", "--quiet", "--json")
    assert found["num_samples"] == 32 and set(found["robust_accuracy"]) == {"fgsm", "worst"}
    options = ("--limit", 8, "--attack", "fgsm", "--quiet", "--json")
    assert shown("evaluate", run, "--stage", "main_head", *options)["num_samples"] == 8
    assert shown("evaluate", run, "--output-of", "head2", *options)["num_samples"] == 8


def test_info_tells_what_the_run_found(run):
    facts = shown("info", run, "--json")
    rows = json.loads((RUN / "comparison.json").read_text(encoding="utf-8"))["rows"]
    assert facts["state"] == "finished"
    assert [stage["name"] for stage in facts["stages"]] == ["main_head", "second_head", "aggregator"]
    for found, kept in zip(facts["rows"], rows, strict=True):
        assert found["name"] == kept["name"].replace("DH-AT", "aggregate of heads")
        assert found["clean_accuracy"] == kept["clean_accuracy"]
        assert found["robust_accuracy"] == kept["robust_accuracy"]


def test_the_run_is_reported_and_compared(run, tmp_path):
    page = tmp_path / "page.html"
    shown("report", run, "--output", page, "--json")
    text = page.read_text(encoding="utf-8")
    assert all(name in text for name in ("head 1", "head 2", "apgd-ce-5", "second_head"))
    found = shown("compare", run, run / "evaluation" / "rows" / "head_2", "--json")
    rows = json.loads((RUN / "comparison.json").read_text(encoding="utf-8"))["rows"]
    assert len(found["rows"]) == len(rows) + 1
    for now, then in zip(found["rows"], rows, strict=False):
        assert now["clean_accuracy"] == then["clean_accuracy"]
        assert now["robust_accuracy"] == then["robust_accuracy"]
    assert found["rows"][-1]["robust_accuracy"] == rows[2]["robust_accuracy"]


def test_the_run_is_exported_as_it_was_then(run, tmp_path):
    shown("export", run, "--to", tmp_path / "exported", "--json")
    weights = "model.safetensors"
    assert (tmp_path / "exported" / weights).read_bytes() == (EXPORTED / weights).read_bytes()
    now, then = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "exported", EXPORTED))
    assert now["architecture"]["backbone"] == then["architecture"]["backbone"]
    assert now["class_names"] == then["class_names"] and now["threat"] == then["threat"]


def test_an_exported_model_is_evaluated(tmp_path):
    options = ("--data", "digits", "--limit", 32, "--attack", "fgsm", "--output", tmp_path / "found")
    found = shown("evaluate", EXPORTED, *options, "--quiet", "--json")
    kept = json.loads((RUN / "evaluation" / "results.json").read_text(encoding="utf-8"))
    assert found["num_samples"] == 32 and found["threat"] == kept["threat"]
