"""The study of two domains: what its script asks for can be run, costs the same, and is collected."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dualhead.evaluation import Evaluation, Verdicts
from dualhead.evaluation.results import accuracies
from dualhead.recipe import load_recipe
from helpers import studies
from helpers.studies import ROOT, after, made_run, measured, module_of, recipe_of


def asked_of(folder, **environment):
    asked = {"SEEDS": "3 4", **environment}
    return studies.asked_of("benchmarks/domains/run.sh", folder, "DATA", str(folder / "out"), **asked)


@pytest.fixture(scope="module")
def collect():
    return module_of("domains/collect.py")


def test_every_variant_has_a_recipe_of_equal_cost_and_is_measured_as_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    ended, asked = asked_of(tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    trained = {Path(after("--run-dir", words)).parent.name: words for words in asked if words[0] == "train"}
    measured = [words for words in asked if words[0] == "evaluate"]
    assert list(trained)[:4] == ["single-separate", "dual", "dual-affine", "dual-statistics"]  # those that decide
    assert len(measured) == 2 * 2 * len(trained)  # attacks and corruptions, of two seeds
    protocol = (ROOT / "benchmarks/domains/README.md").read_text()
    passes = {"hybrid": 16, "mart": 16, "trades": 17, "sat": 13, "align": 16}
    for name, words in trained.items():
        group = name.split("-")[0]
        assert f"`{name}`" in protocol or f"`{group}-*`" in protocol, name
        recipe = recipe_of(words)
        (stage,) = recipe.stages
        each = 17 if name == "aligned_r3" else passes[stage.objective.registered_name]  # R3 asks for clean logits too
        cost = stage.epochs * each
        assert cost == pytest.approx(640, rel=0.03), name
        routes = [w for w in measured if f"/{name}/" in w[1] and "--routes" in w]
        assert bool(routes) == (recipe.model.tied is not None), name
    (tmp_path / "kept/dual/seed=4.json").unlink()
    _, again = asked_of(tmp_path, METHODS="dual*")
    assert [after("--run-dir", words) for words in again if words[0] == "train"] == [str(tmp_path / "out/dual/seed=4")]


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


def evaluation(right, attacked):
    """Images of class 0, of which some are right, and some of these under an attack."""
    count = len(right)
    zeros, ints = np.zeros(count), np.zeros(count, np.int64)
    verdicts = Verdicts(attacked, zeros, ints, ints, ints, zeros, ints)
    made = Evaluation(np.arange(count), ints, np.where(right, 0, 1), {"apgd-ce": verdicts}, {})
    made.results |= {**accuracies(made.correct), "attacks": {"apgd-ce": {}}}
    return made


def test_a_kept_run_tells_all_that_its_folder_told(collect, tmp_path):
    rng, kept = np.random.default_rng(0), tmp_path / "kept"
    for seed in range(2):
        run, measured = tmp_path / f"seed={seed}", {}
        for route in ("head1", "head2"):
            right = rng.random(37) < 0.7
            measured[route] = evaluation(right, right & (rng.random(37) < 0.5))
            measured[route].save(run / "evaluations/domains" / route)
        routes = {name: {key: each.results[key] for key in ("clean_accuracy", "robust_accuracy")}
                  for name, each in measured.items()}  # fmt: skip
        corruptions = {"accuracy": 0.5, "kinds": {"fog": {"accuracy": 0.25, "severities": [0.25] * 5}}}
        for name, content in {
            "model/config.json": {"added_parameters": 480},
            "comparison.json": {"rows": [{"training_cost": {"seconds": 60.0 + seed}, "parameters": 77_850}]},
            "environment.json": {"cpu": "one", "precision": "bf16"},
            "config.yaml": {"stages": [{"epochs": 40}]},
            "evaluations/domains/routes.json": {"routes": routes},
            "evaluations/corruptions/results.json": {"corruptions": corruptions},
        }.items():
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_text(json.dumps(content))
        (kept / "dual").mkdir(parents=True, exist_ok=True)
        (kept / f"dual/seed={seed}.json").write_text(json.dumps(collect.record(run)))
        variant = collect.Variant("dual", collect.runs_in(kept)["dual"])
        for route, each in measured.items():
            for what, right in each.correct.items():
                assert np.array_equal(variant.right(route, what)[seed], right)
    told = variant.describe()
    assert told["cost"] == {"seconds": 60.5}
    assert told["corruptions"]["fog"]["mean"] == 0.25
    last = measured["head2"].results["robust_accuracy"]["worst"]
    assert told["routes"]["head2"]["worst"]["seeds"][1] == last
    gain = collect.difference((variant, "head1"), (variant, "head2"), "worst")
    assert gain["difference"] == pytest.approx(
        told["routes"]["head2"]["worst"]["mean"] - told["routes"]["head1"]["worst"]["mean"]
    )
    mixed = {**variant.runs, 1: {**variant.runs[1], "epochs": [20]}}
    with pytest.raises(SystemExit, match="dual: its seeds are of several settings"):
        collect.Variant("dual", mixed)


class Dual:
    """A variant whose classifiers have these shares of 1,000 images right, the robust ones among the clean."""

    name = "dual"
    runs = dict.fromkeys(range(3), "a seed")

    def __init__(self, **shares):
        self.shares = shares

    def right(self, classifier, what):
        share = self.shares[classifier][what == "worst"]
        return {seed: np.arange(1000) < 1000 * share + seed for seed in self.runs}

    def describe(self):
        def told(name):
            return {what: {"mean": self.right(name, what)[1].mean()} for what in ("clean", "worst")}

        names = {key: [name for name in self.shares if name.startswith(key)] for key in ("head", "t=", "merge")}
        return {
            "routes": {name: told(name) for name in names["head"]},
            "curve": [{"t": float(name[2:]), **told(name)} for name in names["t="]],
            "merged": {name: told(name) for name in names["merge"]},
        }


@pytest.mark.parametrize(("robust", "answer"), [(0.20, "holds"), (0.10, "does not hold")])
def test_a_merging_is_set_beside_the_best_mixture_of_two_points(collect, robust, answer):
    """Halfway between 0.5 and 0.4 clean, a mixture of head 1 and t=0.5 is right on half of each: 15 % robust."""
    shares = {"head1": (0.5, 0.0), "t=0.5": (0.4, 0.3), "head2": (0.3, 0.31), "merge": (0.45, robust)}
    found = collect.merged_or_between({"dual": Dual(**shares)})
    assert found["answer"] == answer
    (told,) = found["differences"]
    assert told["first"] == "dual: 0.50 head1, else t=0.5"
    assert told["difference"] == pytest.approx(robust - 0.15, abs=0.002)


def kept_of(folder, name, robust):
    for seed, share in enumerate(robust):
        run = made_run(folder / "runs" / name / str(seed), strong=measured(0.5, share))
        module_of("kept.py").keep(run, folder / "kept" / name / f"seed={seed}.json", ["strong"])


def test_more_classes_are_told_by_shares_of_what_trades_reaches(tmp_path, monkeypatch):
    told = module_of("domains/classes_told.py")
    for classes, base, gain in ((20, 0.20, 0.05), (200, 0.04, 0.20)):
        kept_of(tmp_path, f"trades-{classes}", [base, base, base])
        kept_of(tmp_path, f"aligned-{classes}", [base * (1 + gain + off) for off in (0, 0.05, -0.05)])
        kept_of(tmp_path, f"one_head-{classes}", [base * 1.05] * 3)
    found = told.tell(tmp_path / "kept")
    assert found["gains"][200]["aligned"]["mean"] == pytest.approx(0.2, abs=0.01)
    assert found["H5"]["mean"] == pytest.approx(0.15, abs=0.01)
    assert found["H5"]["answer"] == "holds"
    assert found["one head grows"]["mean"] == pytest.approx(0.0, abs=0.01)


def test_all_numbers_of_classes_have_as_many_images_and_methods_cost_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    ended, asked = studies.asked_of(
        "benchmarks/domains/classes.sh", tmp_path, "DATA", str(tmp_path / "out"), SEEDS="0", CLASSES="20 200"
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    passes = {"trades": 11, "aligned": 10, "one_head": 10}
    trained = [words for words in asked if words[0] == "train"]
    assert len(trained) == 6
    for words in trained:
        method = Path(words[1]).stem.removeprefix("tiny_")
        (stage,) = load_recipe(words[1]).stages
        assert stage.epochs * passes[method] == 220
    _, again = studies.asked_of(
        "benchmarks/domains/classes.sh", tmp_path, "DATA", str(tmp_path / "out"), SEEDS="0", CLASSES="20 200"
    )
    assert again == []
