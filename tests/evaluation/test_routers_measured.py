"""Routers beside their controls: what is measured, that each is attacked by itself, and the oracle and the best one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dualhead.errors import UserError
from dualhead.evaluation import Evaluation, RouterSetting, evaluate_routers
from dualhead.evaluation.routers import evenly
from dualhead.heads import DualHeadClassifier, attach_second_head
from dualhead.models import Normalize, backbones
from dualhead.report import router_lines, router_rows
from dualhead.threats import ThreatModel

THREATS = [ThreatModel("Linf", 0.1), ThreatModel("L2", 0.5)]


def classifier(aggregator="after_dder-2") -> DualHeadClassifier:
    torch.manual_seed(0)
    base = backbones.build("cnn-4").create(4, (1, 8, 8), Normalize([0.5], [0.25]))
    dual = attach_second_head(base, "stage1", example=torch.rand(2, 1, 8, 8), aggregator=aggregator).eval()
    for name in dual.routers:
        dual.part(name).trained.fill_(1)
    return dual


def measured(folder, threats=THREATS, attacks=("pgd-3", "multihead-1", "steered-1"), **settings):
    dual = classifier()
    x = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = dual(x).argmax(1)
    y[:4] = (y[:4] + 1) % 4
    setting = RouterSetting(threats, attacks, batch_size=8, options={"diagnostics": False}, **settings)
    return evaluate_routers(dual, x[:16], y[:16], setting, held_out=(x[16:], y[16:]), output_dir=folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routers")
    return folder, measured(folder)


def right(folder, name, threat):
    columns = Evaluation.load(folder / name).correct
    return np.logical_and.reduce([columns["clean"], *(c for n, c in columns.items() if n.endswith(f"@{threat}"))])


def test_each_is_attacked_through_itself_under_every_threat(found):
    folder, told = found
    assert told == json.loads((folder / "routers.json").read_text())
    assert told["attacks"] == [f"{a}@{t}" for t in ("Linf", "L2") for a in ("pgd-3", "multihead-1", "steered-1")]
    for name, of in {"deployed": told["deployed"], "uniform": told["uniform"], **told["routers"]}.items():
        columns = {threat: right(folder, name, threat) for threat in ("Linf", "L2")}
        assert of["threats"] == {threat: pytest.approx(column.mean()) for threat, column in columns.items()}
        assert of["union"] == pytest.approx(np.logical_and(*columns.values()).mean())


def test_the_best_fixed_router_is_chosen_on_held_out_images(found):
    folder, told = found
    union = {
        name: np.logical_and(*(right(folder, f"held_out/{name}", t) for t in ("Linf", "L2"))).mean()
        for name in told["routers"]
    }
    best = told["best_fixed"]
    assert best["held_out"] == pytest.approx(union)
    assert union[best["router"]] == max(union.values())
    assert best["union"] == told["routers"][best["router"]]["union"]


def test_the_oracle_takes_a_router_for_each_threat(found):
    folder, told = found
    columns = [right(folder, router, threat) for threat, router in told["oracle"]["router"].items()]
    assert told["oracle"]["union"] == pytest.approx(np.logical_and(*columns).mean())


def test_the_gain_is_that_of_images_both_saw(found):
    _, told = found
    for control, of in (("over_uniform", told["uniform"]), ("over_best_fixed", told["best_fixed"])):
        gain = told["gain"][control]
        assert gain["difference"] == pytest.approx(told["deployed"]["union"] - of["union"])
        assert gain["interval"][0] <= gain["difference"] <= gain["interval"][1]


def test_it_is_told_in_a_row_for_each_and_three_sentences(found):
    _, told = found
    rows = router_rows(told)
    assert [row["name"] for row in rows] == ["deployed", "weighed alike", "router 1", "router 2"]
    assert rows[0]["robust_accuracy"]["worst"] == told["deployed"]["union"]
    assert "a bound and no defence" in " ".join(router_lines(told))


def test_what_lies_there_is_not_computed_again(found, monkeypatch):
    folder, told = found
    monkeypatch.setattr("dualhead.attacks.pgd.PGD.step", None)
    assert measured(folder) == told


def test_one_threat_alone(tmp_path):
    told = measured(tmp_path, THREATS[:1])
    assert told["deployed"]["threats"] == {"Linf": told["deployed"]["union"]}


def test_routers_weighed_alike_are_a_copy():
    dual = classifier()
    x = torch.rand(4, 1, 8, 8)
    before = dual(x)
    alike = evenly(dual)
    each = torch.stack([dual.view(name)(x) for name in dual.routers], 1)
    torch.testing.assert_close(alike(x), each.mean(1))
    assert torch.equal(dual(x), before)


@pytest.mark.parametrize("threats", [THREATS, THREATS[:1]])
def test_attacks_that_all_need_heads_choose_no_router_and_are_refused(tmp_path, threats):
    with pytest.raises(UserError, match="chosen by an attack that needs no heads"):
        measured(tmp_path, threats, ["multihead-1"])


def test_a_model_without_routers_is_refused(tmp_path):
    x, y = torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match="the aggregator of this model has none; after_dder has"):
        evaluate_routers(
            classifier("mean"), x, y, RouterSetting(THREATS, ["pgd-3"]), held_out=(x, y), output_dir=tmp_path
        )
