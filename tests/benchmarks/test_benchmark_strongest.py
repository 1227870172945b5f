"""The comparison at equal cost: its script asks for what can be run and costs the same, and stops and goes on."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

import dualhead
from helpers import studies
from helpers.costs import training_cost
from helpers.studies import ROOT, after, made_run, measured, module_of, recipe_of


def asked_of(scale, folder, *more, **settings):
    words = (scale, "DATA", str(folder / "out"), *more)
    return studies.asked_of("benchmarks/strongest/run.sh", folder, *words, **settings)


def run_of(words):
    return Path(after("--run-dir", words))


@pytest.mark.parametrize(("scale", "studies"), [("cpu", 54), ("gpu", 11)])
def test_every_run_has_a_recipe_and_harder_attacks(scale, studies, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    ended, asked = asked_of(scale, tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    trained = [words for words in asked if words[0] == "train"]
    runs = [run_of(words) for words in trained]
    assert len({run.parent for run in runs}) == studies
    for words in trained:
        assert str(recipe_of(words).runtime.seed) in run_of(words).name
    halves = [tuple(map(Path, words[1:])) for words in asked if words[0].endswith("merge.py")]
    assert all({first, second} <= set(runs) for first, second, _ in halves)
    made = [each for *_, each in halves]
    of_pairs = [run for run in runs if run.parent.name == "trades-guided-merged-half"]
    assert 2 * len(made) == len(of_pairs) == (6 if scale == "cpu" else 0)
    scaled = [recipe_of(words).model.normalize for words in trained if run_of(words) in of_pairs]
    assert all(each == scaled[0] and each.mean for each in scaled)  # else the two could not be merged
    found = {"strong": [], "adaptive": [], "autoattack": []}
    for words in asked:
        if words[0] == "evaluate":
            found[Path(after("--output", words)).name].append(words)
    for name in ("strong", "adaptive"):
        assert {Path(words[1]) for words in found[name]} == {*runs, *made} - {*of_pairs}
        assert len({words[1] for words in found[name]}) == len(found[name])
    assert all({"autoattack-fast", "pgd-40"} <= set(words) for words in found["strong"])
    for words in found["adaptive"]:
        several = ("dhat", "distilled", "ensemble", "three", "joint", "finetune", "mixed", "merged")
        merges = any(name in words[1] for name in several)
        assert "square-500" in words
        assert ("multihead-20" in words) == merges
    assert {Path(words[1]).parent.name for words in found["autoattack"]} >= {"trades-base", "trades-distilled"}
    assert {words[1] for words in found["autoattack"]} <= {str(run) for run in runs}
    again, asked = asked_of(scale, tmp_path)
    assert (again.returncode, asked) == (0, [])


@pytest.mark.parametrize("scale", ["cpu", pytest.param("gpu", marks=pytest.mark.slow)])
def test_what_is_compared_costs_the_same(scale, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, asked = asked_of(scale, tmp_path, SEEDS="0", MORE_SEEDS="")
    recipes = {run_of(words).parent.name: recipe_of(words) for words in asked if words[0] == "train"}
    for method in ("trades", "sat", "mart"):
        base, long = (
            training_cost(recipes.get(f"{method}-{name}", recipes[f"{method}-base"])) for name in ("base", "base-long")
        )
        for other, most in (("dhat", base), ("distilled", long), ("ensemble", long)):
            if other != "ensemble" or method == "trades":
                assert 0.95 * most <= training_cost(recipes[f"{method}-{other}"]) <= 1.001 * most, (method, other)
    if scale == "cpu":
        for length in ("", "-long"):
            wide, base = (training_cost(recipes[f"trades-{name}{length}-beta-12"]) for name in ("wide", "base"))
            assert 0.95 * base <= wide <= 1.001 * base
        short, long, mart = (training_cost(recipes[name]) for name in ("trades-base", "trades-base-long", "mart-base"))
        for name, most in (("trades-three", long), ("trades-three-short", short), ("mart-distilled-short", mart)):
            assert 0.95 * most <= training_cost(recipes[name]) <= 1.001 * most, name


def words_of(asked):
    return [words[0] if words[0] in ("train", "evaluate") else words[1] for words in asked]


def test_it_goes_on_where_it_was_stopped(tmp_path):
    ended, asked = asked_of("gpu", tmp_path, within=5, HANGS_ON="trades-distilled")
    assert ended.returncode == 124
    one = ["train", "evaluate", "evaluate", "keep", "tell"]
    assert words_of(asked) == [*one * 5, "train"]
    ended, asked = asked_of("gpu", tmp_path)
    assert ended.returncode == 0
    assert words_of(asked) == [*one * 32, *["evaluate", "keep", "tell"] * 9]


def test_it_goes_on_elsewhere_from_what_was_kept(tmp_path):
    chosen = {"METHODS": "@(trades-ensemble|mart-distilled|trades-guided-merged)"}
    asked_of("cpu", tmp_path / "here", **chosen)
    (tmp_path / "there").mkdir()
    (tmp_path / "here/kept").rename(tmp_path / "there/kept")
    for name in ("mart-distilled/seed=1", "trades-guided-merged/seed=2"):
        (tmp_path / f"there/kept/{name}.json").unlink()
    ended, asked = asked_of("cpu", tmp_path / "there", **chosen)
    runs = [str(run_of(words)).split("/out/")[1] for words in asked if words[0] == "train"]
    assert runs == ["mart-distilled/seed=1", *(f"trades-guided-merged-half/seed={seed}" for seed in (4, 5))]
    assert "trades-ensemble seed 0: its run is not here, so AutoAttack is left out" in ended.stdout


def test_a_pattern_chooses_studies(tmp_path):
    _, asked = asked_of("cpu", tmp_path, METHODS="mart-d*", SEEDS="0", MORE_SEEDS="")
    trained = {run_of(words).parent.name for words in asked if words[0] == "train"}
    assert trained == {"mart-distilled", "mart-dhat", "mart-distilled-short"}
    assert {Path(words[1]).parent.name for words in asked if words[0] == "evaluate"} == trained
    _, asked = asked_of("cpu", tmp_path, METHODS="trades-distilled", SEEDS="0", MORE_SEEDS="")
    found = {Path(after("--output", words)).name for words in asked if words[0] == "evaluate"}
    assert found == {"strong", "adaptive", "autoattack"}


def test_shards_share_the_seeds(tmp_path):
    runs = []
    for number in (0, 1):
        _, asked = asked_of("gpu", tmp_path / str(number), f"{number}/2", "stages.*.epochs=1")
        runs.append({Path(words[1]).name for words in asked if words[0] == "evaluate"})
        trained = [words for words in asked if words[0] == "train"]
        assert {run_of(words).name for words in trained} == runs[-1]
        assert all("stages.*.epochs=1" in words for words in trained)
    assert runs == [{"seed=0", "seed=2", "seed=4"}, {"seed=1", "seed=3"}]


def test_held_out_images_are_attacked_in_place_of_test_images(tmp_path):
    _, asked = asked_of("cpu", tmp_path, HELD_OUT="HELD", SEEDS="0", MORE_SEEDS="")
    attacked = [words for words in asked if words[0] == "evaluate"]
    assert {after("--data", words) for words in attacked} == {"HELD"}
    assert {Path(after("--output", words)).name for words in attacked} == {"held_out"}
    assert not (tmp_path / "kept").exists()
    _, asked = asked_of("gpu", tmp_path, SEEDS="0", MORE_SEEDS="")
    assert {after("--data", words) for words in asked if words[0] == "evaluate"} == {"DATA"}


def test_what_would_mislead_is_refused(tmp_path):
    for scale, environment, told in (
        ("gpu", {"HELD_OUT": "HELD"}, "HELD_OUT: the recipes for a GPU train on those images"),
        ("cpu", {"METHODS": "trades-bse"}, "METHODS=trades-bse: no study of this scale is called so"),
        ("gpu", {"METHODS": "trades-three"}, "METHODS=trades-three: no study of this scale is called so"),
    ):
        ended, asked = asked_of(scale, tmp_path, SEEDS="0", MORE_SEEDS="", **environment)
        assert (ended.returncode, ended.stderr.strip(), asked) == (2, told, [])


def test_held_out_images_are_the_last_of_the_training_part(tmp_path, monkeypatch):
    module = module_of("strongest/held_out.py")
    monkeypatch.setattr(module, "FIRST", 7)
    (tmp_path / "in").mkdir()
    Dataset.from_dict({"label": list(range(10))}).to_parquet(tmp_path / "in" / "train-00000-of-00001.parquet")
    monkeypatch.setattr("sys.argv", ["held_out.py", str(tmp_path / "in"), str(tmp_path / "out")])
    module.main()
    (written,) = (tmp_path / "out").iterdir()
    assert written.name.startswith("test-")
    assert Dataset.from_parquet(str(written))["label"][:] == [7, 8, 9]


@pytest.fixture(scope="module")
def collect():
    return module_of("strongest/collect.py")


def kept(collect, folder, name, *, precision="float32", images=2000, gain=0.0):
    for seed in range(3):
        found = measured(0.5 + 0.002 * seed + gain, 0.2 + 0.002 * seed + gain, images)
        run = made_run(folder / "run", precision=precision, strong=found, adaptive=found)
        collect.main(["keep", str(run), str(folder / "kept" / name / f"seed={seed}.json"), "strong", "adaptive"])


def test_what_is_kept_is_compared_within_a_setting_and_with_what_stands(collect, tmp_path, capsys):
    kept(collect, tmp_path, "mart-base-long")
    kept(collect, tmp_path, "mart-distilled", gain=0.03)
    kept(collect, tmp_path, "trades-ensemble", precision="bf16", images=5000)
    collect.main(["tell", str(tmp_path / "kept"), str(tmp_path / "told.json")])
    told = collect.json.loads((tmp_path / "told.json").read_text())
    assert set(told) == {"float32, 2000 images", "bf16, 5000 images"}
    mart, ensemble = told["float32, 2000 images"], told["bf16, 5000 images"]
    assert {(pair["name"], pair["reference"]) for pair in mart["pairs"]} == {("mart-distilled", "mart-base-long")}
    assert [pair["difference"] for pair in mart["pairs"]] == pytest.approx([0.03] * 4)
    names = [(each["name"], each["reference"]) for each in mart["unpaired"] if each["accuracy"] == "clean"]
    assert names == [("mart-distilled", "mart-base"), ("mart-base-long", "mart-base")]
    names = {(each["name"], each["reference"]) for each in ensemble["unpaired"]}
    assert names == {("trades-ensemble", "trades-base-long"), ("trades-distilled", "trades-ensemble")}
    assert ensemble["pairs"] == []
    assert set(ensemble["further"]["trades-ensemble"]) == {"adaptive"}
    assert "mart-distilled less mart-base-long, paired by seed: clean +3.0" in capsys.readouterr().out


def test_unpaired_differences_have_welch_s_interval(collect):
    from scipy import stats

    from dualhead.statistics import student

    values = ([0.5, 0.52, 0.51], [0.53, 0.6, 0.55, 0.57, 0.54])
    one, other = (
        {
            "seeds": list(range(len(each))),
            "clean_accuracy": sum(each) / len(each),
            "robust_accuracy": {"pgd-40": 0.3, "autoattack-fast": 0.2},
            "intervals": {"clean_accuracy": student(each), "pgd-40": [0.2, 0.4], "autoattack-fast": [0.1, 0.3]},
        }
        for each in values
    )
    found = collect.unpaired(one, other)["clean"]
    known = stats.ttest_ind(values[1], values[0], equal_var=False).confidence_interval()
    assert found["interval"] == pytest.approx([known.low, known.high])
    assert collect.unpaired({**one, "seeds": [0]}, other) is None


def test_seeds_of_two_settings_are_refused(collect, tmp_path):
    kept(collect, tmp_path, "mart-distilled")
    run = made_run(tmp_path / "run", precision="float32", strong=measured(0.5, 0.2, 1000))
    collect.main(["keep", str(run), str(tmp_path / "kept/mart-distilled/seed=3.json"), "strong"])
    with pytest.raises(SystemExit, match="attacked on 1000 and 2000 images"):
        collect.tell(tmp_path / "kept")


def test_every_row_that_is_to_be_measured_is_a_study_or_stands(collect):
    script = (ROOT / "benchmarks/strongest/run.sh").read_text()
    rows = {name for pair in collect.COMPARISONS for name in pair}
    assert not [name for name in rows if f"study {name} " not in script and f"merged {name} " not in script]
    for each in collect.SETTINGS.values():
        assert rows & collect.standing(each).keys()


def test_two_models_are_merged_to_their_mean(tmp_path):
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
        model = dualhead.attach_second_head(network, "input", example=torch.rand(2, 3, 2, 2), aggregator="mean")
        made.append(model)
        run = tmp_path / str(seed)
        (run / "model").mkdir(parents=True)
        save_file(model.state_dict(), run / "model/model.safetensors")
        (run / "model/config.json").write_text(json.dumps({"architecture": {"heads": 2}, "output": "head1"}))
        cost = {"flops": 1e9, "forward_equivalents": 1e6, "seconds": 60.0 + seed}
        row = {"name": "head 1", "output": "head1", "parameters": 130, "training_cost": cost}
        (run / "comparison.json").write_text(json.dumps({"rows": [row]}))
        (run / "environment.json").write_text("{}")
    merge = module_of("strongest/merge.py")
    merge.merge((tmp_path / "0", tmp_path / "1"), tmp_path / "out")
    model = copy.deepcopy(made[0])
    model.load_state_dict(load_file(tmp_path / "out/model/model.safetensors"))
    x = torch.rand(4, 3, 2, 2)
    mean = sum(each.head_logits(x)[:, 0] for each in made) / 2
    assert torch.allclose(model.head_logits(x).mean(1), mean)
    assert json.loads((tmp_path / "out/model/config.json").read_text())["output"] == "mean"
    (row,) = json.loads((tmp_path / "out/comparison.json").read_text())["rows"]
    assert (row["parameters"], row["training_cost"]["seconds"]) == (260, 121.0)
    (tmp_path / "1/model/config.json").write_text(json.dumps({"architecture": {"heads": 3}, "output": "head1"}))
    with pytest.raises(SystemExit, match="differ in more than their heads"):
        merge.merge((tmp_path / "0", tmp_path / "1"), tmp_path / "other")
