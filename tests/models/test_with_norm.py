"""Networks with another layer in place of batch norm, and what tied heads own of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dualhead.errors import UserError
from dualhead.heads import Rows, attach_second_head
from dualhead.models import Normalize, backbones, count_parameters

X = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BASES = ("cnn-4", {"name": "wideresnet", "depth": 10, "width": 1, "stem_stride": 2}, "preactresnet-18")


def made(norm, base="cnn-4", **settings):
    torch.manual_seed(0)
    spec = {"name": "with_norm", "backbone": base, "norm": norm, **settings}
    return backbones.build(spec).create(10, (3, 8, 8), Normalize.identity(3))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("norm", ["group", "sandwich", "none"])
def test_each_batch_norm_is_replaced_and_the_rest_starts_as_it_would(norm, base):
    model = made(norm, base)
    torch.manual_seed(0)
    plain = backbones.build(base).create(10, (3, 8, 8), Normalize.identity(3))
    kind = {"group": nn.GroupNorm, "sandwich": nn.BatchNorm2d, "none": nn.Identity}[norm]
    for name, layer in plain.named_modules():
        found = model.get_submodule(name)
        if isinstance(layer, nn.BatchNorm2d):
            assert isinstance(found, kind), name
        elif isinstance(layer, nn.Conv2d):
            assert torch.equal(found.weight, layer.weight), name
    assert model.eval()(X).shape == (6, 10)
    if norm == "sandwich":
        assert torch.allclose(model(X), plain.eval()(X), atol=1e-6)


def test_groups_divide_the_channels():
    assert {m.num_groups for m in made("group", "cnn-6", groups=4).modules() if isinstance(m, nn.GroupNorm)} == {2, 4}


def test_sandwich_shares_the_first_map_and_owns_statistics_and_the_second():
    model = made("sandwich")
    dual = attach_second_head(model, "input", example=X, init="tied", own=["sandwich"], aggregator="mean")
    assert {name.rpartition(".")[2] for name in dual.own_of_tied} == {
        "route_weight", "route_bias", "running_mean", "running_var", "num_batches_tracked",
    }  # fmt: skip
    channels = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert count_parameters(dual) == count_parameters(model) + 2 * channels


def test_the_second_map_follows_the_route_in_a_joint_pass():
    dual = attach_second_head(
        made("sandwich"), "input", example=X, init="tied", own=["*.route_*"], aggregator="mean"
    ).eval()
    with torch.no_grad():
        for module in dual.head2.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.route_weight.mul_(1.5)
                module.route_bias.add_(0.2)
    expected = torch.cat([dual.view("head1")(X[:3]), dual.view("head2")(X[3:])])
    found = dual.heads_together(("head1", "head2"), dual.features(X), Rows((3, 3), (True, True)))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(dual.view("head1")(X), dual.view("head2")(X), atol=1e-2)


def test_bad_input():
    with pytest.raises(UserError, match=r"norm: .*group"):
        backbones.build({"name": "with_norm", "backbone": "cnn-4", "norm": "layer"})
    with pytest.raises(UserError, match="groups must be at least 1"):
        backbones.build({"name": "with_norm", "backbone": "cnn-4", "norm": "group", "groups": 0})
    with pytest.raises(UserError, match="has no batch norm to replace"):
        made("none", {"name": "with_norm", "backbone": "cnn-4", "norm": "none"})


def test_a_second_head_gets_fresh_maps_of_its_own():
    model = made("sandwich")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "route" in name:
                parameter.fill_(2.0)
    head = attach_second_head(model, "stage1", example=X).head2
    fresh = {name: p.unique().tolist() for name, p in head.named_parameters() if "route" in name}
    assert fresh
    assert fresh == {name: [1.0 if name.endswith("weight") else 0.0] for name in fresh}


def test_the_network_inside_says_how_images_are_normalised_and_which_classes_it_has(monkeypatch):
    assert not backbones.build({"name": "with_norm", "backbone": "cnn-4", "norm": "group"}).normalises
    own = backbones.build({"name": "with_norm", "backbone": "some.package:make", "norm": "group"})
    assert own.normalises  # its images are its own to normalise: those of the data came before, a second time
    monkeypatch.setattr(type(own.backbone), "published_class_names", lambda _: ("ape", "cat"))
    monkeypatch.setattr(type(own.backbone), "published_channels", lambda _: 3)
    assert own.published_class_names() == ("ape", "cat")
    assert own.published_channels() == 3
