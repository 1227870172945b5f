"""Common corruptions as an evaluation: counts, seeds, resuming, tables."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import dualhead
from dualhead.commands.compare import read_entries, standings
from dualhead.data.corruptions import KINDS, TITLE, corrupt
from dualhead.errors import Interrupted, UserError
from dualhead.report import write_report

THREAT = dualhead.ThreatModel("Linf", 8 / 255)
X = (torch.rand(10, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
Y = torch.arange(10) % 2


class Bright(nn.Module):
    """Class 1 for bright images."""

    def forward(self, x):
        return torch.stack([x.new_full((len(x),), 0.5), x.mean((1, 2, 3))], 1)


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
    assert "Common corruptions" in page
    assert "glass blur" in page
    assert "corruptions %" in page
