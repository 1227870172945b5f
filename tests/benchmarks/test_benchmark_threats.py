"""The study of many threats: what its script asks for costs the same, goes on where it was, and is collected."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import studies
from helpers.studies import ROOT, after, module_of, recipe_of

PASSES = {"sat": 13, "any_of": 13, "avg": 39, "msd": 28, "ramp": 26}


def asked_of(folder, **environment):
    return studies.asked_of(
        "benchmarks/threats/run.sh", folder, "DATA", str(folder / "out"), **{"SEEDS": "0", **environment}
    )


def test_every_variant_costs_the_same_and_nothing_is_done_twice(tmp_path):
    ended, asked = asked_of(tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    trained = [words for words in asked if words[0] == "train"]
    assert len(trained) == len([words for words in asked if words[0] == "evaluate"]) == 9
    protocol = (ROOT / "benchmarks/threats/README.md").read_text()
    for words in trained:
        name = Path(after("--run-dir", words)).parent.name
        assert f"`{name}`" in protocol
        recipe = recipe_of(words)
        (stage,) = recipe.stages
        passes = 39 if name == "max" else PASSES[stage.objective.registered_name]
        assert stage.epochs * passes == pytest.approx(640, rel=0.03), name
    _, again = asked_of(tmp_path)
    assert again == []


@pytest.fixture(scope="module")
def module():
    return module_of("threats/collect.py")


def test_questions_are_answered_by_paired_seeds(module):
    def records(linf, l2, l1, union):
        def each(value, seed):
            return value + 0.001 * seed

        return {
            seed: {
                "images": 1000,
                "threats": {"Linf": each(linf, seed), "L2": each(l2, 0), "L1": each(l1, 0)},
                "union": each(union, 0),
            }
            for seed in range(3)
        }

    runs = {
        "sat-linf": records(0.3, 0.3, 0.1, 0.1), "sat-l2": records(0.1, 0.4, 0.2, 0.05),
        "sat-l1": records(0.1, 0.2, 0.3, 0.08), "e-at": records(0.25, 0.35, 0.35, 0.2),
        "max": records(0.2, 0.3, 0.2, 0.1), "avg": records(0.2, 0.3, 0.2, 0.25),
    }  # fmt: skip
    runs["max"] = {seed: {**of, "union": (0.1, 0.2, 0.3)[seed]} for seed, of in runs["max"].items()}
    found = module.questions(runs)
    own = {norm: each["answer"] for norm, each in found["specialist_is_best_under_its_norm"].items()}
    assert own == {"Linf": "holds", "L2": "holds", "L1": "does not hold"}
    beyond = found["union_beyond_best_specialist"]
    assert beyond["best"] == "sat-linf"
    assert {name: each["answer"] for name, each in beyond["above"].items()} == {
        "e-at": "gain",
        "max": "undecided",
        "avg": "gain",
    }
    three = found["one_adaptive_attack_beyond_three"]
    assert (three["max"]["answer"], three["avg"]["answer"]) == ("undecided", "loss")
    assert three["avg"]["mean"] == pytest.approx(-0.05)


def test_shares_are_of_the_specialist_of_each_norm(module):

    def made(clean, linf, l2, l1):
        return {key: {"mean": value} for key, value in {"clean": clean, "Linf": linf, "L2": l2, "L1": l1}.items()}

    variants = {"sat-linf": made(0.4, 0.2, 0.1, 0.1), "sat-l2": made(0.8, 0.1, 0.4, 0.1)}
    assert module.shares(made(0.4, 0.1, 0.2, 0.1), variants) is None
    variants["sat-l1"] = made(0.5, 0.0, 0.1, 0.2)
    found = module.shares(made(0.4, 0.1, 0.3, 0.1), variants)
    assert found == pytest.approx({"clean": 0.5, "Linf": 0.5, "L2": 0.75, "L1": 0.5, "average": 0.5625, "worst": 0.5})


def test_the_figure_has_a_point_for_each_accuracy_and_none_for_what_is_not_measured():
    figures = module_of("../tools/make_figures.py")
    known = {"mean": 0.3, "interval": [0.28, 0.32]}
    of = dict.fromkeys(("clean", "Linf", "L2", "L1", "union"), known)
    found = {"under_way": True, "variants": {"sat-linf": of, "e-at": {**of, "union": {"mean": 0.1, "interval": None}}}}
    drawn = figures.threats(found)
    assert drawn.count("<circle") == 10
    assert drawn.count('fill="#f6f7f9" stroke') == 1  # of one seed
    assert "Under way." in drawn
