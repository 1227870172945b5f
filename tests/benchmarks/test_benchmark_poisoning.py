"""The study of poisoned data: its script asks for what can be run, once, and its answers rest on what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dualhead.recipe import load_recipe
from dualhead.runs.crafted import surrogate_recipe
from helpers import studies
from helpers.costs import training_cost
from helpers.studies import ROOT, after, module_of


@pytest.fixture(scope="module")
def collect():
    return module_of("poisoning/collect.py")


def asked_of(folder, part, **environment):
    return studies.asked_of("benchmarks/poisoning/run.sh", folder, "DATA", str(folder / "out"), part, **environment)


def trained_by(asked):
    return {str(Path(*Path(after("--run-dir", w)).parts[-2:])): w for w in asked if w[0] == "train"}


@pytest.mark.parametrize("part", ["study", "small"])
def test_every_cell_has_a_recipe_and_is_measured_as_the_answer_needs(tmp_path, monkeypatch, collect, part):
    monkeypatch.chdir(ROOT)
    ended, asked = asked_of(tmp_path, part, SEEDS="0 1", MORE_SEEDS="2")
    assert (ended.returncode, ended.stderr) == (0, "")
    trained = trained_by(asked)
    order = list(trained)
    assert order[0] == "natural-clean/seed=0"
    first = order.index("base-clean/seed=0")
    assert all(name.startswith("natural-") for name in order[:first])  # cheap ones
    backdoor = {"study": "blend", "small": "patch"}[part]
    assert order[first : first + 4] == [
        "base-clean/seed=0", f"base-{backdoor}/seed=0", "dhat-clean/seed=0", f"dhat-{backdoor}/seed=0",
    ]  # fmt: skip
    assert f"dhat-{backdoor}/seed=2" in order
    assert "dhat-label_flip/seed=2" not in order
    measured = [words for words in asked if words[0] == "evaluate"]
    backdoors = [name for name in collect.PLANNED[part] if collect.ATTACKS[name].family == "backdoors"]
    recipes, surrogates = {}, {}
    for name, words in trained.items():
        cell, _, seed = name.partition("/seed=")
        if seed != "0":
            continue
        recipe = recipes[cell] = load_recipe(words[1], words[4 : words.index("--quiet")])
        assert recipe.runtime.seed == 0
        assert all(stage.keep == "last" or stage.fit is not None for stage in recipe.stages)
        method, _, poison = cell.partition("-")
        assert method in {*collect.BASES, *collect.BASES.values(), "natural"}
        assert poison == "clean" or poison in collect.ATTACKS or poison.removeprefix("sham_") in collect.ATTACKS
        told = [w for w in measured if f"/{name}/" in f"{w[1]}/"]
        strong = [w for w in told if "autoattack-fast" in w]
        assert bool(strong) == (method != "natural" and (poison == "clean" or "hypocritical" in poison))
        assert len([w for w in told if "--poison" in w]) == (len(backdoors) if poison == "clean" else 0)
        if poison in ("hypocritical", "sham_hypocritical"):
            given = recipe.data.poison if poison == "hypocritical" else recipe.data.poison.like
            surrogates[cell] = surrogate_recipe(recipe, given.surrogate).resolved()
    assert len({json.dumps(each, sort_keys=True) for each in surrogates.values()}) == 1  # one poison for all methods
    for method, base in collect.BASES.items():
        if part == "small" and method in ("ensemble", "base_larger_eps", "dhat_fitted"):
            continue
        planned = [
            name for name in collect.PLANNED[part] if name != "hypocritical_self" or method in ("dhat", "distilled")
        ]
        if method == "base_short":  # a trigger that is not learnt yet explains a success rate alone
            planned = backdoors
        assert {f"{method}-{name}" for name in ("clean", *planned)} <= set(recipes)
        assert f"{base}-hypocritical" in recipes
    if part == "study":
        cost = {name: training_cost(recipes[f"{name}-clean"]) for name in ("base", "dhat", "base_long", "distilled")}
        assert cost["dhat"] / cost["base"] == pytest.approx(1.0, abs=0.01)
        assert cost["distilled"] / cost["base_long"] == pytest.approx(1.0, abs=0.03)
        assert recipes["dhat_fitted-blend"].data.clean_validation
        assert recipes["dhat_fitted-blend"].stages[-1].fit is not None
    assert not recipes["dhat-blend"].data.clean_validation
    assert recipes["dhat-hypocritical_self"].data.poison.surrogate.objective == "self"


def test_a_finished_seed_is_not_trained_again(tmp_path):
    cells = {"METHODS": "*-patch", "SEEDS": "0"}
    _, first = asked_of(tmp_path, "small", **cells)
    names = list(trained_by(first))
    assert names == [f"{m}-patch/seed=0" for m in ("natural", "base", "dhat", "base_long", "distilled", "base_short")]
    (tmp_path / "kept/small/dhat-patch/seed=0.json").unlink()
    _, again = asked_of(tmp_path, "small", **cells)
    assert list(trained_by(again)) == ["dhat-patch/seed=0"]
    assert [words[1:] for words in again if words[0].endswith("collect.py")][-1] == [
        "tell", str(tmp_path / "kept"), str(tmp_path / "kept.json"),
    ]  # fmt: skip


@pytest.mark.parametrize("part", ["digits", "pilot"])
def test_every_other_part_has_recipes_too(tmp_path, monkeypatch, part):
    monkeypatch.chdir(ROOT)
    ended, asked = asked_of(tmp_path, part, SEEDS="0")
    assert (ended.returncode, ended.stderr) == (0, "")
    for words in trained_by(asked).values():
        load_recipe(words[1], words[4 : words.index("--quiet")])


# ---- what stays of a run


def finish(run, clean, robust=0.2, **poison):
    (run / "evaluation").mkdir(parents=True)
    row = {
        "output": "model", "clean_accuracy": clean, "robust_accuracy": {"pgd-20": robust, "worst": robust},
        "parameters": 7, "training_cost": {"flops": 9}, **({"poison": poison} if poison else {}),
    }  # fmt: skip
    (run / "comparison.json").write_text(json.dumps({"rows": [{**row, "output": "base"}, row]}))
    (run / "evaluation" / "results.json").write_text(json.dumps({"num_samples": 100}))
    return run


def test_a_kept_run_tells_what_the_answers_need(collect, tmp_path):
    run = finish(tmp_path / "run", 0.8)
    for name, content in {
        "strong": {"robust_accuracy": {"apgd-ce": 0.15, "worst": 0.1}, "num_samples": 50},
        "trigger_patch": {"poison": {"attack_success_rate": 0.02, "num_triggered": 45}},
    }.items():
        (run / "evaluations" / name).mkdir(parents=True)
        (run / "evaluations" / name / "results.json").write_text(json.dumps(content))
    told = collect.record(run)
    assert (told["clean_accuracy"], told["robust_accuracy"], told["strong_accuracy"]) == (0.8, 0.2, 0.1)
    assert told["triggers"] == {"patch": 0.02}
    assert told["outputs"]["base"]["clean_accuracy"] == 0.8
    poisoned = collect.record(finish(tmp_path / "other", 0.7, attack_success_rate=0.9, num_triggered=45))
    assert poisoned["attack_success_rate"] == 0.9
    assert "strong_accuracy" not in poisoned


def cells(**values):
    """Cells by name, of runs by seed."""
    return {
        name.replace("__", "-"): {str(seed): dict(run) for seed, run in enumerate(runs)}
        for name, runs in values.items()
    }


def run(clean, **more):
    return {"clean_accuracy": clean, "robust_accuracy": 0.2, "num_samples": 1000, "num_triggered": 900, **more}


def test_cells_are_paired_with_clean_data_by_seed(collect):
    lost = (0.1, 0.2, 0.3)
    given = cells(
        natural__clean=[run(0.8, triggers={"patch": 0.1})] * 3,
        natural__patch=[run(0.8 - each, attack_success_rate=0.9) for each in lost],
    )
    made = collect.describe(given)
    told = made["natural-patch"]["against_clean_data"]["clean_accuracy"]
    assert told["mean"] == pytest.approx(-0.2)
    assert told["interval"] == pytest.approx([-0.2 - 0.2484, -0.2 + 0.2484], abs=1e-4)  # 4.303 * 0.1 / sqrt(3)
    assert made["natural-patch"]["attack_success_rate"]["mean"] == pytest.approx(0.9)
    assert "against_clean_data" not in made["natural-clean"]
    costs = collect.cost_of(given, "natural", "patch")
    assert list(costs.values()) == pytest.approx([0.8] * 3)  # above the rate of a clean model


def test_one_seed_has_wilsons_interval_and_no_interval_of_a_difference(collect):
    given = cells(sat__clean=[run(0.8)], sat__patch=[run(0.7, attack_success_rate=0.5)])
    made = collect.describe(given)["sat-patch"]
    low, high = made["clean_accuracy"]["interval"]
    assert low < 0.7 < high
    assert made["against_clean_data"]["clean_accuracy"]["interval"] is None


def test_heads_are_told_beside_what_is_deployed(collect):
    head = {"clean_accuracy": 0.7, "robust_accuracy": 0.1, "attack_success_rate": 0.8}
    given = cells(dhat__patch=[run(0.8, outputs={"head1": {**head, "attack_success_rate": x}}) for x in (0.2, 0.4)])
    told = collect.describe(given)["dhat-patch"]["outputs"]["head1"]
    assert told["attack_success_rate"]["mean"] == pytest.approx(0.3)
    assert told["clean_accuracy"]["mean"] == pytest.approx(0.7)


def test_the_pilot_tells_what_works_and_what_is_restored(collect):
    given = cells(
        natural__clean=[run(0.8)], natural__patch=[run(0.8, attack_success_rate=0.7)],
        natural__blend=[run(0.8, attack_success_rate=0.5)],
        natural__class_noise=[run(0.4)], sat__class_noise=[run(0.7)], natural__one_pixel=[run(0.3)],
        sat__one_pixel=[run(0.32)], natural__label_flip=[run(0.78)],
    )  # fmt: skip
    told = collect.check(given)
    assert {name: each["works"] for name, each in told.items()} == {
        "patch": True, "blend": False, "class_noise": True, "one_pixel": True, "label_flip": False,
    }  # fmt: skip
    assert told["class_noise"]["restored_by_sat"]["share"] == pytest.approx(0.75)
    assert told["class_noise"]["restored_by_sat"]["as_expected"]
    assert told["one_pixel"]["restored_by_sat"]["share"] == pytest.approx(0.04)
    assert told["one_pixel"]["restored_by_sat"]["as_expected"]


# ---- answers


def study_of(costs, *, spread=0.001, level=0.0):
    """A study in which class noise costs `base` ten points and DH-AT some more, in five seeds."""
    noise = [spread * each for each in (-2, -1, 0, 1, 2)]
    return cells(
        base__clean=[run(0.6)] * 5,
        dhat__clean=[run(0.6 + level)] * 5,
        base__class_noise=[run(0.5)] * 5,
        dhat__class_noise=[run(0.6 + level - 0.1 - costs - each) for each in noise],
    )


@pytest.mark.parametrize(
    ("costs", "spread", "level", "answer"),
    [
        (-0.05, 0.001, 0.0, "helps"),
        (0.05, 0.001, 0.0, "harms"),
        (0.001, 0.005, 0.0, "equal"),
        (0.01, 0.05, 0.0, "undecided"),
        (-0.05, 0.001, -0.2, "undecided"),  # it loses less, and stays far below
    ],
)
def test_an_attack_gets_one_of_four_answers(collect, costs, spread, level, answer):
    (told,) = collect.answers(study_of(costs, spread=spread, level=level))
    assert (told["method"], told["base"], told["attack"], told["answer"]) == ("dhat", "base", "class_noise", answer)
    assert told["difference"]["mean"] == pytest.approx(costs)
    assert answer in told["sentence"]
    assert ("seeds_that_would_decide" in told) == (answer == "undecided")


def test_more_than_one_test_is_corrected_for(collect):
    assert collect.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert collect.holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}
    assert collect.holm({}) == {}


def test_the_number_of_seeds_that_would_decide(collect):
    from scipy import stats

    needed = collect.seeds_to_decide(0.05, 0.05, 0.02, 1)
    assert stats.t.ppf(0.975, needed - 1) / needed**0.5 < 1 <= stats.t.ppf(0.975, needed - 2) / (needed - 1) ** 0.5
    assert collect.seeds_to_decide(0.05, 0.05, 0.02, 4) > needed
    near = collect.seeds_to_decide(0.0, 0.05, 0.02, 1)
    assert stats.t.ppf(0.95, near - 1) * 0.05 / near**0.5 < 0.02
    assert collect.seeds_to_decide(0.02, 5.0, 0.02, 1) is None


def test_an_attack_that_costs_the_base_method_nothing_leaves_nothing_to_help_with(collect):
    made = study_of(-0.105)  # the base loses 10 points, DH-AT gains half a point
    (told,) = collect.answers(made)
    assert told["answer"] == "helps"
    for name, lost in (("base", 0.1), ("dhat", -0.005)):
        for seed, each in made[f"{name}-class_noise"].items():
            each["clean_accuracy"] = made[f"{name}-clean"][seed]["clean_accuracy"] - 0.1 * lost
    (told,) = collect.answers(made)
    assert told["answer"] == "no effect"
    assert "costs base +1.0 points" in told["sentence"]


def test_answers_are_corrected_for_attacks_that_are_still_to_come(collect):
    (alone,) = collect.answers(study_of(0.05))
    (planned,) = collect.answers(study_of(0.05), ("class_noise", "label_flip", "hypocritical"))
    assert planned["corrected_p_value"] == pytest.approx(3 * alone["corrected_p_value"])


def test_one_seed_decides_nothing(collect):
    one = {name: {"0": runs["0"]} for name, runs in study_of(0.05).items()}
    (told,) = collect.answers(one)
    assert told["answer"] == "undecided"
    assert "one seed decides nothing" in told["sentence"]


def test_a_claim_needs_two_kinds_and_controls(collect):
    def told(**answers):
        return [
            {"method": method, "attack": attack, "answer": answer}
            for method, of in answers.items()
            for attack, answer in zip(planned, of, strict=False)
        ]

    planned = ("patch", "sticker", "class_noise", "label_flip", "hypocritical", "hypocritical_self")

    def claims(found):
        return collect.claims(found, planned)

    helps = ["helps", "equal", "helps", "equal", "equal", "equal"]
    controls = {control: ["equal"] * 6 for control in collect.CONTROLS}
    assert claims(told(dhat=helps))["dhat"]["stands"] == "undecided"  # no controls yet
    assert claims(told(dhat=helps, **controls))["dhat"]["stands"] == "yes"
    explained = claims(told(dhat=helps, **{**controls, "ensemble": helps}))["dhat"]
    assert (explained["stands"], explained["explained_by_controls"]) == ("no", ["patch", "class_noise"])
    for alike in (["helps", "helps", *["equal"] * 4], [*["equal"] * 4, "helps", "helps"]):  # two of one kind are one
        assert claims(told(dhat=alike, **controls))["dhat"]["stands"] == "no"
    assert claims(told(dhat=helps, dhat_fitted=helps, **controls))["dhat"]["stands"] == "yes"  # it has the heads too
    assert claims(told(dhat=["helps", "harms"]))["dhat"]["stands"] == "no"
    assert claims(told(dhat=["equal"] * 6, **controls))["dhat"]["stands"] == "no"
    assert claims(told(dhat=["helps", "undecided"]))["dhat"]["stands"] == "undecided"


def test_what_is_kept_becomes_a_table_and_answers(collect, tmp_path, capsys, monkeypatch):
    for name, runs in study_of(0.05).items():
        for seed, each in runs.items():
            path = tmp_path / "kept" / "study" / name / f"seed={seed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(each))
    monkeypatch.setattr(sys, "argv", ["collect.py", "tell", str(tmp_path / "kept"), str(tmp_path / "found.json")])
    collect.main()
    found = json.loads((tmp_path / "found.json").read_text())["study"]
    assert found["answers"][0]["answer"] == "harms"
    assert found["strengths"] == {}
    assert found["claims"]["dhat"]["harms"] == ["class_noise"]
    assert found["answers"][0]["share_lost"] == pytest.approx({"dhat": 0.3, "base": 0.2})  # of what is above chance
    said = capsys.readouterr().out
    assert "| class_noise | dhat | base | 5 | 15.0 | 10.0 | +5.0 [+4.8, +5.2] | harms |" in said
    assert "robust to poisoning" not in said.lower()


def test_the_figure_shows_every_answer(collect):
    figures = module_of("../tools/make_figures.py")
    study = collect.study({**study_of(0.05), **study_with_a_patch()})
    drawn = figures.poisoning({"small": json.loads(json.dumps(study))}, "small")
    assert drawn.startswith("<svg")
    assert drawn.count("class noise") == drawn.count(">patch<") == 1
    assert drawn.count(">DH-AT<") == 2
    assert "nan" not in drawn
    assert figures.poisoning({"study": {"answers": []}}, "study").startswith("<svg")


def study_with_a_patch():
    return cells(
        base__clean=[run(0.6, triggers={"patch": 0.1})] * 5,
        dhat__clean=[run(0.6, triggers={"patch": 0.1})] * 5,
        base__patch=[run(0.6, attack_success_rate=0.9)],
        dhat__patch=[run(0.6, attack_success_rate=0.95)],
    )


def test_what_is_committed_is_what_the_kept_runs_say(collect):
    results = ROOT / "benchmarks" / "results"
    told = json.loads(json.dumps(collect.tell(results / "poisoning")))
    assert told == json.loads((results / "poisoning.json").read_text())
