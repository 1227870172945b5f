"""The scripts of all studies are asked alike for a part: METHODS is a pattern of names, SEEDS a list."""

from __future__ import annotations

import pytest

from helpers.studies import asked_of, trained

STUDIES = [
    ("continual", (".",), "finetune", "forward/finetune"),
    ("domains", ("DATA",), "dual-l*", "dual-last"),
    ("elsewhere", ("compare", "tiny", "DATA"), "base-40-*", "tiny/base-40-beta-3"),
    ("generation", (), "dat", "dat"),
    ("larger", ("DATA",), "st*", "stem-trades"),
    ("poisoning", ("DATA",), "base-blend", "study/base-blend"),
    ("strongest", ("cpu", "DATA"), "mart-dhat", "mart-dhat"),
    ("threats", ("DATA",), "m[!a]*", "msd"),
    ("transfer", ("TINY", "DATA"), "tuned-500", "tuned-500"),
]


def run_of(study, words, folder, **environment):
    further = ("study",) if study == "poisoning" else ()
    script = f"benchmarks/{study}/run.sh"
    chosen = {"RATE": "0.1", "BETA": "3", "GUIDED_BETA": "6"}
    return asked_of(script, folder, *words, str(folder / "out"), *further, **chosen, **environment)


@pytest.mark.parametrize(("study", "words", "methods", "name"), STUDIES)
def test_methods_and_seeds_choose_runs(study, words, methods, name, tmp_path):
    ended, asked = run_of(study, words, tmp_path, METHODS=methods, SEEDS="1 4")
    assert (ended.returncode, ended.stderr) == (0, "")
    found = [run for run in trained(asked) if not run.startswith("trunk/")]
    assert [run for run in found if run.startswith(f"{name}/")] == [f"{name}/seed=1", f"{name}/seed=4"]
    assert {run.rpartition("/")[2] for run in found} == {"seed=1", "seed=4"}
    ended, asked = run_of(study, words, tmp_path, METHODS="nothing")
    assert ended.returncode == 2
    assert ended.stderr.startswith("METHODS=nothing: no ")
    assert not [words for words in asked if words[0] == "train" and "/trunk/" not in " ".join(words)]
