"""The frontier's runs build, cost about the same, and its results are summarised and drawn."""

from __future__ import annotations

import json

import pytest

from dualhead.recipe import load_recipe
from helpers.studies import ROOT, module_of


@pytest.fixture(scope="module")
def benchmark():
    return module_of("frontier.py")


def row(run, robust):
    made = {"method": run.method.name, "title": run.method.title, "eps": run.eps, "epochs": run.epochs}
    made |= {"seed": run.seed, "images": 100, "clean": 0.5, "fgsm": 0.3, "pgd-10": robust, "autoattack-fast": robust}
    overfitted = [3] if (run.method.name, run.eps) == ("fgsm_rs", 16) else []
    return made | {"forward_equivalents": 2250.0 * 5 * run.epochs, "flops": 1e9, "overfitted_epochs": overfitted}


def test_every_run_is_planned_once_the_large_eps_first(benchmark):
    planned = list(benchmark.runs(2, "*"))
    assert (
        len({run.place for run in planned}) == len(planned) == 2 * (3 + sum(len(m.epochs) for m in benchmark.METHODS))
    )
    assert [(run.method.name, run.eps) for run in planned[:3]] == [("fgsm_rs", 16), ("n_fgsm", 16), ("pgd_2", 16)]
    assert [run.seed for run in planned] == sorted(run.seed for run in planned)
    assert {run.method.name for run in benchmark.runs(1, "n_*")} == {"n_fgsm"}


def test_every_setting_makes_a_recipe_that_says_what_the_method_is(benchmark):
    found = {}
    for method in benchmark.METHODS:
        recipe = ROOT / "benchmarks" / "strongest" / f"{method.recipe}.yaml"
        for eps in (8, 16):
            found[method.name, eps] = load_recipe(str(recipe), [f"threat.eps={eps}/255", *method.overrides(eps, 4)])
    stage = {key: recipe.stages[0] for key, recipe in found.items()}
    assert stage["fgsm_rs", 16].attack.step_size == pytest.approx(20 / 255)
    assert stage["pgd_2", 8].attack.step_size == pytest.approx(4 / 255)
    assert stage["free", 8].free.replays == 8
    assert stage["elle", 8].objective.registered_name == "elle"
    single = {name for name, eps in stage if stage[name, eps].single_step}
    assert single == {"fgsm_rs", "n_fgsm", "free", "grad_align", "elle"}
    assert [each.epochs for each in found["distilled", 8].stages] == [4, 4]


def test_results_are_means_over_seeds_and_are_drawn(benchmark, tmp_path):
    runs = [run for run in benchmark.runs(3, "*") if run.seed < 2 or run.method.name == "n_fgsm"]
    told = benchmark.summarised([row(run, 0.1 + 0.01 * run.seed) for run in runs])
    entry = next(each for each in told if each["method"] == "n_fgsm" and each["eps"] == 8)
    assert entry["autoattack-fast"]["mean"] == pytest.approx(0.11)
    assert entry["autoattack-fast"]["interval"] == pytest.approx([0.11 - 0.02484, 0.11 + 0.02484], abs=1e-4)
    figures = module_of("../tools/make_figures.py")
    drawn = figures.frontier({"summary": told})
    assert all(method.title in drawn for method in benchmark.METHODS)
    assert "overfits in 2 of 2 seeds" in drawn
    assert drawn.count("<circle") == sum(len(method.epochs) for method in benchmark.METHODS)


def test_a_run_is_read_from_what_the_product_leaves(benchmark, tmp_path):
    run = next(benchmark.runs(1, "n_fgsm"))
    results = {"num_samples": 10, "clean_accuracy": 0.6, "environment": dict.fromkeys(
        ("cpu", "cpu_capability", "threads", "torch"), 1)}  # fmt: skip
    results["robust_accuracy"] = {"fgsm": 0.5, "pgd-10": 0.3, "autoattack-fast": 0.2, "worst": 0.2}
    place = tmp_path / "evaluations" / "frontier"
    place.mkdir(parents=True)
    (place / "results.json").write_text(json.dumps(results))
    cost = {"forward_equivalents": 7.0, "flops": 9.0, "seconds": 1.0}
    (tmp_path / "comparison.json").write_text(json.dumps({"rows": [{"training_cost": cost}]}))
    lines = [{"watched_fgsm": fgsm, "watched_pgd": pgd} for fgsm, pgd in ((0.3, 0.3), (0.8, 0.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = benchmark.row(run, tmp_path)
    assert found["overfitted_epochs"] == [2]
    assert (found["autoattack-fast"], found["forward_equivalents"]) == (0.2, 7.0)


def test_a_run_whose_row_is_kept_is_not_done_again(benchmark, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(benchmark, "train", lambda run, *_: done.append(run.place))
    monkeypatch.setattr(benchmark, "evaluate", lambda *_: None)
    monkeypatch.setattr(benchmark, "row", lambda run, _: row(run, 0.1))
    command = ["DATA", str(tmp_path / "runs"), "--only", "n_*", "--images", "100", "-o", str(tmp_path / "kept.json")]
    benchmark.main([*command, "--seeds", "1", "--first-seed", "1"])
    later = len(done)
    benchmark.main([*command, "--seeds", "2"])
    planned = [run.place for run in benchmark.runs(2, "n_*")]
    assert sorted(done) == sorted(planned) and later == len(planned) // 2
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["rows"] == sorted(kept["rows"], key=benchmark.place_in_plan) and len(kept["rows"]) == len(planned)
    assert all(entry["seeds"] == [0, 1] for entry in kept["summary"])


def test_words_that_are_no_setting_are_refused(benchmark, tmp_path):
    with pytest.raises(SystemExit, match="neither an option nor KEY=VALUE"):
        benchmark.main(["DATA", str(tmp_path), "--sedes=3"])
