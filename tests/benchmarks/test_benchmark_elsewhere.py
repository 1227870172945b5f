"""Guided distillation on other data: its script goes on anywhere, and its choices and answers follow the protocol."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.studies import ROOT, after, asked_of, made_run, measured, module_of, recipe_of, trained


@pytest.fixture(scope="module")
def collect():
    return module_of("elsewhere/collect.py")


def run_of(folder, phase, data="tiny", **environment):
    script = "benchmarks/elsewhere/run.sh"
    return asked_of(script, folder, phase, data, "DATA", str(folder / "out"), **{"SAYS": "3 6", **environment})


@pytest.mark.parametrize(("data", "epochs"), [("tiny", 40), ("fashion", 160)])
def test_both_phases_ask_for_recipes_that_can_be_read(data, epochs, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    ended, asked = run_of(tmp_path, "choose", data)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"EPOCHS={epochs} BETA=3 GUIDED_BETA=6" in ended.stdout
    chosen = trained(asked)
    assert set(chosen) == {
        f"{data}/{name}-beta-{beta}/seed=0"
        for name in (f"base-{2 * epochs}", f"guided-{2 * epochs}")
        for beta in (3, 6, 12)
    }
    attacked = [words for words in asked if words[0] == "evaluate"]
    assert {after("--data", words) for words in attacked} == {"DATA/held_out"}
    ended, asked = run_of(tmp_path, "compare", data)
    assert (ended.returncode, ended.stderr) == (0, "")
    compared = trained(asked)
    assert len(compared) == 9
    assert {Path(name).parent.name for name in compared} == {
        f"base-{2 * epochs}-beta-3", f"base-{epochs}-beta-3", f"guided-{2 * epochs}-beta-6",
    }  # fmt: skip
    heads = [words for words in asked if words[0] == "evaluate" and "--output-of" in words]
    assert len(heads) == 3
    for words in (chosen | compared).values():
        recipe = recipe_of(words)
        assert recipe.threat.eps == pytest.approx(8 / 255 if data == "tiny" else 0.1)
        assert recipe.stages[0].epochs > 0


def test_several_processes_can_share_the_runs_of_a_choice(tmp_path):
    ended, asked = run_of(tmp_path, "choose", METHODS="guided-*")
    assert ended.returncode == 0, ended.stderr
    assert set(trained(asked)) == {f"tiny/guided-80-beta-{beta}/seed=0" for beta in (3, 6, 12)}


def test_what_is_kept_is_not_trained_again(tmp_path):
    run_of(tmp_path, "compare")
    (tmp_path / "kept/tiny/compare/base-80-beta-3/seed=1.json").unlink()
    other = tmp_path / "another machine"
    other.mkdir()
    (tmp_path / "kept").rename(other / "kept")
    _, asked = run_of(other, "compare")
    assert set(trained(asked)) == {"tiny/base-80-beta-3/seed=1"}
    _, asked = run_of(other, "choose")
    assert len(trained(asked)) == 6  # what was measured on test images chooses nothing


def test_a_length_is_chosen_anew_on_demand(tmp_path):
    ended, asked = run_of(tmp_path, "choose", EPOCHS="", SAYS="80")
    assert ended.returncode == 0
    assert [Path(name).parent.name for name in trained(asked)][:3] == [f"base-{n}-beta-6" for n in (40, 80, 160)]
    assert "tiny/guided-160-beta-3/seed=0" in trained(asked)
    ended, asked = run_of(tmp_path, "compare", EPOCHS="")
    assert (ended.returncode, ended.stderr.strip(), asked) == (2, "EPOCHS: choose it first", [])


def test_what_is_not_known_is_refused(tmp_path):
    for phase, data, told in (
        ("choose", "digits", "digits: use tiny or fashion"),
        ("chose", "tiny", "chose: use choose"),
    ):
        ended, asked = run_of(tmp_path, phase, data)
        assert (ended.returncode, asked) == (2, [])
        assert told in ended.stderr


def test_choices_follow_the_protocol(collect):
    assert collect.converged({40: 0.215, 80: 0.22, 160: 0.2}) == 40  # within half a point of the best
    assert collect.converged({40: 0.2149, 80: 0.22, 160: 0.2}) == 80
    found = {3: {"robust": 0.2, "clean": 0.5}, 6: {"robust": 0.21, "clean": 0.4}, 12: {"robust": 0.21, "clean": 0.45}}
    assert collect.best(found) == 12


def test_betas_are_chosen_once_all_are_measured(collect, tmp_path, capsys):
    for name, robust in (("base-80", (0.1, 0.12, 0.11)), ("guided-80", (0.13, 0.1, 0.12))):
        for beta, share in zip((3, 6, 12), robust, strict=True):
            run = made_run(tmp_path / "run", held_out=(0, 0))
            measured(0.5, share).save(run / "evaluations" / "held_out")
            file = tmp_path / f"kept/tiny/choose/{name}-beta-{beta}/seed=0.json"
            collect.main(["keep", str(run), str(file), "held_out"])
            if (name, beta) == ("guided-80", 6):
                assert collect.betas(tmp_path / "kept/tiny", 40) == (6, None)
                with pytest.raises(SystemExit, match="not every beta"):
                    collect.main(["betas", str(tmp_path / "kept/tiny"), "40"])
    collect.main(["betas", str(tmp_path / "kept/tiny"), "40"])
    assert capsys.readouterr().out == "6 3\n"
    assert collect.length(tmp_path / "kept/tiny") is None
    assert collect.tell(tmp_path / "kept")["tiny"]["choose"]["base-80-beta-6"] == {"clean": 0.5, "robust": 0.12}


def test_the_comparison_is_answered_for_both_heads_and_for_head_2(collect, tmp_path, capsys):
    for seed in range(3):
        step = 0.005 * seed
        for name, strong, head2 in (
            ("base-80-beta-3", (0.5 + step, 0.2 + step), None),
            ("base-40-beta-3", (0.6 + step, 0.3 - step), None),
            ("guided-80-beta-6", (0.53 + step, 0.24 + 2 * step), (0.5 + step, 0.19 + step)),
        ):
            more = {} if head2 is None else {"head2": measured(*head2)}
            run = made_run(tmp_path / name / str(seed), strong=measured(*strong), **more)
            file = tmp_path / f"kept/tiny/compare/{name}/seed={seed}.json"
            collect.main(["keep", str(run), str(file), "strong", *more])
    collect.main(["tell", str(tmp_path / "kept"), str(tmp_path / "told.json")])
    told = collect.tell(tmp_path / "kept")["tiny"]["compare"]
    equal, half = "base-80-beta-3 (equal cost)", "base-40-beta-3 (base at half the cost)"
    assert told["answers"] == {
        f"guided-80-beta-6 less {equal}": "gains",
        f"guided-80-beta-6, head 2 less {equal}": "loses",
        f"guided-80-beta-6 less {half}": "loses",
        f"guided-80-beta-6, head 2 less {half}": "loses",
    }
    assert {row["name"]: row["parameters"] for row in told["rows"]}["guided-80-beta-6, head 2"] == 77_850
    printed = capsys.readouterr().out
    assert f"| guided-80-beta-6 less {equal} | +3.0 [+2.9, +3.1] |" in printed


def test_what_is_told_is_what_was_kept(collect):
    results = ROOT / "benchmarks" / "results"
    told = json.loads(json.dumps(collect.tell(results / "elsewhere")))
    assert told == json.loads((results / "elsewhere.json").read_text())
