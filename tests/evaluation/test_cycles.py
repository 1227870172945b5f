"""PGD that stops at a cycle: the same verdicts for fewer passes, and never where answers are random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dualhead.evaluation import evaluate, work
from dualhead.evaluation.journal import Journal
from helpers.evaluation import THREAT, StopAfter, StoppedError, assert_same, patterns, trained

LONG = [{"name": "pgd", "steps": 60, "step_size": "8/255", "restarts": 2}]


def measure(model=None, **options):
    images, labels = patterns(40)
    settings = {"threat": THREAT, "attacks": LONG, "precision": "float32", "diagnostics": False}
    return evaluate(model or trained(), images, labels, **{**settings, **options})


def passes(result):
    (record,) = result.results["attacks"].values()
    return record["forward_passes"]


def test_same_verdicts_for_fewer_passes(monkeypatch):
    stopping = measure()
    monkeypatch.setattr(work, "is_random", lambda *_: True)
    full = measure()
    assert_same(stopping, full)
    assert 0 < stopping.robust_accuracy["worst"] < 1
    assert passes(stopping) < 0.8 * passes(full)


def test_looking_less_often_changes_no_verdict(monkeypatch):
    whole = measure()
    monkeypatch.setattr(work, "check_interval", lambda device: 5)
    (again,), (expected,) = measure(batch_size=16).verdicts.values(), whole.verdicts.values()
    for column in ("robust", "job", "distance", "margin"):
        np.testing.assert_array_equal(getattr(again, column), getattr(expected, column))


def test_what_another_version_left_under_way_is_begun_anew(monkeypatch, tmp_path):
    """Flights of searches that kept other state."""
    whole = measure()
    monkeypatch.setattr(Journal, "flight_interval", 0.0)
    with pytest.raises(StoppedError):
        measure(output_dir=tmp_path, progress=StopAfter(12))
    (flight,) = (tmp_path / "progress").glob("flight-*.npz")
    with np.load(flight) as stored:
        earlier = {name: stored[name] for name in stored.files if name != "state_landmark"}
    np.savez(flight, **earlier)
    assert_same(measure(output_dir=tmp_path), whole)


class Noisy(nn.Module):
    """A model whose answers differ from pass to pass."""

    def forward(self, x):
        return trained()(x) + 0.1 * torch.randn(len(x), 4)


def test_a_random_model_is_attacked_to_the_end():
    torch.manual_seed(0)
    noisy = measure(Noisy())
    left = int(noisy.verdicts["pgd-60(step_size=0.0313725,restarts=2)"].robust.sum())
    assert passes(noisy) >= left * 2 * 61
