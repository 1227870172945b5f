"""Measures of samples side by side: which are compared, by which test, and what more is better in."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from dualhead.commands.compare_samples import MORE_IS_BETTER, SCORE, compare_samples
from dualhead.evaluation import SAMPLES_FILE, SCORED, mcnemar
from dualhead.runs import Entry
from helpers.e2e import dualhead
from helpers.evaluation import evaluation_of


def generation(frechet=5.0, score=0.9, judge="abc", samples=100):
    told = dict.fromkeys(MORE_IS_BETTER, 0.5) | {"frechet_distance": frechet, SCORE: score}
    return {
        **told, f"{SCORE}_interval": [score - 0.02, score + 0.02], "samples": samples, "test_images": 200, "steps": 16,
        "judge": {"digest": judge, "backbone": "cnn-16"}, "floor": dict.fromkeys(MORE_IS_BETTER, 0.4),
    }  # fmt: skip


def entry(name, seed=0, folder=None, **kind):
    evaluation = evaluation_of(120, 60)
    evaluation.results["generation"] = generation(**kind)
    made = Entry(name, name, "", True, seed, evaluation)
    return made if folder is None else replace(made, folder=folder)


def test_nothing_is_told_where_nothing_was_measured():
    assert compare_samples([Entry("a", "a", "", True, 0, evaluation_of(120, 60))]) is None


def test_seeds_give_means_students_interval_and_a_paired_t_test():
    distances = {"plain": [9.0, 8.0, 10.0], "dat": [4.0, 3.5, 4.5]}
    found = compare_samples(
        [entry(name, seed, frechet=value) for name, values in distances.items() for seed, value in enumerate(values)]
    )
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["dat"]["values"]["frechet_distance"] == pytest.approx(4.0)
    assert rows["dat"]["seeds"] == [0, 1, 2]
    low, high = stats.t.interval(0.95, 2, 4.0, 0.5 / np.sqrt(3))
    assert rows["dat"]["intervals"]["frechet_distance"] == pytest.approx([low, high])
    pairs = {pair["measure"]: pair for pair in found["pairs"]}
    pair = pairs["frechet_distance"]
    expected = stats.ttest_rel(distances["dat"], distances["plain"])
    assert (pair["difference"], pair["p_value"]) == pytest.approx((-5.0, expected.pvalue))
    assert (pair["verdict"], pair["test"]) == ("gain", "paired t, 3 seeds")  # less of a distance is better
    assert (pairs["coverage"]["verdict"], pairs["coverage"]["p_value"]) == ("undecided", 1.0)
    back = compare_samples(
        [entry(name, seed, frechet=v) for name in ("dat", "plain") for seed, v in enumerate(distances[name])]
    )
    assert {p["measure"]: p["verdict"] for p in back["pairs"]}["frechet_distance"] == "loss"


def test_one_run_each_is_paired_by_the_test_images_of_the_score(tmp_path):
    right = {"plain": np.arange(200) < 160, "dat": np.arange(200) < 190}
    for name, scored in right.items():
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / SAMPLES_FILE, **{SCORED: scored})
    entries = [entry(name, seed, tmp_path / name, score=float(right[name].mean())) for seed, name in enumerate(right)]
    (pair,) = compare_samples(entries)["pairs"]
    by_hand = mcnemar(right["plain"], right["dat"])
    assert (pair["measure"], pair["verdict"], pair["test"]) == (SCORE, "gain", "McNemar, exact")
    assert (pair["difference"], pair["p_value"]) == (by_hand.difference, by_hand.p_value)
    (tmp_path / "dat" / SAMPLES_FILE).unlink()
    found = compare_samples(entries)
    assert (found["pairs"], found["notes"]) == ([], ["dat and plain: samples are not compared in pairs"])


@pytest.mark.parametrize("other", [{"judge": "other"}, {"samples": 200}])
def test_other_judges_and_numbers_are_left_out_with_a_word(other):
    found = compare_samples([entry("a"), entry("b", **other), entry("c")])
    assert [row["name"] for row in found["rows"]] == ["a", "c"]
    assert "b: other judge, number of samples or test images than a; left out" in found["notes"]


def test_a_group_of_which_some_have_samples_is_left_out():
    bare = replace(entry("b", 1), evaluation=evaluation_of(120, 60))
    found = compare_samples([entry("a"), entry("b", 0), bare])
    assert [row["name"] for row in found["rows"]] == ["a"]
    assert found["notes"] == ["b: 1 of 2 runs have no samples; left out"]


def test_the_command_prints_and_writes_them(tmp_path):
    for name, frechet in (("a", 9.0), ("b", 4.0)):
        evaluation = evaluation_of(120, 60)
        evaluation.results |= {"attacks": {"pgd-40": {}}, "generation": generation(frechet)}
        evaluation.save(tmp_path / name)
    ended = dualhead("compare", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "found.json")
    assert ended.status == 0, ended.err
    for words in ("100 samples against 200 test images", "Frechet distance", "training images", "90.0% [88.0%, 92.0%]"):
        assert words in ended.out
    stored = json.loads((tmp_path / "found.json").read_text())["generation"]
    assert [row["values"]["frechet_distance"] for row in stored["rows"]] == [9.0, 4.0]


def test_seeds_that_agree_by_chance_prove_no_gain():
    found = compare_samples([entry(name, seed, score=s) for name, s in (("a", 0.9), ("b", 0.905)) for seed in range(2)])
    pair = next(pair for pair in found["pairs"] if pair["measure"] == SCORE)
    assert (pair["verdict"], pair["difference"]) == ("undecided", pytest.approx(0.005))
    assert pair["interval"][0] < 0 < pair["interval"][1]
    low, high = found["rows"][0]["intervals"][SCORE]
    assert high - low == pytest.approx(2 * stats.t.ppf(0.975, 1) / 200 / 2**0.5)
