"""The study of two domains: what its script asks for can be run, costs the same, and is collected."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

from dualhead.commands.sweep import plan

ROOT = Path(__file__).parents[2]
RECORDER = """#!/usr/bin/env bash
printf '%s\\n' "$@" END >> "$ASKED"
if [[ $1 == sweep ]]; then
  for seed in 0 1; do mkdir -p "${@: -2:1}/seed=$seed/model"; touch "${@: -2:1}/seed=$seed/model/config.json"; done
fi
if [[ $1 == evaluate ]]; then mkdir -p "${@: -2:1}"; fi
"""
"""In place of dualhead and of python: writes down what it was asked, and leaves runs and evaluations."""


def asked_of(folder, **environment):
    """How the script ended, and the commands that it gave."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in (("dualhead", RECORDER), ("python", "#!/usr/bin/env bash\n")):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "asked").write_text("")
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    ended = subprocess.run(
        ["benchmarks/domains/run.sh", "DATA", str(folder / "out")],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "ASKED": str(folder / "asked"), "SEEDS": "2", **environment},
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    return ended, [text.splitlines() for text in (folder / "asked").read_text().split("END\n") if text]


def after(word, words):
    return words[words.index(word) + 1]


@pytest.fixture(scope="module")
def collect():
    spec = importlib.util.spec_from_file_location("collect_domains", ROOT / "benchmarks/domains/collect.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_variant_has_a_recipe_of_equal_cost_and_is_measured_as_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    ended, asked = asked_of(tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    sweeps = {Path(after("--out", words)).name: words for words in asked if words[0] == "sweep"}
    measured = [words for words in asked if words[0] == "evaluate"]
    assert list(sweeps)[:4] == ["single-separate", "dual", "dual-affine", "dual-statistics"]  # those that decide
    assert len(measured) == 2 * 2 * len(sweeps)  # attacks and corruptions, of two seeds
    protocol = (ROOT / "benchmarks/domains/README.md").read_text()
    passes = {"hybrid": 16, "mart": 16, "trades": 17, "sat": 13, "align": 16}
    for name, words in sweeps.items():
        group = name.split("-")[0]
        assert f"`{name}`" in protocol or f"`{group}-*`" in protocol, name
        (job, _) = plan(words[1], words[2 : words.index("--seeds")], 2)
        (stage,) = job.recipe.stages
        each = 17 if name == "aligned_r3" else passes[stage.objective.registered_name]  # R3 asks for clean logits too
        cost = stage.epochs * each
        assert cost == pytest.approx(640, rel=0.03), name
        routes = [w for w in measured if f"/{name}/" in w[1] and "--routes" in w]
        assert bool(routes) == (job.recipe.model.tied is not None), name
    ended, again = asked_of(tmp_path, STUDIES="dual*")
    assert not [words for words in again if words[0] == "evaluate"]  # what is done is not done again
    ended, _ = asked_of(tmp_path, STUDIES="nothing")
    assert ended.returncode == 2
    assert "no variant is called so" in ended.stderr


def found(seeds, images):
    return {"seeds_interval": seeds, "images_interval": images}


def test_hypotheses_hold_where_both_intervals_say_so(collect):
    gain, loss = found([0.01, 0.03], [0.01, 0.02]), found([-0.03, -0.01], [-0.02, -0.01])
    wide, small = found([-0.1, 0.1], [0.01, 0.02]), found([-0.005, 0.005], [-0.01, 0.01])
    assert [collect.verdict(each) for each in (gain, loss, wide, small, None)] == [
        "gain", "loss", "undecided", "undecided", "undecided",
    ]  # fmt: skip
    assert collect.answer([(gain, "gain"), (small, "no gain")]) == "holds"
    assert collect.answer([(gain, "gain"), (wide, "no gain")]) == "undecided"
    assert collect.answer([(gain, "gain"), (gain, "no gain")]) == "does not hold"
    assert collect.answer([(loss, "gain"), (small, "no gain")]) == "does not hold"
    assert collect.equal([small, small]) == "holds"
    assert collect.equal([small, wide]) == "undecided"
    assert collect.equal([small, found([0.02, 0.04], [0.0, 0.1])]) == "does not hold"


def test_means_have_student_s_interval_over_seeds(collect):
    told = collect.over_seeds([0.1, 0.2, 0.3])
    assert told["mean"] == pytest.approx(0.2)
    assert told["interval"] == pytest.approx([0.2 - 0.2484, 0.2 + 0.2484], abs=1e-4)
    assert collect.over_seeds([0.1])["interval"] is None
    assert collect.averaged([{"a": {"b": 1.0}, "c": "x"}, {"a": {"b": 3.0}, "c": "y"}]) == {"a": {"b": 2.0}, "c": "x"}
