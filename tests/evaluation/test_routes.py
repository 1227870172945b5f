"""Routes of tied heads: what each is made of, what is measured of it, and how far apart two are."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

from dualhead.errors import UserError
from dualhead.evaluation import KINDS, RouteSetting, evaluate, evaluate_routes, parse_kinds
from dualhead.heads import Route, attach_second_head, between, image_gaps, routes_of, stored_gaps, through
from dualhead.heads.tied import STATISTICS, tensors_by_name
from dualhead.models import Normalize, backbones
from dualhead.report import route_rows
from dualhead.threats import ThreatModel

X = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 4


def tied(own=("batch_norm",), norm=None, at="input"):
    """Tied heads whose own tensors differ."""
    torch.manual_seed(0)
    spec = "cnn-4" if norm is None else {"name": "with_norm", "backbone": "cnn-4", "norm": norm}
    base = backbones.build(spec).create(4, (3, 8, 8), Normalize.identity(3))
    base.train()
    for _ in range(3):
        base(torch.rand(16, 3, 8, 8))
    dual = attach_second_head(base, at, example=X, init="tied", own=list(own), aggregator="mean")
    with torch.no_grad():
        for name in sorted(dual.own_of_tied):
            tensor = tensors_by_name(dual.head2)[name]
            if tensor.is_floating_point():
                tensor.mul_(1.3).add_(0.05)
    return dual.eval()


@pytest.mark.parametrize("at", ["input", "stage1"])
def test_a_route_is_a_network_with_the_statistics_of_one_head_and_the_rest_of_another(at):
    dual = tied(at=at)
    for route in routes_of(dual):
        made, state = through(dual, route), dict(dual.base_state_dict(route.affine))
        theirs = dual.base_state_dict(route.statistics)
        state |= {name: tensor for name, tensor in theirs.items() if name.rpartition(".")[2] in STATISTICS}
        plain = backbones.build("cnn-4").create(4, (3, 8, 8), Normalize.identity(3)).eval()
        plain.load_state_dict(state)
        assert torch.allclose(made(X), plain(X), atol=1e-6), route
    assert torch.equal(through(dual, Route("head2", "head2"))(X), dual.view("head2")(X))


@pytest.mark.parametrize(
    ("own", "norm", "count"),
    [(("batch_norm",), None, 4), (("affine",), None, 2), (("statistics",), None, 2), (("affine",), "group", 2)],
)
def test_routes_that_are_one_are_listed_once(own, norm, count):
    dual = tied(own, norm)
    routes = routes_of(dual)
    assert len(routes) == count
    logits = [through(dual, route)(X) for route in routes]
    assert all(not torch.allclose(a, b) for i, a in enumerate(logits) for b in logits[:i])


def test_what_lies_between_two_heads_ends_at_them():
    dual = tied()
    for t, head in ((0.0, "head1"), (1.0, "head2")):
        assert torch.allclose(between(dual, "head1", "head2", t, [])(X), dual.view(head)(X), atol=1e-5)
    halfway = between(dual, "head1", "head2", 0.5, [])
    name = next(name for name in sorted(dual.own_of_tied) if name.endswith("weight"))
    one, other = (tensors_by_name(dual.get_submodule(head))[name] for head in ("head1", "head2"))
    assert torch.allclose(tensors_by_name(halfway.head)[name], (one + other) / 2)


def test_statistics_between_two_heads_are_those_of_the_images():
    dual = tied()
    made = between(dual, "head1", "head2", 0.5, [X[:6], X[6:]])
    first = next(layer for layer in made.modules() if isinstance(layer, nn.BatchNorm2d))
    seen = []
    hook = first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    made(X)
    hook.remove()
    assert torch.allclose(first.running_mean, seen[0].mean((0, 2, 3)), atol=1e-5)
    assert first.momentum == 0.1
    assert not first.training


def test_gaps_are_of_channels_and_not_of_their_distribution():
    dual = tied()
    with torch.no_grad():
        for head in (dual.head1, dual.head2):
            for layer in head.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.running_var.fill_(1.0)
                    values = torch.arange(len(layer.running_mean), dtype=torch.float32)
                    layer.running_mean.copy_(values if head is dual.head1 else values.flip(0))
    gaps = stored_gaps(dual, "head1", "head2")
    assert all(max(gap["mean"]) > 2.0 for gap in gaps.values())  # a permutation: the distributions are one
    assert all(max(gap["log_sigma"]) == 0.0 for gap in gaps.values())
    assert all(set(gap) == {"mean", "log_sigma", "weight", "bias"} for gap in gaps.values())


def test_gaps_of_images_are_moments_of_what_batch_norm_sees():
    model = through(tied(), Route("head1", "head1"))
    same = image_gaps(model, [X[:5], X[5:]], [X])
    assert all(max(gap["mean"]) < 1e-5 and max(gap["log_sigma"]) < 1e-5 for gap in same.values())
    twice = image_gaps(model, [X], [2 * X])
    first = twice[next(iter(twice))]
    assert torch.allclose(torch.tensor(first["log_sigma"]), torch.tensor(2.0).log(), atol=1e-3)


def test_all_of_it_is_measured_told_and_not_measured_again(tmp_path):
    dual = tied()
    before = copy.deepcopy(dual.state_dict())
    setting = RouteSetting(
        ThreatModel("Linf", 8 / 255), ["pgd-1", "multihead-1"], "head1", "head2", batch_size=8,
        options={"diagnostics": False},
    )  # fmt: skip
    found = evaluate_routes(dual, X, Y, setting, output_dir=tmp_path, estimate_on=lambda: X)
    assert set(found) >= set(KINDS) - {"own", "crossed"} | {"routes", "warning"}
    assert set(found["routes"]) == {
        "head1", "head2", "statistics-head1_affine-head2", "statistics-head2_affine-head1",
    }  # fmt: skip
    assert set(found["merged"]) == {"mean", "mixed_nuts"}
    assert all("multihead" in "".join(merged["robust_accuracy"]) for merged in found["merged"].values())
    assert all(set(route["robust_accuracy"]) == {"pgd-1", "worst"} for route in found["routes"].values())
    assert [point["t"] for point in found["curve"]] == [0.25, 0.5, 0.75]
    judged = found["transfer"]["accuracy"]
    assert set(judged) == set(found["routes"])
    assert all(set(row) == {*found["routes"], "mean"} for row in judged.values())
    assert set(found["gaps"]) == {"stored", "images"}
    stored = found["gaps"]["stored"]["layers"]
    for head in ("head1", "head2"):  # one row a layer, whatever is told of it
        assert set(stored) == {path for path in found["gaps"]["images"][head]["layers"] if "trunk" not in path}
    assert all(torch.equal(before[name], tensor) for name, tensor in dual.state_dict().items())
    held = json.loads((tmp_path / "routes.json").read_text())
    fewer = dataclasses.replace(setting, kinds=("own",))
    again = evaluate_routes(dual, X, Y, fewer, output_dir=tmp_path)
    assert again["routes"] == held["routes"]
    assert again["gaps"] == held["gaps"]
    with torch.no_grad():
        dual.head1.fc.bias.add_(1.0)
    other = evaluate_routes(dual, X, Y, dataclasses.replace(setting, kinds=("gaps",)), output_dir=tmp_path)
    assert "curve" not in other  # of other weights
    images = evaluate_routes(dual, 1 - X, Y, dataclasses.replace(setting, kinds=("transfer",)), output_dir=tmp_path)
    assert "gaps" not in images  # of other images


def test_corruptions_are_measured_through_each_route(tmp_path):
    asked = {"batch_size": 8, "options": {"diagnostics": False}}
    setting = RouteSetting(
        ThreatModel("Linf", 8 / 255), ["fgsm", "corruptions"], "head1", "head2", kinds=("own", "merged"), **asked
    )
    found = evaluate_routes(tied(), X, Y, setting, output_dir=tmp_path)
    rows = route_rows(found)
    assert {row["name"] for row in rows} >= {"clean route (head1)", "robust route (head2)", "merged: mean"}
    assert all(0 <= row["corruptions"]["accuracy"] <= 1 for row in rows)
    assert all("corruptions" not in row["robust_accuracy"] for row in rows)
    for head in ("head1", "head2"):
        alone = evaluate(tied().view(head), X, Y, threat="Linf:8/255", attacks=["corruptions"], diagnostics=False)
        assert found["routes"][head]["corruptions"] == alone.results["corruptions"]


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="write all, or some of own, crossed"):
        parse_kinds("own,nothing")
    assert parse_kinds("gaps, own") == ("own", "gaps")
    setting = RouteSetting(ThreatModel("Linf", 8 / 255), ["pgd-1"], "head1", "head3")
    with pytest.raises(UserError, match="'head3' is no head"):
        evaluate_routes(tied(), X, Y, setting, output_dir=tmp_path)
    setting = RouteSetting(ThreatModel("Linf", 8 / 255), ["pgd-1"], "head1", "head2", ("curve",))
    with pytest.raises(UserError, match="estimates statistics of batch norm on training images"):
        evaluate_routes(tied(), X, Y, setting, output_dir=tmp_path)
    base = backbones.build("cnn-4").create(4, (3, 8, 8), Normalize.identity(3))
    apart = attach_second_head(base, "stage1", example=X, aggregator="mean")
    with pytest.raises(UserError, match="are not tied"):
        routes_of(apart)
