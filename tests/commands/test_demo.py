"""The demonstration leads with the comparison at equal training cost, and tells it as it came out."""

from __future__ import annotations

import json

import pytest

from dualhead.commands.demo import BASE, GUIDED, RECIPES, honest_comparison, run_demo
from dualhead.recipe import load_recipe
from helpers.e2e import TINY


def pair(difference, low, high, verdict, p_value=0.5):
    return {"difference": difference, "interval": [low, high], "verdict": verdict, "p_value": p_value}


def test_a_loss_is_called_a_loss_and_chance_is_undecided():
    told = honest_comparison(
        {"clean": pair(-0.03, -0.05, -0.01, "loss", 0.012), "pgd-40": pair(0.01, -0.02, 0.04, "undecided")}, 0.98
    )
    assert told.startswith("At 0.98 times the training cost of TRADES, its base method, guided distillation differs")
    assert "clean accuracy by -3.0 [-5.0, -1.0] points (p = 0.012, a loss)" in told
    assert told.endswith("robust accuracy by +1.0 [-2.0, +4.0] points (p = 0.5, undecided).")


@pytest.mark.slow
def test_it_compares_guided_distillation_with_its_base_method(tmp_path, monkeypatch):
    def tiny(name):
        short = [pair for pair in TINY if not ("natural" in name and "attack" in pair and pair.startswith("stages"))]
        return load_recipe(name, [text.replace("pgd-3", "pgd-40") for text in short])

    monkeypatch.setattr("dualhead.commands.demo.load_recipe", tiny)
    found = run_demo(tmp_path)
    assert [row["name"] for row in found.rows] == ["natural training", "TRADES", "head 1", "head 2", "mean of heads"]
    assert found.remarks[0].startswith("At 2.")  # an epoch of either stage costs more than one of TRADES
    files = [tmp_path / name / "comparison.json" for name in (BASE, GUIDED)]
    base, guided = (json.loads(file.read_text())["rows"][-1]["robust_accuracy"]["pgd-40"] for file in files)
    difference = guided - base
    assert f"robust accuracy by {100 * difference:+.1f} [" in found.remarks[0]
    assert (tmp_path / "report.html").is_file()
    assert all((tmp_path / name / "config.yaml").is_file() for name in RECIPES)
