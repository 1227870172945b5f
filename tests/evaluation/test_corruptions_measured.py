"""Common corruptions as an evaluation: counts, seeds, resuming, tables."""

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy import stats

import dualhead
from dualhead.data.corruptions import KINDS, TITLE, corrupt
from dualhead.errors import Interrupted, UserError
from dualhead.evaluation import Measurement, compare
from dualhead.report import write_report
from dualhead.report.comparison import as_records, difference_table
from dualhead.report.sources import read_sources
from dualhead.runs import read_entries, standings
from helpers.evaluation import Bright

THREAT = dualhead.ThreatModel("Linf", 8 / 255)
X = (torch.rand(10, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
Y = torch.arange(10) % 2


def measure(attacks=("corruptions",), **options):
    return dualhead.evaluate(Bright(), X, Y, threat=THREAT, attacks=list(attacks), diagnostics=False, **options)


def test_accuracies_are_those_of_the_corrupted_images():
    found = measure(seed=3).results["corruptions"]
    assert found["name"] == TITLE
    assert found["constants"] == "CIFAR-10-C"
    shares = {}
    for kind in KINDS:
        worn = [[corrupt(x.numpy(), kind, s, (3, i)) for i, x in enumerate(X)] for s in range(1, 6)]
        classes = np.array([[image.mean() / 255 > 0.5 for image in images] for images in worn])
        shares[kind] = (classes == (Y.numpy() == 1)).mean(1)
        assert found["kinds"][kind]["severities"] == pytest.approx(shares[kind].tolist())
        assert found["kinds"][kind]["accuracy"] == pytest.approx(shares[kind].mean())
    assert found["accuracy"] == pytest.approx(np.mean(list(shares.values())))
    assert found["interval"][0] <= found["accuracy"] <= found["interval"][1]


def test_batches_and_places_do_not_matter_and_the_seed_does():
    whole, pieces, other = measure(), measure(batch_size=8), measure(seed=1)
    assert whole.results["corruptions"] == pieces.results["corruptions"]
    assert whole.results["corruptions"] != other.results["corruptions"]
    as_floats = dualhead.evaluate(
        Bright(), X.flip(0).float() / 255, Y.flip(0), index=torch.arange(10).flip(0), threat=THREAT,
        attacks=["corruptions"], diagnostics=False,
    )  # fmt: skip
    assert as_floats.results["corruptions"]["accuracy"] == pytest.approx(whole.results["corruptions"]["accuracy"])


def test_they_are_no_attack():
    alone, beside = measure(), measure(["fgsm", "corruptions"])
    assert alone.robust_accuracy == {}
    assert set(beside.robust_accuracy) == {"fgsm", "worst"}
    assert beside.robust_accuracy["worst"] == beside.robust_accuracy["fgsm"]
    assert beside.results["corruptions"] == alone.results["corruptions"]
    with pytest.raises(UserError, match="corruptions have no budget"):
        measure(eps=[0.1])
    with pytest.raises(UserError, match="grey or colour"):
        dualhead.evaluate(Bright(), X[:, :2], Y, threat=THREAT, attacks=["corruptions"])


def test_stopped_between_kinds_they_go_on(tmp_path):
    asked = []

    def stop():
        asked.append(None)
        return len(asked) == 5

    with pytest.raises(Interrupted, match="stopped in corruptions"):
        measure(output_dir=tmp_path, stop=stop)
    known = json.loads((tmp_path / "progress" / "facts.json").read_text())
    assert 0 < sum(name.startswith("corruptions") for name in known) < len(KINDS)
    assert measure(output_dir=tmp_path).results["corruptions"] == measure().results["corruptions"]
    assert dualhead.Evaluation.load(tmp_path).results["corruptions"]["kinds"].keys() == set(KINDS)


def test_compare_has_their_column(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        measure(output_dir=tmp_path / name, seed=seed)
    rows = standings(read_entries([tmp_path / "a", tmp_path / "b"]))["rows"]
    assert len(rows) == 2
    for row in rows:
        assert row["corruptions"]["name"] == TITLE
        assert row["robust_accuracy"] == {}


def test_the_report_has_them_by_kind(tmp_path):
    measure(["fgsm", "corruptions"], output_dir=tmp_path / "a")
    page = write_report([tmp_path / "a"], tmp_path / "report.html").read_text()
    assert f"{TITLE}, constants of CIFAR-10-C, means over 5 severities" in page
    assert "glass blur" in page
    assert "corruptions %" in page


def test_which_corrupted_images_are_right_is_kept_image_by_image(tmp_path):
    told = measure(output_dir=tmp_path).results["corruptions"]
    right = dualhead.Evaluation.load(tmp_path).measured["corruptions"]
    assert right.shape == (10, len(KINDS), 5)
    assert right.dtype == np.bool_
    assert right.mean() == pytest.approx(told["accuracy"])
    for number, kind in enumerate(KINDS):
        assert right[:, number].mean(0) == pytest.approx(told["kinds"][kind]["severities"])


def test_under_several_threats_they_are_measured_once(tmp_path):
    asked = {"threat": ["Linf:8/255", "L2:0.5"], "diagnostics": False}
    two = dualhead.evaluate(Bright(), X, Y, attacks=["corruptions", "fgsm"], output_dir=tmp_path, **asked)
    assert two.results["corruptions"] == measure().results["corruptions"]
    assert set(two.robust_accuracy) == {"fgsm@Linf", "fgsm@L2", "worst"}
    assert dualhead.Evaluation.load(tmp_path).measured["corruptions"].mean() == pytest.approx(
        two.results["corruptions"]["accuracy"]
    )
    parts = [dualhead.Evaluation.load(folder) for folder in sorted((tmp_path / "threats").iterdir())]
    assert sum("corruptions" in part.results for part in parts) == 1
    with pytest.raises(UserError, match="corruptions are of no threat; name one alone, or an attack too"):
        dualhead.evaluate(Bright(), X, Y, attacks=["corruptions"], **asked)


@pytest.mark.parametrize(
    ("attacks", "message"),
    [
        (["corruption"], "attacks.0: unknown attack 'corruption'; did you mean 'corruptions'"),
        (["corruptions", "corruptions"], "attacks.1: corruptions is named twice"),
        ([{"name": "corruptions", "severity": 3}], "attacks.0.severity: .*has no such key"),
        (["fgsm", "fgsm"], "attacks.1: fgsm is named twice"),
    ],
)
def test_what_is_misnamed_is_told_with_its_place(attacks, message):
    with pytest.raises(UserError, match=message):
        measure(attacks)


def test_another_measurement_needs_no_more_than_its_class():
    """Whoever declares one is measured, kept and told like the corruptions."""

    @dataclass(frozen=True)
    class Shades(Measurement):
        levels: ClassVar[int] = 3

        def kinds(self):
            return ("darker", "brighter")

        def check(self, image_shape):
            pass

        def render(self, image, kind, level, key):
            by = 40 * level * (-1 if kind == "darker" else 1)
            return (image.astype(int) + by).clip(0, 255).astype(np.uint8)

        def facts(self, image_shape):
            return {"name": "shades"}

    Shades.registered_name = "shades"
    found = measure([Shades(), "fgsm"])
    assert found.measured["shades"].shape == (10, 2, 3)
    assert found.results["shades"]["kinds"].keys() == {"darker", "brighter"}
    assert found.results["shades"]["name"] == "shades"
    for level in (1, 2, 3):
        dark = (X.int() - 40 * level).clamp(0, 255).float().div(255).mean((1, 2, 3)) > 0.5
        assert found.measured["shades"][:, 0, level - 1].tolist() == (dark.int() == Y).tolist()


# ---- two classifiers


class Darker(Bright):
    """Class 1 for images that are not quite so bright."""

    def forward(self, x):
        return super().forward(x + 0.01)


def pairs_of(*places):
    return {pair["accuracy"]: pair for pair in standings(read_entries(list(places)))["pairs"]}


def test_two_classifiers_are_paired_over_images(tmp_path):
    asked = {"threat": THREAT, "attacks": ["corruptions"], "diagnostics": False}
    models = {"a": Bright(), "b": Darker()}
    a, b = (dualhead.evaluate(model, X, Y, output_dir=tmp_path / name, **asked) for name, model in models.items())
    gained = b.measured["corruptions"].mean((1, 2)) - a.measured["corruptions"].mean((1, 2))
    error = gained.std(ddof=1) / np.sqrt(10)
    assert error > 0
    pair = pairs_of(tmp_path / "a", tmp_path / "b")["corruptions"]
    assert pair["difference"] == pytest.approx(gained.mean())
    assert pair["interval"] == pytest.approx([gained.mean() - 1.959964 * error, gained.mean() + 1.959964 * error])
    assert pair["p_value"] == pytest.approx(2 * stats.norm.sf(abs(gained.mean()) / error))
    assert pair["test"] == "paired z, over images"
    back = pairs_of(tmp_path / "b", tmp_path / "a")["corruptions"]
    assert (back["difference"], back["p_value"]) == pytest.approx((-pair["difference"], pair["p_value"]))
    same = compare(tmp_path / "a", tmp_path / "a")["corruptions"]
    assert (same.difference, same.p_value, same.verdict) == (0.0, 1.0, "undecided")
    assert compare(tmp_path / "a", tmp_path / "b")["corruptions"].p_value == pytest.approx(pair["p_value"])


def test_the_order_of_samples_does_not_matter_to_the_pair(tmp_path):
    measure(output_dir=tmp_path / "a")
    asked = {"threat": THREAT, "attacks": ["corruptions"], "diagnostics": False}
    dualhead.evaluate(Darker(), X, Y, output_dir=tmp_path / "b", **asked)
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    dualhead.evaluate(Darker(), X[order], Y[order], index=order, output_dir=tmp_path / "c", **asked)
    one, other = (pairs_of(tmp_path / "a", tmp_path / name)["corruptions"] for name in "bc")
    assert one["verdict"] == other["verdict"]
    for key in ("difference", "interval", "p_value"):
        assert one[key] == pytest.approx(other[key])


def test_the_report_pairs_them_too(tmp_path):
    measure(["fgsm", "corruptions"], output_dir=tmp_path / "a")
    asked = {"threat": THREAT, "attacks": ["fgsm", "corruptions"], "diagnostics": False}
    dualhead.evaluate(Darker(), X, Y, output_dir=tmp_path / "b", **asked)
    pair = pairs_of(tmp_path / "a", tmp_path / "b")["corruptions"]
    table = difference_table(read_sources([tmp_path / "a", tmp_path / "b"]))
    assert table.columns == ["model", "compared with", "clean, points", "robust, points", "corruptions, points"]
    ((*_, cell),) = table.rows
    assert cell.order == pytest.approx(pair["difference"])
    assert "undecided" in cell.note
    (record, _) = as_records([row for source in read_sources([tmp_path / "a", tmp_path / "b"]) for row in source.rows])
    assert record["corruptions low"] <= record["corruptions"] <= record["corruptions high"]
    page = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "report.html").read_text()
    assert "of changed images a z-test over images" in page


def test_results_that_do_not_hold_the_images_are_told_and_not_paired(tmp_path):
    for name in "ab":
        measure(["fgsm", "corruptions"], output_dir=tmp_path / name)
    with np.load(tmp_path / "b" / "samples.npz") as stored:
        kept = {key: stored[key] for key in stored.files if not key.startswith("measured_")}
    np.savez(tmp_path / "b" / "samples.npz", **kept)
    found = standings(read_entries([tmp_path / "a", tmp_path / "b"]))
    assert {pair["accuracy"] for pair in found["pairs"]} == {"clean", "fgsm", "worst"}
    (note,) = found["notes"]
    assert "do not hold which changed images are right, so that corruptions are not compared" in note
