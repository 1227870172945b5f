"""What studies keep of a finished run tells the same as the run's folder did."""

from __future__ import annotations

import numpy as np
import pytest

from dualhead.evaluation import Evaluation
from dualhead.runs import Entry, standings
from helpers.studies import evaluation, made_run, measured, module_of


@pytest.fixture(scope="module")
def kept():
    return module_of("kept.py")


def random_evaluation(rng, count=53):
    right = rng.random(count) < 0.7
    return evaluation(right, pgd_40=rng.random(count) < 0.6, autoattack_fast=rng.random(count) < 0.5)


def test_rows_and_differences_are_those_of_compare(kept, tmp_path):
    rng, entries = np.random.default_rng(0), []
    for name, cost in (("base", 1e9), ("guided", 2e9)):
        for seed in range(3):
            run = made_run(tmp_path / name / f"seed={seed}", flops=cost, strong=random_evaluation(rng))
            kept.keep(run, tmp_path / "kept" / name / f"seed={seed}.json", ["strong"])
            whole = Evaluation.load(run / "evaluations" / "strong")
            entries.append(Entry(name, name, "", True, seed, whole, 155_700, cost, cost / 1e3, 60.0))
    known = kept.read(tmp_path / "kept")
    found, whole = kept.compared([known[name].entries() for name in ("base", "guided")]), standings(entries)
    assert found["pairs"] == whole["pairs"]
    for mine, theirs in zip(found["rows"], whole["rows"], strict=True):
        assert mine == {key: theirs[key] for key in mine}
    pair = kept.paired(known["base"].entries(), known["guided"].entries())
    assert [pair[each["accuracy"]] for each in whole["pairs"]] == whole["pairs"]


def test_an_output_has_its_own_parameters_and_a_run_its_held_out_accuracies(kept, tmp_path):
    run = made_run(tmp_path / "run", held_out=(0.5, 0.25), strong=measured(0.6, 0.3), head2=measured(0.5, 0.2))
    told = kept.record(run, ["strong", "head2"])
    assert told["held_out"] == {"clean": 0.5, "robust": 0.25}
    assert {name: each["parameters"] for name, each in told["evaluations"].items()} == {
        "strong": 155_700, "head2": 77_850,
    }  # fmt: skip
    (run / "metrics.jsonl").unlink()
    assert "held_out" not in kept.record(run, [])


def test_other_images_than_the_first_are_refused(kept, tmp_path):
    some = measured(0.6, 0.3)
    some.index = some.index + 1
    run = made_run(tmp_path / "run", strong=some)
    with pytest.raises(SystemExit, match="not of the first test images"):
        kept.record(run, ["strong"])


def test_runs_of_two_precisions_are_not_compared(kept):
    runs = [kept.Variant(name, {0: {"environment": {"precision": name}}}) for name in ("bf16", "float32")]
    kept.alike(runs[:1])
    with pytest.raises(SystemExit, match="trained in bf16 and float32"):
        kept.alike(runs)


def pair(clean, robust, test="paired t, 3 seeds"):
    return {
        name: {"difference": (low + high) / 2, "interval": [low, high], "test": test}
        for name, (low, high) in (("clean", clean), ("autoattack-fast", robust))
    }


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (pair((0.01, 0.03), (-0.01, 0.03)), "gains"),
        (pair((0.01, 0.03), (-0.03, 0.01)), "undecided"),  # more clean accuracy, less robust: a trade
        (pair((-0.01, 0.03), (-0.01, 0.03)), "undecided"),
        (pair((-0.03, 0.01), (-0.03, -0.01)), "loses"),
        (pair((0.01, 0.03), (0.01, 0.03), "McNemar, exact"), "undecided"),  # one seed
        (None, "undecided"),
    ],
)
def test_an_answer_needs_both_differences_and_one_interval(kept, found, told):
    assert kept.answer(found) == told


def test_without_a_common_seed_there_is_no_difference(kept, tmp_path):
    for name, seed in (("base", 0), ("guided", 1)):
        run = made_run(tmp_path / name, strong=measured(0.5, 0.2))
        kept.keep(run, tmp_path / "kept" / name / f"seed={seed}.json", ["strong"])
    known = kept.read(tmp_path / "kept")
    assert kept.paired(known["base"].entries(), known["guided"].entries()) is None


@pytest.mark.parametrize("seeds", [[0.010, 0.010, 0.010], [0.0100, 0.0101, 0.0099]])
def test_seeds_that_agree_more_closely_than_one_image_prove_nothing(kept, seeds):
    of_few, of_many = kept.difference(seeds, images=100), kept.difference(seeds, images=100_000)
    assert of_few["interval"][0] < 0 < of_few["interval"][1]
    assert of_few["p_value"] == pytest.approx(0.2254, abs=1e-4)  # of Student's t = sqrt(3), 2 degrees of freedom
    assert of_many["p_value"] < 0.001
    assert kept.over_seeds(seeds, 100)["interval"] == pytest.approx(of_few["interval"])
