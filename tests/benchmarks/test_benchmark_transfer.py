"""A robust trunk from other images: its script asks for cells of equal cost, and what is kept answers the questions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import dualhead
from dualhead.models import Normalize
from dualhead.recipe import load_recipe
from dualhead.runs.prepare import prepare, start_from
from helpers.costs import training_cost
from helpers.studies import ROOT, after, asked_of, made_run, measured, module_of, recipe_of, trained

METHODS = ("tuned", "distilled", "dhat-thawed", "dhat-frozen", "scratch", "scratch-long")
SIZES = (2250, 500, 9000)


@pytest.fixture(scope="module")
def collect():
    return module_of("transfer/collect.py")


def run_of(folder, **environment):
    words = ("TINY", "CIFAR", str(folder / "out"))
    return asked_of("benchmarks/transfer/run.sh", folder, *words, **{"SAYS": "0.03", "SEEDS": "0", **environment})


def images_of(recipe):
    return (recipe.data.train_limit or 100_000) - recipe.data.validation


def test_cells_that_decide_come_first(tmp_path):
    ended, asked = run_of(tmp_path, SEEDS="0 1")
    assert (ended.returncode, ended.stderr) == (0, "")
    names = list(trained(asked))
    assert names[:4] == ["trunk/seed=0", "rate-0.1/seed=100", "rate-0.03/seed=100", "rate-0.01/seed=100"]
    first = [f"{method}-2250/seed=0" for method in METHODS]
    assert names[4:17] == [*first, "trunk/seed=1", *(name.replace("seed=0", "seed=1") for name in first)]
    assert set(names[17:]) == {f"{method}-{n}/seed={seed}" for method in METHODS for n in SIZES[1:] for seed in (0, 1)}
    attacked = {words[1].split("/out/")[1] for words in asked if words[0] == "evaluate"}
    assert attacked == {*names} - {*names[:4], "trunk/seed=1"}  # a choice sees no test image
    (first_file,) = (tmp_path / "kept/trunk/seed=1").glob("*.safetensors")
    assert first_file.name == "model.safetensors"


def test_methods_cost_the_same_and_start_from_the_trunk(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, asked = run_of(tmp_path)
    recipes = {name.split("/")[0]: recipe_of(words) for name, words in trained(asked).items()}
    costs = {name: images_of(recipe) * training_cost(recipe) for name, recipe in recipes.items()}
    for n in SIZES:
        base = costs[f"scratch-{n}"]
        assert costs[f"tuned-{n}"] == base
        for method in ("distilled", "dhat-thawed", "dhat-frozen"):
            assert 0.95 * base <= costs[f"{method}-{n}"] <= 1.001 * base, (method, n)
        assert costs[f"scratch-long-{n}"] == pytest.approx(base + costs["trunk"], rel=0.01)
    assert {images_of(recipes[f"tuned-{n}"]) for n in SIZES} == set(SIZES)
    assert recipes["trunk"].threat == recipes["tuned-500"].threat
    for name, recipe in recipes.items():
        first = recipe.stages[0]
        begins = name != "trunk" and not name.startswith("scratch")
        assert (first.init is not None) == (first.replace_classifier is True) == begins, name
        assert all(stage.init is None for stage in recipe.stages[1:])
        if begins and not name.startswith("rate"):
            rates = [stage.optimiser.lr for stage in recipe.stages if stage.name != "aggregator"]
            assert set(rates) == {0.03}, name
    assert recipes["dhat-frozen-500"].stages[0].train == ("head1",)
    assert recipes["dhat-thawed-500"].stages[0].train == ("trunk", "head1")


def test_the_trunk_fits_every_method(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    network = load_recipe("benchmarks/transfer/pretrain.yaml", ["data.source=digits"]).model.backbone
    trunk = network.create(200, (3, 32, 32), Normalize([0.5] * 3, [0.25] * 3))
    dualhead.save(trunk, tmp_path / "kept/trunk/seed=0", example=torch.rand(2, 3, 32, 32))
    (tmp_path / "kept/trunk/seed=0.json").touch()
    rng = np.random.default_rng(0)
    images = {f"x_{part}": rng.integers(0, 256, (40, 32, 32, 3), np.uint8) for part in ("train", "test")}
    labels = {f"y_{part}": np.arange(40) % 10 for part in ("train", "test")}
    np.savez(tmp_path / "few.npz", **images, **labels)
    few = [f"data.source={tmp_path / 'few.npz'}", "data.validation=10", "data.train_limit=40"]
    _, asked = run_of(tmp_path, METHODS="*-500")
    for name in ("tuned", "distilled", "dhat-thawed", "dhat-frozen"):
        words = trained(asked)[f"{name}-500/seed=0"]
        recipe = load_recipe(words[1], [*words[2 : words.index("--run-dir")], *few])
        prepared = prepare(recipe, tmp_path / name)
        start_from(prepared, recipe.stages[0], prepared.model)
        model = prepared.model
        found = model.base_state_dict() if hasattr(model, "base_state_dict") else model.state_dict()
        for key, tensor in trunk.state_dict().items():
            assert len(found[key]) == 10 if key.startswith("fc.") else torch.equal(found[key], tensor), (name, key)


def test_it_goes_on_from_what_is_kept_the_trunk_too(tmp_path):
    run_of(tmp_path)
    other = tmp_path / "another machine"
    other.mkdir()
    (tmp_path / "kept").rename(other / "kept")
    (other / "kept/distilled-500/seed=0.json").unlink()
    _, asked = run_of(other)
    (words,) = trained(asked).values()
    assert after("--run-dir", words).endswith("/distilled-500/seed=0")
    assert f"stages.guided.init={other}/kept/trunk/seed=0" in words


def test_a_rate_that_is_given_is_not_chosen(tmp_path):
    _, asked = run_of(tmp_path, RATE="0.02", METHODS="tuned-500")
    assert list(trained(asked)) == ["trunk/seed=0", "tuned-500/seed=0"]
    assert "stages.*.optimiser.lr=0.02" in trained(asked)["tuned-500/seed=0"]


def test_the_rate_is_the_most_robust_and_of_equal_ones_the_most_accurate(collect, tmp_path):
    found = {"0.1": (0.5, 0.2), "0.03": (0.4, 0.25), "0.01": (0.45, 0.25)}
    for rate, held_out in found.items():
        assert collect.rate(tmp_path / "kept") is None
        run = made_run(tmp_path / "run", held_out=held_out)
        collect.main(["keep", str(run), str(tmp_path / f"kept/rate-{rate}/seed=100.json")])
    assert collect.rate(tmp_path / "kept") == "0.01"


def test_questions_are_answered_from_what_is_kept(collect, tmp_path, capsys):
    gained = {"scratch": 0.0, "scratch-long": 0.04, "tuned": 0.02, "distilled": 0.05}
    for seed in range(2):
        run = made_run(tmp_path / "run", flops=1e12, held_out=(0.1, 0.05))
        collect.main(["keep", str(run), str(tmp_path / f"kept/trunk/seed={seed}.json")])
        for name, gain in gained.items():
            found = measured(0.5 + 0.01 * seed + gain, 0.2 + gain, 1000)
            run = made_run(tmp_path / "run", strong=found)
            collect.main(["keep", str(run), str(tmp_path / f"kept/{name}-2250/seed={seed}.json"), "strong"])
    collect.main(["tell", str(tmp_path / "kept"), str(Path(tmp_path / "told.json"))])
    told = collect.json.loads((tmp_path / "told.json").read_text())
    assert {name.split(": ")[1]: each for name, each in told["answers"].items()} == {
        "tuned-2250 less scratch-2250": "gains",
        "tuned-2250 less scratch-long-2250": "loses",
        "distilled-2250 less tuned-2250": "gains",
    }
    assert told["trunk"]["flops"]["mean"] == 1e12
    assert "distilled-2250 less tuned-2250 | +3.0" in capsys.readouterr().out
