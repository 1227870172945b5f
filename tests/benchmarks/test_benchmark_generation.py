"""The study of generation: what its script asks for can be run, and what it left is compared by seed."""

from __future__ import annotations

import json

import pytest

from dualhead.recipe import load_recipe
from helpers import studies
from helpers.studies import ROOT, module_of


def asked_of(folder, **environment):
    """The trainings and evaluations that the script asks for."""
    ended, asked = studies.asked_of("benchmarks/generation/run.sh", folder, str(folder / "out"), **environment)
    assert (ended.returncode, ended.stderr) == (0, "")
    return [words for words in asked if words[0] in ("train", "evaluate")]


def test_every_run_is_trained_once_and_measured_as_the_protocol_says(tmp_path):
    asked = asked_of(tmp_path, SEEDS="3 4")
    trained = [words for words in asked if words[0] == "train"]
    assert len(trained) == 8
    assert {words[1] for words in trained} == {
        "digits_dat", "benchmarks/generation/continued.yaml", "digits_dat_two_heads", "digits_dat_mean",
    }  # fmt: skip
    measured = [words for words in asked if words[0] == "evaluate"]
    assert sum("--generation" in words for words in measured) == 2 * (2 + 1 + 3 + 1)
    assert sum("autoattack" in words for words in measured) == 2 * 2
    assert asked_of(tmp_path, SEEDS="3 4") == []  # all is done


def test_larger_images_are_asked_for_by_their_folders(tmp_path):
    folders = {"CIFAR10": "cifar", "STARTS": "starts", "FASHION": "fashion"}
    asked = asked_of(tmp_path, SEEDS="0", METHODS="[cf]*-*", **folders)
    trained = {words[1] for words in asked if words[0] == "train"}
    assert trained == {
        "benchmarks/generation/cifar10.yaml", "benchmarks/generation/cifar10_continued.yaml", "fashion_dat",
    }  # fmt: skip
    assert all(any(word == f"data.source={folders['FASHION']}" for word in words) for words in asked
               if words[:2] == ["train", "fashion_dat"])  # fmt: skip
    assert asked_of(tmp_path, SEEDS="0", METHODS="[cf]*-*", **folders) == []


def test_the_control_of_cifar10_differs_by_the_energy_alone(monkeypatch):
    monkeypatch.chdir(ROOT / "benchmarks" / "generation")
    dat, plain = (load_recipe(f"{name}.yaml").resolved() for name in ("cifar10", "cifar10_continued"))
    assert dat["stages"][0] == plain["stages"][0]
    changed = {key for key, value in dat["stages"][1].items() if plain["stages"][1][key] != value}
    assert changed == {"objective"}
    assert plain["stages"][1]["objective"] == dat["stages"][1]["objective"]["base"]


def test_the_control_of_cifar10_costs_what_the_energy_does(collect, tmp_path):
    for name, flops in (("base", 200), ("joint", 500)):
        place = tmp_path / "checkpoints" / name
        place.mkdir(parents=True)
        (place / "summary.json").write_text(json.dumps({"flops": flops}))
    lines = [{"stage": "base", "epoch": n} for n in range(1, 31)] + [{"stage": "joint", "epoch": n} for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert collect.epochs_of(tmp_path) == 75


def test_the_control_differs_from_dat_by_the_energy_and_its_length(monkeypatch):
    monkeypatch.chdir(ROOT)
    dat, plain = (load_recipe(name).resolved() for name in ("digits_dat", "benchmarks/generation/continued.yaml"))
    assert dat["stages"][0] == plain["stages"][0]
    changed = {key for key, value in dat["stages"][1].items() if plain["stages"][1][key] != value}
    assert changed == {"objective", "epochs"}
    assert plain["stages"][1]["objective"] == dat["stages"][1]["objective"]["base"]


@pytest.fixture
def collect():
    return module_of("generation/collect.py")


def leave(folder, score, distance, robust=None, judge="a"):
    names = ("kernel_distance", "precision", "recall", "density", "coverage", "judge_agreement", "diversity", "steps")
    told = dict.fromkeys(names, 0.5)
    told["judge"] = {"digest": judge}
    told |= {"classification_accuracy_score": score, "frechet_distance": distance, "nearest": {"samples": 1.0},
             "floor": {"frechet_distance": 0.1, "classification_accuracy_score": 0.98}}  # fmt: skip
    kept = {"clean_accuracy": 0.99, "robust_accuracy": {"pgd-20": 0.75, "worst": 0.75}, "generation": told}
    results = {"samples": kept}
    if robust is not None:
        results["strong"] = {"robust_accuracy": {"autoattack": robust, "worst": robust}}
    for name, content in results.items():
        place = folder / "evaluations" / name
        place.mkdir(parents=True)
        (place / "results.json").write_text(json.dumps(content))
        (place / "done").touch()


def test_differences_are_paired_by_seed(collect, tmp_path, monkeypatch):
    for seed, gain in ((0, 0.05), (1, 0.07)):
        leave(tmp_path / "continued" / f"seed={seed}", 0.88 + seed / 100, 2.0, robust=0.7)
        leave(tmp_path / "dat" / f"seed={seed}", 0.88 + seed / 100 + gain, 0.5, robust=0.72)
    leave(tmp_path / "dat" / "seed=2", 0.1, 9.0)  # without a partner, and AutoAttack still to come
    monkeypatch.setattr("sys.argv", ["collect.py", str(tmp_path), str(tmp_path / "found.json")])
    collect.main()
    found = json.loads((tmp_path / "found.json").read_text())
    (pair,) = found["differences"]
    assert pair["seeds"] == [0, 1]
    assert pair["classification_accuracy_score"]["mean"] == pytest.approx(0.06)
    assert pair["classification_accuracy_score"]["interval"][0] < 0.05
    assert pair["autoattack"]["seeds"] == pytest.approx([0.02, 0.02])
    assert pair["frechet_distance ratio"]["mean"] == pytest.approx(0.25)
    assert "autoattack" not in found["variants"]["dat: samples"]


def test_seeds_of_an_earlier_answer_are_kept_under_the_same_judge(collect, tmp_path, monkeypatch):
    def told(out):
        monkeypatch.setattr("sys.argv", ["collect.py", str(tmp_path / out), str(tmp_path / "found.json")])
        collect.main()
        return json.loads((tmp_path / "found.json").read_text())

    leave(tmp_path / "first" / "dat" / "seed=1", 0.9, 0.5, robust=0.7)
    leave(tmp_path / "second" / "dat" / "seed=0", 0.8, 0.6, robust=0.6)
    leave(tmp_path / "other" / "dat" / "seed=2", 0.8, 0.6, judge="b")
    told("first")
    both = told("second")["variants"]["dat: samples"]
    assert both["seeds"] == [0, 1]
    assert both["classification_accuracy_score"]["seeds"] == [0.8, 0.9]
    assert both["autoattack"]["seeds"] == [0.6, 0.7]
    with pytest.raises(SystemExit, match="one must judge all"):
        told("other")
    assert told("second")["variants"]["dat: samples"] == both
