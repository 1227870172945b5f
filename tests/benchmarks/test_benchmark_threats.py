"""The study of many threats: what its script asks for costs the same, goes on where it was, and is gathered."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

from dualhead.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECORDER = """#!/usr/bin/env bash
printf '%s\\n' "$@" END >> "$ASKED"
if [[ $1 == train ]]; then
  run=${@: -2:1}; mkdir -p "$run/model"; touch "$run/model/config.json"
elif [[ $2 == keep ]]; then mkdir -p "$(dirname "$4")"; touch "$4"; fi
"""
"""In place of dualhead and of python: writes down what it was asked, and leaves runs and evaluations."""
PASSES = {"sat": 13, "any_of": 13, "avg": 39, "msd": 28, "ramp": 26}


def asked_of(folder, **environment):
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("dualhead", "python"):
        (folder / "bin" / name).write_text(RECORDER)
        (folder / "bin" / name).chmod(0o755)
    (folder / "asked").write_text("")
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    ended = subprocess.run(
        ["benchmarks/threats/run.sh", "DATA", str(folder / "out")],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "ASKED": str(folder / "asked"), "KEPT": str(folder / "kept"), "SEEDS": "1",
             **environment},
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    return ended, [text.splitlines() for text in (folder / "asked").read_text().split("END\n") if text]


def test_every_variant_costs_the_same_and_nothing_is_done_twice(tmp_path):
    ended, asked = asked_of(tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    trained = [words for words in asked if words[0] == "train"]
    assert len(trained) == len([words for words in asked if words[0] == "evaluate"]) == 9
    protocol = (ROOT / "benchmarks/threats/README.md").read_text()
    for words in trained:
        name = Path(words[words.index("--run-dir") + 1]).parent.name
        assert f"`{name}`" in protocol
        recipe = load_recipe(str(ROOT / words[1]), words[2 : words.index("--run-dir")])
        (stage,) = recipe.stages
        passes = 39 if name == "max" else PASSES[stage.objective.registered_name]
        assert stage.epochs * passes == pytest.approx(640, rel=0.03), name
    _, again = asked_of(tmp_path)
    assert again == []
    ended, _ = asked_of(tmp_path, STUDIES="nothing")
    assert ended.returncode == 2


def test_shares_are_of_the_specialist_of_each_norm():
    spec = importlib.util.spec_from_file_location("gather_threats", ROOT / "benchmarks/threats/gather.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def made(clean, linf, l2, l1):
        return {key: {"mean": value} for key, value in {"clean": clean, "Linf": linf, "L2": l2, "L1": l1}.items()}

    variants = {"sat-linf": made(0.4, 0.2, 0.1, 0.1), "sat-l2": made(0.8, 0.1, 0.4, 0.1)}
    assert module.shares(made(0.4, 0.1, 0.2, 0.1), variants) is None
    variants["sat-l1"] = made(0.5, 0.0, 0.1, 0.2)
    found = module.shares(made(0.4, 0.1, 0.3, 0.1), variants)
    assert found == pytest.approx({"clean": 0.5, "Linf": 0.5, "L2": 0.75, "L1": 0.5, "average": 0.5625, "worst": 0.5})
