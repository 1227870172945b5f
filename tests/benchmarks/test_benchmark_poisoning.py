"""The collection of the study of poisoned data: cells beside clean data, and nothing of what is not finished."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def collect():
    spec = importlib.util.spec_from_file_location("collect", ROOT / "benchmarks" / "poisoning" / "collect.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.collect


def finish(run, clean, **poison):
    (run / "evaluation").mkdir(parents=True)
    row = {"clean_accuracy": clean, "robust_accuracy": {"worst": 0.2}, **({"poison": poison} if poison else {})}
    (run / "comparison.json").write_text(json.dumps({"rows": [row]}))
    (run / "evaluation" / "results.json").write_text(json.dumps({"num_samples": 100}))


def test_cells_are_paired_with_clean_data_by_seed(collect, tmp_path):
    for seed, lost in enumerate((0.1, 0.2, 0.3)):
        finish(tmp_path / "natural-clean" / f"seed={seed}", 0.8)
        finish(tmp_path / "natural-patch" / f"seed={seed}", 0.8 - lost, attack_success_rate=0.9, num_triggered=90)
    (tmp_path / "natural-patch" / "seed=3").mkdir()
    made = collect(tmp_path)
    assert made["natural-patch"]["seeds"] == ["0", "1", "2"]
    lost = made["natural-patch"]["against_clean_data"]["clean_accuracy"]
    assert lost["mean"] == pytest.approx(-0.2)
    assert lost["interval"] == pytest.approx([-0.2 - 0.2484, -0.2 + 0.2484], abs=1e-4)  # 4.303 * 0.1 / sqrt(3)
    assert made["natural-patch"]["attack_success_rate"]["mean"] == pytest.approx(0.9)
    assert "against_clean_data" not in made["natural-clean"]


def test_one_seed_has_wilsons_interval_and_no_interval_of_a_difference(collect, tmp_path):
    finish(tmp_path / "sat-clean" / "seed=0", 0.8)
    finish(tmp_path / "sat-patch" / "seed=0", 0.7, attack_success_rate=0.5, num_triggered=90)
    made = collect(tmp_path)["sat-patch"]
    low, high = made["clean_accuracy"]["interval"]
    assert low < 0.7 < high
    assert made["against_clean_data"]["clean_accuracy"]["interval"] is None
