"""Runs side by side: means over seeds, the Pareto front at equal cost, and which tests pair what."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import yaml

from dualhead.errors import UserError
from dualhead.evaluation import mcnemar, wilson
from dualhead.names import id_of
from dualhead.recipe.yaml import load_recipe
from dualhead.runs.entries import Entry, read_entries
from dualhead.runs.standings import TRIGGER_MEASURES, standings
from helpers.evaluation import COLUMNS, evaluation_of


def entry(name, clean, robust, *, flops, seed=0, **kind):
    return Entry(name, name, "", True, seed, evaluation_of(clean, robust, **kind), 10, flops, flops / 4, 1.0)


def test_the_front_is_taken_at_equal_or_lower_cost():
    found = standings([
        entry("base", 120, 60, flops=100), entry("worse", 110, 60, flops=104), entry("dear", 140, 80, flops=300),
        entry("robust", 100, 70, flops=100),
    ])  # fmt: skip
    assert [row["pareto"] for row in found["rows"]] == [True, False, True, True]
    assert [row["training_cost"]["forward_equivalents"] for row in found["rows"]] == [25, 26, 75, 25]


@pytest.mark.parametrize(("flops", "front"), [(104, False), (106, True)])
def test_what_costs_five_percent_more_is_no_rival(flops, front):
    found = standings([entry("cheap", 110, 60, flops=100), entry("better", 120, 70, flops=flops)])
    assert [row["pareto"] for row in found["rows"]] == [front, True]


def test_seeds_that_agree_by_chance_leave_an_interval():
    (row,) = standings([entry("a", 120, 60, flops=1, seed=seed) for seed in range(2)])["rows"]
    low, high = row["intervals"]["pgd-40"]
    assert low < row["robust_accuracy"]["pgd-40"] - 0.005
    assert high > row["robust_accuracy"]["pgd-40"] + 0.005


def test_one_run_each_is_paired_by_mcnemar_and_has_wilsons_interval():
    found = standings([entry("a", 120, 60, flops=1), entry("b", 130, 50, flops=1)])
    assert found["rows"][0]["intervals"]["clean_accuracy"] == list(wilson(120, 200))
    by_hand = mcnemar(np.arange(200) < 120, np.arange(200) < 130)
    clean = found["pairs"][0]
    assert (clean["accuracy"], clean["p_value"], clean["interval"]) == (
        "clean",
        by_hand.p_value,
        list(by_hand.interval),
    )
    assert [pair["verdict"] for pair in found["pairs"]] == ["gain", "loss", "loss"]


def test_several_seeds_give_students_interval_and_a_paired_t_test():
    pairs = [(120, 131), (110, 119), (115, 125)]
    entries = [entry("a", a, 60, flops=1, seed=seed) for seed, (a, _) in enumerate(pairs)]
    entries += [entry("b", b, 60, flops=1, seed=seed) for seed, (_, b) in enumerate(pairs)]
    found = standings(entries)
    differences = np.array([11, 9, 10]) / 200
    clean = found["pairs"][0]
    assert clean["difference"] == pytest.approx(differences.mean())
    reach = 4.302653 * differences.std(ddof=1) / math.sqrt(3)
    assert clean["interval"] == pytest.approx([differences.mean() - reach, differences.mean() + reach])
    assert clean["verdict"] == "gain"
    low, high = found["rows"][0]["intervals"]["clean_accuracy"]
    spread = 4.302653 * np.std([0.6, 0.55, 0.575], ddof=1) / math.sqrt(3)
    assert (low, high) == pytest.approx((0.575 - spread, 0.575 + spread))
    assert found["pairs"][1]["verdict"] == "undecided"
    gained = np.zeros(200)  # the share of three seeds by which b is right where a is not
    for (a, b), third in zip(pairs, (1 / 3,) * 3, strict=True):
        gained[a:b] += third
    reach = 1.959964 * gained.std(ddof=1) / math.sqrt(200)
    assert clean["images_interval"] == pytest.approx([0.05 - reach, 0.05 + reach])


def shuffled(entry, order):
    """An entry whose images were met in another order."""
    old = entry.evaluation
    verdicts = {
        name: replace(verdict, **{column: getattr(verdict, column)[order] for column in COLUMNS})
        for name, verdict in old.verdicts.items()
    }
    arrays = {name: getattr(old, name)[order] for name in ("index", "labels", "clean_prediction")}
    return replace(entry, evaluation=replace(old, verdicts=verdicts, **arrays))


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_order_of_an_evaluations_samples_does_not_matter(seeds):
    order = np.random.default_rng(0).permutation(200)
    first = [entry("a", 120, 60 + seed, flops=1, seed=seed) for seed in range(seeds)]
    second = [entry("b", 131, 50 - seed, flops=1, seed=seed) for seed in range(seeds)]
    reordered = [shuffled(each, order) for each in second]
    assert standings([*first, *reordered])["pairs"] == standings([*first, *second])["pairs"]


def faced(entry, attack, robust, **record):
    """An entry that was attacked by something else too, which leaves the first so many images."""
    entry.evaluation.results.setdefault("attacks", {})[attack] = record
    verdict = next(iter(entry.evaluation.verdicts.values()))
    entry.evaluation.verdicts[attack] = replace(verdict, robust=np.arange(200) < robust)
    return entry


@pytest.mark.parametrize(
    ("square", "merged", "record"),
    [
        ("square", "multihead-20", {}),
        ("square", "theirs", {"needs_heads": True}),  # an attack from outside that nobody has loaded here
        ("multihead-of-one", "multihead-20", {"needs_heads": True}),
    ],
)
def test_what_only_merged_heads_can_face_counts_where_it_was_run(square, merged, record):
    of_all = {"needs_heads": False} if record else {}
    found = standings([
        faced(entry("base", 120, 60, flops=1), square, 10, **of_all),
        faced(entry("merged", 130, 70, flops=1), merged, 40, **record),
    ])  # fmt: skip
    assert [row["robust_accuracy"] for row in found["rows"]] == [
        {"pgd-40": 0.3, "worst": 0.3}, {"pgd-40": 0.35, merged: 0.2, "worst": 0.2},
    ]  # fmt: skip
    assert [(pair["accuracy"], pair["verdict"]) for pair in found["pairs"]] == [
        ("clean", "gain"), ("pgd-40", "gain"), ("worst", "loss"),
    ]  # fmt: skip
    assert found["notes"] == [
        f"{square} was run on 1 of 2 and is left out",
        f"{merged} was run on 1 of 2 and counts in worst there; an attack that all can face, such as autoattack, "
        "compares them alike",
    ]


def test_seeds_that_agree_by_chance_decide_nothing():
    seeds = [(120, 121), (110, 111)]
    entries = [entry("a", a, 60, flops=1, seed=seed) for seed, (a, _) in enumerate(seeds)]
    entries += [entry("b", b, 60, flops=1, seed=seed) for seed, (_, b) in enumerate(seeds)]
    clean = standings(entries)["pairs"][0]
    assert clean["difference"] == pytest.approx(1 / 200)
    assert clean["verdict"] == "undecided"
    assert clean["p_value"] > 0.2
    same = standings([entry(name, 120, 60, flops=1, seed=seed) for name in "ab" for seed in (0, 1)])["pairs"][0]
    assert (same["difference"], same["p_value"], same["verdict"]) == (0.0, 1.0, "undecided")


def test_one_seed_in_common_is_paired_by_mcnemar_and_none_is_told():
    two = [entry("a", 120, 60, flops=1, seed=seed) for seed in (0, 1)]
    found = standings([*two, entry("b", 130, 50, flops=1, seed=1)])
    assert {pair["test"] for pair in found["pairs"]} == {"McNemar, exact, seed 1"}
    assert [pair["verdict"] for pair in found["pairs"]] == ["gain", "loss", "loss"]
    found = standings([*two, entry("b", 130, 50, flops=1, seed=2)])
    assert (found["pairs"], found["notes"]) == ([], ["b and a have no seed in common, and are not compared in pairs"])


def test_what_an_unknown_cost_bought_dominates_nothing_that_is_known():
    found = standings([entry("cheap", 120, 60, flops=100), replace(entry("found", 150, 90, flops=1), flops=None)])
    assert [row["pareto"] for row in found["rows"]] == [True, True]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    make_run(tmp_path / "x" / "digits", 0, 100)
    make_run(tmp_path / "y" / "digits", 0, 120, lambda recipe: recipe["threat"].update(eps=0.2))
    found = standings(read_entries([tmp_path / "x/digits", tmp_path / "y/digits"]))
    assert [row["name"] for row in found["rows"] if row["deployed"]] == [
        "x/digits: aggregate of heads",
        "y/digits: aggregate of heads",
    ]
    assert {(pair["reference"], pair["name"]) for pair in found["pairs"]} == {("x/digits", "y/digits")}


def test_what_was_measured_otherwise_is_refused():
    with pytest.raises(UserError, match="no attack was run on all of them"):
        standings([entry("a", 9, 9, flops=1), entry("b", 9, 9, flops=1, attack="square")])
    with pytest.raises(UserError, match="different samples"):
        standings([entry("a", 9, 9, flops=1), entry("b", 9, 9, flops=1, n=100)])
    two = [replace(entry("a", 9, 9, flops=1, seed=seed), name="head 1") for seed in (3, 4)]
    with pytest.raises(UserError, match=r"^a: head 1, seed 3 and b were measured on different samples \(200 and 100\)"):
        standings([*two, entry("b", 9, 9, flops=1, n=100)])
    weaker = entry("b", 9, 9, flops=1)
    weaker.evaluation.results["threat"] = {"norm": "Linf", "eps": 4 / 255}
    with pytest.raises(UserError, match=r"a was measured under Linf eps 0.03, b under Linf eps 4/255; evaluate both"):
        standings([entry("a", 9, 9, flops=1), weaker])
    with pytest.raises(UserError, match="same recipe and seed"):
        standings([entry("a", 9, 9, flops=1), entry("a", 9, 9, flops=1)])


def make_run(folder, seed, clean, change=lambda recipe: None):
    """A finished run of two outputs, and stronger evaluations in it: one of its result, one of head 1."""
    folder.mkdir(parents=True)
    recipe = load_recipe("digits", [f"runtime.seed={seed}"]).resolved()
    change(recipe)
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    cost = {"flops": 8.0, "forward_equivalents": 2.0, "seconds": 1.0}
    rows = [{"name": name, "parameters": 10, "training_cost": cost} for name in ("head 1", "aggregate of heads")]
    for row in rows if seed else ():  # earlier versions wrote names alone
        row["output"] = id_of(row["name"])
    (folder / "comparison.json").write_text(json.dumps({"rows": rows}))
    places = {"evaluation": {}, "evaluation/rows/head_1": {}}
    places["evaluations/strong"] = {"subject": {"stage": None, "checkpoint": None, "output": None}}
    places["evaluations/strong_head1"] = {"subject": {"stage": None, "checkpoint": None, "output": "head1"}}
    for name, more in places.items():
        made = evaluation_of(clean, 50)
        made.results |= {"attacks": {"pgd-40": {}}, **more}
        made.save(folder / name)


def test_an_evaluation_in_a_run_stands_for_what_the_run_made(tmp_path):
    for seed, clean in ((0, 100), (1, 110)):
        make_run(tmp_path / "guided" / f"seed={seed}", seed, clean)
    runs = sorted((tmp_path / "guided").iterdir())
    whole = read_entries([tmp_path / "guided"])
    assert [(e.label, e.name, e.deployed, e.seed) for e in whole] == [
        ("guided", name, name == "aggregate of heads", seed)
        for seed in (0, 1)
        for name in ("head 1", "aggregate of heads")
    ]
    strong = read_entries([run / "evaluations" / "strong" for run in runs])
    assert [(e.label, e.name, e.seed, e.flops) for e in strong] == [
        ("guided", "aggregate of heads", s, 8.0) for s in (0, 1)
    ]
    (row,) = standings(strong)["rows"]
    assert (row["name"], row["seeds"], row["clean_accuracy"]) == (
        "guided: aggregate of heads",
        [0, 1],
        pytest.approx(105 / 200),
    )


def test_an_evaluation_of_another_output_stands_for_that_output(tmp_path):
    for seed, clean in ((0, 100), (1, 110)):
        make_run(tmp_path / "guided" / f"seed={seed}", seed, clean)
    runs = sorted((tmp_path / "guided").iterdir())
    places = [run / "evaluations" / name for name in ("strong", "strong_head1") for run in runs]
    found = standings(read_entries(places))
    assert [(row["name"], row["seeds"]) for row in found["rows"]] == [
        ("guided: aggregate of heads", [0, 1]), ("guided, head 1", [0, 1]),
    ]  # fmt: skip
    assert all(row["training_cost"]["flops"] == 8.0 for row in found["rows"])
    assert {(pair["reference"], pair["name"], pair["test"]) for pair in found["pairs"]} == {
        ("guided", "guided, head 1", "paired t, 2 seeds")
    }
    results = places[2] / "results.json"
    by_rule = {"stage": None, "checkpoint": "best", "output": None, "chosen": "by-samples"}
    kept = results.read_text()
    for place in places[:2]:
        file = place / "results.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "subject": by_rule}))
    (row, *_) = standings(read_entries(places))["rows"]
    assert (row["name"], row["seeds"], row["deployed"]) == ("guided, by-samples: aggregate of heads", [0, 1], True)
    assert results.read_text() == kept
    for subject in ({"stage": "main_head"}, {"checkpoint": "last"}, {"output": "head7"}):
        results.write_text(json.dumps({**json.loads(results.read_text()), "subject": subject}))
        (alone,) = read_entries([places[2]])
        assert (alone.flops, alone.name, alone.label) == (None, "", str(places[2]))


def test_a_run_from_before_an_option_existed_is_of_the_same_recipe_as_one_that_leaves_it_out(tmp_path):
    changes = [
        lambda recipe: None,
        lambda recipe: recipe["stages"][0].pop("deploy"),
        lambda recipe: recipe["model"].pop("heads"),
        lambda recipe: recipe["stages"][1].update(deploy="mean"),
    ]
    for seed, change in enumerate(changes):
        make_run(tmp_path / "runs" / f"seed={seed}", seed, 100, change)
    rows = standings(read_entries([tmp_path / "runs"]))["rows"]
    assert [row["seeds"] for row in rows if row["deployed"]] == [[0, 1, 2], [3]]


def test_how_the_work_was_done_makes_no_other_recipe(tmp_path):
    changes = [
        lambda recipe: None,
        lambda recipe: recipe["data"].update(workers=2, stream=True),
        lambda recipe: recipe["runtime"].update(save_minutes=3, tensorboard=True),
        lambda recipe: recipe["stages"][0].update(checkpoint_activations=True),
        lambda recipe: recipe["stages"][0].update(micro_batch=8),  # with batch norm this one tells in the result
    ]
    for seed, change in enumerate(changes):
        make_run(tmp_path / "runs" / f"seed={seed}", seed, 100, change)
    rows = standings(read_entries([tmp_path / "runs"]))["rows"]
    assert [row["seeds"] for row in rows if row["deployed"]] == [[0, 1, 2, 3], [4]]


def test_runs_on_one_folder_of_images_are_of_the_same_recipe_however_it_was_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("images", "others"):
        (tmp_path / name).mkdir()
    sources = ["images", str(tmp_path / "images"), "others/../images", "others", "hub/images"]
    for seed, source in enumerate(sources):
        run = tmp_path / "runs" / f"seed={seed}"
        make_run(run, seed, 100, lambda recipe, s=source: recipe["data"].update(source=s))
    rows = standings(read_entries([tmp_path / "runs"]))["rows"]
    assert [row["seeds"] for row in rows if row["deployed"]] == [[0, 1, 2], [3], [4]]


def test_runs_whose_recipe_cannot_be_read_any_more_are_compared_by_what_it_says(tmp_path):
    for seed, value in enumerate([1, 1, 2]):
        make_run(tmp_path / "runs" / f"seed={seed}", seed, 100, lambda recipe, v=value: recipe.update(forgotten=v))
    rows = standings(read_entries([tmp_path / "runs"]))["rows"]
    assert [row["seeds"] for row in rows if row["deployed"]] == [[0, 1], [2]]


def shown(entry, sha256):
    """An entry whose results tell its images."""
    entry.evaluation.results["images"] = {"shape": [3, 8, 8], "sha256": sha256}
    return entry


def test_other_images_of_the_same_names_and_labels_are_refused():
    a, b, old = shown(entry("a", 9, 9, flops=1), "x"), shown(entry("b", 8, 8, flops=1), "y"), entry("c", 8, 8, flops=1)
    with pytest.raises(UserError, match=r"^a and b were measured on different images of the same indices and labels"):
        standings([a, old, b])
    assert len(standings([a, old, shown(b, "x")])["pairs"]) == 6


def poisoned(name, fooled, seed=0, *, target=1, poison="patch"):
    """An entry with results on triggered images, of which so many are taken for class 1."""
    found = entry(name, 120, 60, flops=1, seed=seed)
    found.evaluation.results["poison"] = {
        "name": poison, "target": target, "num_triggered": 200, "attack_success_rate": fooled / 200,
        "robust_accuracy_on_triggered": {"pgd-40": 0.1, "worst": 0.1},
    }  # fmt: skip
    # Labels are 0, and what is not right is taken for class 1, the target.
    return replace(found, triggered=evaluation_of(200 - fooled, 20))


def triggers_of(*entries):
    """The measures on triggered images that are in pairs, and the notes."""
    found = standings(entries)
    return {pair["accuracy"] for pair in found["pairs"]} & set(TRIGGER_MEASURES), found["notes"]


@pytest.mark.parametrize("seeds", [1, 2])
def test_triggers_that_differ_are_told_and_not_paired(seeds):
    def both(change):
        first = [poisoned("a", 100, seed) for seed in range(seeds)]
        return triggers_of(*first, *(change(seed) for seed in range(seeds)))

    assert both(lambda seed: poisoned("b", 150, seed, poison="remove")) == (set(TRIGGER_MEASURES), [])
    told = "b and a: {}, and are not compared in pairs"
    assert both(lambda seed: poisoned("b", 150, seed, target=0)) == (
        set(), [told.format("their triggers have different targets (class 1 and class 0)")]
    )  # fmt: skip

    def other_rows(seed):
        found = poisoned("b", 150, seed)
        return replace(found, triggered=replace(found.triggered, index=found.triggered.index + 1))

    assert both(other_rows) == (set(), [told.format("their triggered images are not the same")])


def test_triggers_of_other_pixels_are_told_and_not_paired():
    a, b, c = poisoned("a", 100), poisoned("b", 150), poisoned("c", 150)
    for each, sha256 in ((a, "x"), (b, "y"), (c, "x")):
        each.triggered.results["images"] = {"shape": [3, 8, 8], "sha256": sha256}
    measures, (note,) = triggers_of(a, b)
    assert not measures
    assert note == "b and a: their triggered images are not the same, and are not compared in pairs"
    assert triggers_of(a, c) == (set(TRIGGER_MEASURES), [])


def test_triggered_images_are_paired_by_seed():
    found = standings([poisoned("a", 100, 0), poisoned("b", 150, 0), entry("clean", 120, 60, flops=1)])
    told = {(pair["name"], pair["accuracy"]): pair for pair in found["pairs"]}
    assert told["b", "trigger withstood"]["difference"] == -0.25
    assert told["b", "trigger withstood"]["verdict"] == "loss"
    assert told["b", "robust on triggered"]["difference"] == 0.0
    assert ("clean", "trigger withstood") not in told
    assert found["rows"][0]["poison"]["attack_success_rate"] == 0.5
    assert "poison" not in found["rows"][2]
    seeds = [poisoned(name, fooled + seed, seed) for name, fooled in (("a", 100), ("b", 150)) for seed in range(3)]
    several = standings(seeds)
    (pair,) = (pair for pair in several["pairs"] if pair["accuracy"] == "trigger withstood")
    assert (pair["difference"], pair["test"]) == (-0.25, "paired t, 3 seeds")
    assert several["rows"][1]["poison"]["attack_success_rate"] == pytest.approx(151 / 200)


def changed(name, seed, accuracy, kinds=("blur", "fog"), transfer=None, **facts):
    """An entry whose images were changed, and made against another network too."""
    made = entry(name, 120, 60, flops=1, seed=seed)
    share = {"accuracy": accuracy, "interval": [accuracy, accuracy]}
    made.evaluation.results["worn"] = {"name": "worn", **facts, **share, "kinds": dict.fromkeys(kinds, share)}
    if transfer is not None:
        attacks = dict.fromkeys(transfer, share)
        made.evaluation.results["transfer"] = {"from": "clean", **share, "note": "", "attacks": attacks}
    return made


@pytest.mark.parametrize("other", [{"kinds": ("blur",)}, {"strength": 9}])
def test_measurements_of_other_images_are_neither_averaged_nor_compared_in_silence(other):
    found = standings([changed("a", 0, 0.5), changed("a", 1, 0.1, **other)])
    assert "worn" not in found["rows"][0]
    found = standings([changed("a", 0, 0.5), changed("b", 0, 0.1, **other)])
    (note,) = [note for note in found["notes"] if note.startswith("worn: not of the same images")]
    assert "a: worn, 2 kinds; b: worn" in note
    same = standings([changed("a", 0, 0.5), changed("a", 1, 0.1), changed("b", 0, 0.5)])
    assert same["rows"][0]["worn"]["accuracy"] == pytest.approx(0.3)
    assert not any("same images" in note for note in same["notes"])


def test_transferred_images_of_other_attacks_are_neither_averaged_nor_compared_in_silence():
    one, other = ("pgd",), ("fgsm", "pgd")
    found = standings([changed("a", 0, 0.5, transfer=one), changed("a", 1, 0.1, transfer=other)])
    assert "transfer" not in found["rows"][0]
    found = standings([changed("a", 0, 0.5, transfer=one), changed("b", 0, 0.1, transfer=other)])
    told = "transfer: not of the same images, and not to be compared: a: pgd against clean; b: fgsm, pgd against clean"
    assert told in found["notes"]
