"""The benchmark of growth runs, and its line is the straight one."""

from __future__ import annotations

import json
import sys

import pytest

from helpers.studies import module_of


@pytest.fixture(scope="module")
def benchmark():
    return module_of("scaling.py")


def test_a_straight_line_is_found_and_a_bent_one_is_seen(benchmark):
    straight = benchmark.line_through([1, 2, 4], [1.5, 2.0, 3.0])
    assert straight["seconds_each"] == pytest.approx(0.5)
    assert straight["seconds_at_0"] == pytest.approx(1.0)
    assert straight["r2"] == pytest.approx(1.0)
    assert straight["largest_relative_residual"] == pytest.approx(0.0, abs=1e-9)
    bent = benchmark.line_through([1, 2, 4], [1.0, 4.0, 16.0])
    assert bent["r2"] < 0.99
    assert bent["largest_relative_residual"] > 0.1


@pytest.mark.slow  # four processes of their own
def test_one_command_measures_everything(benchmark, monkeypatch, tmp_path):
    output = tmp_path / "results.json"
    small = ["--backbone", "cnn-2", "--batch-size", "2", "--side", "8", "--rounds", "1", "--epochs", "3"]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *small, "--device", "cpu", "-o", str(output)])
    benchmark.main()
    results = json.loads(output.read_text())
    assert 0 < results["start_up_digits"]["first_step_begins"] < results["start_up_digits"]["first_step_is_over"]
    assert len(results["memory"]["peak_mb"]) == 3
    assert set(results["growth"]) == {"images", "epochs", "attack steps"}
    assert all(line["seconds_each"] > 0 for line in results["growth"].values())
