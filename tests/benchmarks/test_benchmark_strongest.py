"""The comparison at equal cost: its script asks for what can be run and costs the same, and stops and goes on."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest
from datasets import Dataset

from dualhead.commands.sweep import plan
from helpers.costs import training_cost

ROOT = Path(__file__).parents[2]
RECORDER = """#!/usr/bin/env bash
printf '%s\\n' "$@" END >> "$ASKED"
trap 'exit 130' INT
[[ -z ${HANGS_ON:-} || $* != *"$HANGS_ON"* ]] || for _ in {1..600}; do sleep 0.1; done
[[ $1 != evaluate ]] || { mkdir -p "${@: -2:1}"; touch "${@: -2:1}/results.json"; }
"""
"""In place of dualhead: writes down what it was asked, and leaves results of evaluations."""


def asked_of(scale, folder, *more, within="60", **environment):
    """How the script ended, and the commands that it gave; within so many seconds."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    (folder / "bin" / "dualhead").write_text(RECORDER)
    (folder / "bin" / "dualhead").chmod(0o755)
    record = folder / "asked"
    record.write_text("")
    script = ["benchmarks/strongest/run.sh", scale, "DATA", str(folder / "out"), *more]
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    ended = subprocess.run(
        ["timeout", "--signal", "INT", within, *script],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "ASKED": str(record), **environment},
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    return ended, [text.splitlines() for text in record.read_text().split("END\n") if text]


def after(word, words):
    return words[words.index(word) + 1]


def jobs_of(words):
    return plan(words[1], words[2 : words.index("--seeds")], int(after("--seeds", words)))


@pytest.mark.parametrize(("scale", "studies"), [("cpu", 49), ("gpu", 11)])
def test_every_run_has_a_recipe_and_harder_attacks(scale, studies, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    ended, asked = asked_of(scale, tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    sweeps = [words for words in asked if words[0] == "sweep"]
    runs = [Path(after("--out", words)) / job.name for words in sweeps for job in jobs_of(words)]
    assert len({after("--out", words) for words in sweeps}) == studies
    found = {"strong": [], "adaptive": [], "autoattack": []}
    for words in asked:
        if words[0] == "evaluate":
            found[Path(after("--output", words)).name].append(words)
    for name in ("strong", "adaptive"):
        assert [words[1] for words in found[name]] == [str(run) for run in runs]
    assert all({"autoattack-fast", "pgd-40"} <= set(words) for words in found["strong"])
    for words in found["adaptive"]:
        several = ("dhat", "distilled", "ensemble", "three", "joint", "finetune", "mixed")
        merges = any(name in words[1] for name in several)
        assert "square-500" in words
        assert ("multihead-20" in words) == merges
    assert {Path(words[1]).parent.name for words in found["autoattack"]} >= {"trades-base", "trades-distilled"}
    assert {words[1] for words in found["autoattack"]} <= {str(run) for run in runs}
    again, asked = asked_of(scale, tmp_path)
    assert again.returncode == 0
    assert not [words for words in asked if words[0] == "evaluate"]


@pytest.mark.parametrize("scale", ["cpu", pytest.param("gpu", marks=pytest.mark.slow)])
def test_what_is_compared_costs_the_same(scale, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, asked = asked_of(scale, tmp_path, SEEDS="1")
    sweeps = {Path(after("--out", words)).name: jobs_of(words)[0].recipe for words in asked if words[0] == "sweep"}
    for method in ("trades", "sat", "mart"):
        base, long = (
            training_cost(sweeps.get(f"{method}-{name}", sweeps[f"{method}-base"])) for name in ("base", "base-long")
        )
        for other, most in (("dhat", base), ("distilled", long), ("ensemble", long)):
            if other != "ensemble" or method == "trades":
                assert 0.95 * most <= training_cost(sweeps[f"{method}-{other}"]) <= 1.001 * most, (method, other)
    if scale == "cpu":
        short, long, mart = (training_cost(sweeps[name]) for name in ("trades-base", "trades-base-long", "mart-base"))
        for name, most in (("trades-three", long), ("trades-three-short", short), ("mart-distilled-short", mart)):
            assert 0.95 * most <= training_cost(sweeps[name]) <= 1.001 * most, name


def test_it_goes_on_where_it_was_stopped(tmp_path):
    ended, asked = asked_of("gpu", tmp_path, within="2", HANGS_ON="trades-dhat")
    assert ended.returncode == 124
    assert [words[0] for words in asked] == [*["sweep", *["evaluate"] * 10] * 2, *["sweep", *["evaluate"] * 6], "sweep"]
    ended, asked = asked_of("gpu", tmp_path)
    assert ended.returncode == 0
    assert [words[0] for words in asked] == [*["sweep"] * 3, *["sweep", *["evaluate"] * 6] * 8, *["evaluate"] * 9]


def test_a_pattern_chooses_studies(tmp_path):
    _, asked = asked_of("cpu", tmp_path, STUDIES="mart-d*", SEEDS="1")
    sweeps = {Path(after("--out", words)).name for words in asked if words[0] == "sweep"}
    assert sweeps == {"mart-distilled", "mart-dhat", "mart-distilled-short"}
    assert {Path(words[1]).parent.name for words in asked if words[0] == "evaluate"} == sweeps
    _, asked = asked_of("cpu", tmp_path, STUDIES="trades-distilled", SEEDS="1")
    found = {Path(after("--output", words)).name for words in asked if words[0] == "evaluate"}
    assert found == {"strong", "adaptive", "autoattack"}


def test_shards_share_the_seeds(tmp_path):
    runs = []
    for number in (0, 1):
        _, asked = asked_of("gpu", tmp_path / str(number), f"{number}/2", "stages.*.epochs=1")
        runs.append({Path(words[1]).name for words in asked if words[0] == "evaluate"})
        assert all("stages.*.epochs=1" in words and after("--shard", words) == f"{number}/2"
                   for words in asked if words[0] == "sweep")  # fmt: skip
    assert runs == [{"seed=0", "seed=2", "seed=4"}, {"seed=1", "seed=3"}]


def test_held_out_images_are_attacked_in_place_of_test_images(tmp_path):
    _, asked = asked_of("cpu", tmp_path, HELD_OUT="HELD", SEEDS="1")
    attacked = [words for words in asked if words[0] == "evaluate"]
    assert {after("--data", words) for words in attacked} == {"HELD"}
    assert {Path(after("--output", words)).name for words in attacked} == {"held_out"}
    _, asked = asked_of("gpu", tmp_path, SEEDS="1")
    assert {after("--data", words) for words in asked if words[0] == "evaluate"} == {"DATA"}


def test_what_would_mislead_is_refused(tmp_path):
    for scale, environment, told in (
        ("gpu", {"HELD_OUT": "HELD"}, "HELD_OUT: the recipes for a GPU train on those images"),
        ("cpu", {"STUDIES": "trades-bse"}, "STUDIES=trades-bse: no study of this scale is called so"),
        ("gpu", {"STUDIES": "trades-three"}, "STUDIES=trades-three: no study of this scale is called so"),
    ):
        ended, asked = asked_of(scale, tmp_path, SEEDS="1", **environment)
        assert (ended.returncode, ended.stderr.strip(), asked) == (2, told, [])


def test_held_out_images_are_the_last_of_the_training_part(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("held_out", ROOT / "benchmarks/strongest/held_out.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FIRST", 7)
    (tmp_path / "in").mkdir()
    Dataset.from_dict({"label": list(range(10))}).to_parquet(tmp_path / "in" / "train-00000-of-00001.parquet")
    monkeypatch.setattr("sys.argv", ["held_out.py", str(tmp_path / "in"), str(tmp_path / "out")])
    module.main()
    (written,) = (tmp_path / "out").iterdir()
    assert written.name.startswith("test-")
    assert Dataset.from_parquet(str(written))["label"][:] == [7, 8, 9]
