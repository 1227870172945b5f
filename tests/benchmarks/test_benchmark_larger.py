"""The gain over size: its script asks for pairs of equal cost, and the line goes through what was measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dualhead.models import Normalize, backbones
from dualhead.system.flops import CountFlops
from helpers.costs import training_cost
from helpers.studies import ROOT, asked_of, made_run, measured, module_of, recipe_of, trained

METHODS = ("trades", "guided")


@pytest.fixture(scope="module")
def collect():
    return module_of("larger/collect.py")


def run_of(folder, **environment):
    return asked_of("benchmarks/larger/run.sh", folder, "DATA", str(folder / "out"), **environment)


def test_pairs_cost_the_same_and_cheap_cells_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    ended, asked = run_of(tmp_path, SEEDS="0 1")
    assert (ended.returncode, ended.stderr) == (0, "")
    names = list(trained(asked))
    assert names[:6] == [f"{cell}-{method}/seed=0" for cell in ("images", "width", "stem") for method in METHODS]
    assert names[-4:] == [f"control-{method}/seed={seed}" for seed in range(2) for method in METHODS]
    assert len([words for words in asked if words[0] == "evaluate"]) == 3 * len(names) // 2
    costs = {}
    for name, words in trained(asked).items():
        if name.endswith("seed=0"):
            recipe = recipe_of(words)
            images = recipe.data.train_limit - recipe.data.validation
            costs[name.split("/")[0]] = images * training_cost(recipe)
    for cell in ("images", "width", "stem", "control"):
        assert 0.95 * costs[f"{cell}-trades"] <= costs[f"{cell}-guided"] <= 1.001 * costs[f"{cell}-trades"]
    assert costs["images-trades"] == pytest.approx(costs["control-trades"])  # as many steps, to a batch an epoch
    protocol = (ROOT / "benchmarks/larger/README.md").read_text()
    assert all(f"`{name}`" in protocol for name in ("images", "width", "stem", "control"))


def test_it_goes_on_from_what_is_kept(tmp_path):
    run_of(tmp_path)
    (tmp_path / "kept/stem-guided/seed=2.json").unlink()
    other = tmp_path / "another machine"
    other.mkdir()
    (tmp_path / "kept").rename(other / "kept")
    _, asked = run_of(other)
    assert list(trained(asked)) == ["stem-guided/seed=2"]


def test_the_line_is_that_of_least_squares_and_its_interval_that_of_welch(collect):
    sizes, gained, errors = (1e10, 4e10, 1.6e11), (0.03, 0.02, 0.018), (0.002, 0.004, 0.003)
    found = [collect.Point("", *each, 3) for each in zip(sizes, gained, errors, strict=True)]
    told = collect.line(found)
    slope, begin = np.polyfit(np.log10(sizes), gained, 1)
    assert told["slope"]["value"] == pytest.approx(slope)
    full = told["extrapolation to ResNet-18 on 50,000 images"]
    assert full["value"] == pytest.approx(begin + slope * math.log10(collect.FULL))
    assert full["interval"][0] < full["value"] < full["interval"][1]
    two = [collect.Point("", 1.0, 0.01, 0.003, 3), collect.Point("", 10.0, 0.02, 0.003, 3)]
    reach = stats.t.ppf(0.975, 4) * 0.003 * math.sqrt(2)  # equal errors: the pooled test
    assert collect.line(two)["slope"]["interval"] == pytest.approx([0.01 - reach, 0.01 + reach])


@pytest.mark.parametrize(
    ("gained", "told"), [((0.05, 0.03), "shrinks"), ((0.01, 0.03), "grows"), ((0.03, 0.03), "undecided")]
)
def test_the_slope_answers(collect, gained, told):
    found = [collect.Point("", 10.0**n, gain, 0.001, 3) for n, gain in enumerate(gained)]
    assert collect.line(found)["answer"] == told


def test_the_first_point_is_the_one_that_stands(collect):
    first = collect.standing()["strong"]["autoattack-fast"]
    pairs = collect.json.loads(collect.STANDING.read_text())[collect.SECTION]["pairs"]
    (pair,) = (p for p in pairs if p["accuracy"] == "autoattack-fast"
               and (p["reference"], p["name"]) == (collect.TRADES, collect.GUIDED))  # fmt: skip
    assert (first.gain, first.seeds) == (pair["difference"], 5)
    reach = stats.t.ppf(0.975, 4) * first.error
    assert [first.gain - reach, first.gain + reach] == pytest.approx(pair["interval"])


def test_sizes_are_those_of_the_networks(collect):
    def operations(spec):
        network = backbones.build(spec).create(10, (3, 32, 32), Normalize.identity(3)).eval()
        with CountFlops() as counted, torch.no_grad():
            network(torch.rand(1, 3, 32, 32))
        return counted.total

    assert 50_000 * operations("resnet-18") == collect.FULL
    small = {"name": "wideresnet", "depth": 10, "width": 1, "stem_stride": 2}
    assert collect.standing()["head2"]["clean"].size == pytest.approx(2250 * operations(small), rel=1e-4)


def test_the_curve_waits_for_all_its_points_and_tells_an_extrapolation_as_one(collect, tmp_path, capsys):
    for cell, gain in (("images", 0.03), ("width", 0.02), ("stem", 0.015), ("control", 0.035)):
        for seed in range(2):
            step = 0.003 * seed
            for method, more in (("trades", 0.0), ("guided", gain)):
                of = {"strong": measured(0.5 + step + more, 0.2 + step + more, 400)}
                of |= {"head2": measured(0.5 + step, 0.2 + step + more, 400)} if method == "guided" else {}
                run = made_run(tmp_path / "run", flops=1e9, unit={"images": 1e3, "control": 1e3}.get(cell, 4e3), **of)
                file = tmp_path / f"kept/{cell}-{method}/seed={seed}.json"
                collect.main(["keep", str(run), str(file), *of])
        if cell == "width":
            assert set(collect.tell(tmp_path / "kept")["curve"].values()) == {None}
    collect.main(["tell", str(tmp_path / "kept"), str(tmp_path / "told.json")])
    told = collect.json.loads((tmp_path / "told.json").read_text())
    found = told["curve"]["mean of both heads, robust, from control"]
    assert [each["name"] for each in found["points"]] == ["control", "images", "width", "stem"]
    assert [each["size"] for each in found["points"]] == [2250e3, 9000e3, 9000 * 4e3, 9000 * 4e3]
    assert found["answer"] == "shrinks"
    assert told["differences"]["images: mean of both heads"]["clean"]["difference"] == pytest.approx(0.03)
    printed = capsys.readouterr().out
    assert printed.count("extrapolated along a straight line, not measured") == 8
