"""A measurement of one's own: by name or by address, in every table, and never mixed up with another version of it."""

import json
import textwrap

import numpy as np
import pytest
import torch

import dualhead
from dualhead.errors import UserError
from dualhead.recipe import load_recipe, parse_recipe
from dualhead.runs import read_entries, standings
from helpers.e2e import dualhead as command
from helpers.evaluation import Bright
from helpers.plugins import nothing_from_outside

DUSK = '''
from dataclasses import dataclass
from dualhead.evaluation import Measurement, measurements

@measurements.register("{name}")
@dataclass(frozen=True)
class Dusk(Measurement):
    """Images in less and less light."""

    levels = 2
    step: float = 0.25

    def kinds(self):
        return ["early_dusk", "late_dusk"]

    def check(self, image_shape):
        pass

    def render(self, image, kind, level, key):
        return (image * (1 - self.step * level * (2 if kind == "late_dusk" else 1))).astype("uint8")

    def facts(self, image_shape):
        return {{"name": "images at dusk", "step": self.step}}
'''


X = torch.full((8, 1, 4, 4), 200, dtype=torch.uint8)
Y = torch.ones(8, dtype=torch.int64)
"""200 of 255 are bright; three quarters of it are, half of it is not."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(textwrap.dedent(DUSK.format(name="dusk")))
    with nothing_from_outside():
        yield tmp_path


def measure(*attacks, **options):
    asked = {"threat": "Linf:8/255", "attacks": list(attacks), "diagnostics": False}
    return dualhead.evaluate(Bright(), X, Y, **asked, **options)


def test_it_is_counted_by_name_and_by_address(folder):
    by_address = measure("fgsm", "mine.py:Dusk").results
    assert by_address["dusk"]["kinds"]["early_dusk"]["severities"] == [1.0, 0.0]
    assert by_address["dusk"]["kinds"]["late_dusk"]["severities"] == [0.0, 0.0]
    assert by_address["dusk"]["accuracy"] == 0.25
    assert by_address["robust_accuracy"].keys() == {"fgsm", "worst"}
    assert measure("dusk").results["dusk"] == by_address["dusk"]
    assert [source["file"] for source in by_address["environment"]["plugins"]] == [str(folder / "mine.py")]


def test_its_settings_are_part_of_what_is_kept(folder):
    mild = {"name": "mine.py:Dusk", "step": 0.1}
    first = measure("mine.py:Dusk", output_dir=folder / "found").results["dusk"]
    second = measure(mild, output_dir=folder / "found").results["dusk"]
    assert (first["accuracy"], second["accuracy"]) == (0.25, 0.75)
    assert second == measure(mild).results["dusk"]


def test_another_version_of_its_file_is_refused_beside_earlier_results(folder):
    with nothing_from_outside():
        measure("mine.py:Dusk", output_dir=folder / "found")
    (folder / "mine.py").write_text((folder / "mine.py").read_text().replace("less and less", "more and more"))
    with nothing_from_outside(), pytest.raises(UserError, match="holds results of dusk with another version of"):
        measure("mine.py:Dusk", output_dir=folder / "found")


def test_a_name_of_the_results_is_refused(folder):
    (folder / "other.py").write_text(textwrap.dedent(DUSK.format(name="curve")))
    with pytest.raises(UserError, match=r"curve is a key of results\.json; register it by another name"):
        measure("other.py:Dusk")


def test_a_recipe_keeps_an_address_that_holds_anywhere(folder, monkeypatch):
    recipe = load_recipe("digits", ["evaluate.attacks=[pgd-5, mine.py:Dusk]"])
    assert recipe.resolved()["evaluate"]["attacks"] == ["pgd-5", {"name": f"{folder / 'mine.py'}:Dusk"}]
    monkeypatch.chdir("/")
    assert set(parse_recipe(recipe.resolved()).evaluate.asked.measurements) == {"dusk"}


def test_tables_and_pairs_have_it(folder):
    for name, step in (("a", 0.25), ("b", 0.1)):
        measure("fgsm", {"name": "mine.py:Dusk", "step": step}, output_dir=folder / name)
    rows = standings(read_entries([folder / "a", folder / "b"]))["rows"]
    assert [row["dusk"]["accuracy"] for row in rows] == [0.25, 0.75]
    found = standings(read_entries([folder / "a", folder / "b"]))
    assert "dusk" not in {pair["accuracy"] for pair in found["pairs"]}  # of different renderings
    measure("fgsm", "mine.py:Dusk", output_dir=folder / "c")
    (pair,) = (
        pair for pair in standings(read_entries([folder / "a", folder / "c"]))["pairs"] if pair["accuracy"] == "dusk"
    )
    assert pair["difference"] == 0
    page = command("report", folder / "a", folder / "c", "-o", folder / "page.html")
    assert page.status == 0
    text = (folder / "page.html").read_text("utf-8")
    assert "images at dusk, step of 0.25, means over 2 severities" in text
    assert "late dusk" in text
    assert "dusk, points" in text


@pytest.mark.parametrize("asked", ["dusk", "mine.py:Dusk"])
def test_the_command_line_prints_it(folder, asked):
    (folder / "net.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    ended = command(
        "evaluate", "net.py:make", "--data", "digits", "--threat", "Linf:0.1",
        "--plugin", "mine.py", "--attack", "fgsm", "--attack", asked, "--limit", "20", "--output", folder / "found",
    )  # fmt: skip
    assert ended.status == 0, ended.err
    assert "images at dusk, step of 0.25, means over 2 severities" in " ".join(ended.out.split())
    told = json.loads((folder / "found" / "results.json").read_text())["dusk"]
    assert f"{100 * told['accuracy']:.1f}" in ended.out
    assert np.isfinite(told["interval"]).all()


def test_it_is_listed(folder):
    ended = command("list", "measurements", "--plugin", "mine.py")
    assert ended.status == 0
    assert "corruptions" in ended.out
    assert "dusk" in ended.out
    assert "mine.py" in ended.out
