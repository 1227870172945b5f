"""Weights of the user's own as head 1: as the field publishes them, with their normalisation, and for other classes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dualhead.errors import UserError
from dualhead.heads import attach_second_head
from dualhead.models import (
    Normalize,
    Wrapped,
    at_hand,
    backbones,
    describe_given,
    last_layer,
    load_state,
    normalisation_in,
    write_state,
)
from dualhead.saving.architecture import Architecture, read_config
from dualhead.saving.export import _of_one_head
from dualhead.saving.models import class_names_of, load, load_base_weights, normalisation_of, save, save_model, view
from helpers.published import CASES, state_for, wideresnet_table

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def plan(backbone, classes=10, at=None, mean=(0.0,) * 3, std=(1.0,) * 3, shape=(3, 32, 32)):
    described = backbones.describe(backbones.build(backbone))
    return Architecture(
        backbone=described, attach_at=at, aggregator={"name": "mean"} if at else None, num_classes=classes,
        image_shape=shape, mean=mean, std=std,
    )  # fmt: skip


def reference(state, backbone="wideresnet-10-1", mean=(0.0,) * 3, std=(1.0,) * 3):
    """The plain network with these weights."""
    model = backbones.build(backbone).create(10, (3, 32, 32), Normalize(mean, std)).eval()
    load_state(model, state, "reference")
    return model


# ---- published layouts, into a dual-head model


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("sub_block", [False, True])
def test_a_published_wideresnet_becomes_head_1(tmp_path, prefix, sub_block):
    state = state_for(wideresnet_table(10, 1, 10))
    if sub_block:  # as TRADES' files have it
        state |= {f"sub_{name}": tensor for name, tensor in state.items() if name.startswith("block1.")}
    torch.save({"state_dict": {prefix + name: tensor for name, tensor in state.items()}}, tmp_path / "w.pt")
    architecture = plan("wideresnet-10-1", at="block1")
    model = architecture.create().eval()
    before = torch.get_rng_state()
    load_base_weights(model, tmp_path / "w.pt", architecture)
    assert torch.equal(torch.get_rng_state(), before)
    expected = reference(state_for(wideresnet_table(10, 1, 10)))
    torch.testing.assert_close(view(model, "head1")(IMAGES), expected(IMAGES))


@pytest.mark.slow
def test_the_layout_of_trades_wrn_34_10_loads_as_head_1(tmp_path):
    state = state_for(CASES["wideresnet-34-10"])
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "model_cifar_wrn.pt")
    architecture = plan("wideresnet-34-10", at="block1")
    model = architecture.create().eval()
    load_base_weights(model, tmp_path / "model_cifar_wrn.pt", architecture)
    torch.testing.assert_close(
        view(model, "head1")(IMAGES[:1]), reference(state, "wideresnet-34-10")(IMAGES[:1]), rtol=1e-4, atol=1e-4
    )


# ---- normalisation in the file


def carrying(state, names=("mu", "sigma"), shape=(1, 3, 1, 1), prefix=""):
    buffers = dict(zip(names, (torch.tensor(MEAN).reshape(shape), torch.tensor(STD).reshape(shape)), strict=True))
    return buffers | {prefix + name: tensor for name, tensor in state.items()}


FORMS = [
    {},
    {"shape": (3, 1, 1)},
    {"shape": (3,)},
    {"names": ("mean", "std")},
    {"names": ("normalize.mean", "normalize.std"), "prefix": "model."},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("at", [None, "block1"])
def test_a_normalisation_in_the_file_is_recognised(tmp_path, form, at):
    state = state_for(wideresnet_table(10, 1, 10))
    torch.save(carrying(state, **form), tmp_path / "w.pt")
    mean, std = normalisation_of(tmp_path / "w.pt")
    assert (mean, std) == (pytest.approx(MEAN), pytest.approx(STD))
    architecture = plan("wideresnet-10-1", at=at, mean=mean, std=std)
    model = architecture.create().eval()
    load_base_weights(model, tmp_path / "w.pt", architecture)
    expected = reference(state, mean=MEAN, std=STD)(IMAGES)
    torch.testing.assert_close(view(model, "head1" if at else "model")(IMAGES), expected)


@pytest.mark.parametrize("config", ['{"architectures": ["ResNet"]}', "no JSON", "[1]"])
def test_a_config_of_another_library_beside_the_weights_says_nothing(tmp_path, config):
    write_state(carrying(state_for(wideresnet_table(10, 1, 10))), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    for place in (tmp_path, tmp_path / "model.safetensors"):
        assert normalisation_of(place)[0] == pytest.approx(MEAN)


def test_a_model_that_normalises_otherwise_is_told_what_would_be_right():
    state = carrying(state_for(wideresnet_table(10, 1, 10)))
    for mean, std in [((0.0,) * 3, (1.0,) * 3), (MEAN, (0.2471, 0.2435, 0.25))]:
        model = plan("wideresnet-10-1", mean=mean, std=std).create()
        with pytest.raises(UserError, match=r"set model.normalize: \{mean: \[0.4914, 0.4822, 0.4465\], std: \[0.2471"):
            load_state(model, state, "w.pt")


class Standardised(nn.Module):
    """Has statistics of its own, under names that a normalisation in front of a model goes by."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 10)
        self.register_buffer("mean", torch.full((4,), 0.5))
        self.register_buffer("std", torch.full((4,), 0.3))

    def forward(self, x):
        return self.fc((x.mean((2, 3)) - self.mean) / self.std)


def test_a_models_own_mean_and_std_are_loaded_also_within_a_wrapper():
    weights = Standardised().state_dict() | {"mean": torch.full((4,), 0.1)}
    for given in (weights, {f"model.{name}": tensor for name, tensor in weights.items()}):
        model = Wrapped(Normalize.identity(4), Standardised())
        load_state(model, given, "w.pt")
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.model.state_dict().items())


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        (torch.zeros(1, 3, 2, 1), torch.ones(3), "mu should hold one number per channel"),
        (torch.zeros(3), torch.ones(()), "sigma should hold one number per channel"),
        (torch.zeros(3), torch.zeros(3), "std must be greater than 0"),
        (torch.zeros(3), torch.ones(1), "a mean and a std per channel"),
        (torch.full((3,), torch.nan), torch.ones(3), "must be finite"),
    ],
)
def test_buffers_that_are_no_normalisation_are_refused(mean, std, words):
    with pytest.raises(UserError, match=words) as caught:
        normalisation_in({"mu": mean, "sigma": std}, "w.pt")
    assert str(caught.value).startswith("w.pt: ")


def test_an_exported_model_tells_its_normalisation(tmp_path):
    architecture = plan("wideresnet-10-1", mean=MEAN, std=STD)
    save_model(tmp_path, architecture.create(), architecture, {})
    assert normalisation_of(tmp_path) == (MEAN, STD)


# ---- other classes

LAST = {
    "wideresnet-10-1": "fc",
    "resnet-18": "linear",
    "preactresnet-18": "linear",
    "cnn-8": "fc",
    "hf:resnet": "model.classifier.1",
}


@pytest.mark.parametrize(
    "backbone", [pytest.param(b, marks=pytest.mark.slow if b.startswith("hf:") else ()) for b in LAST]
)
def test_the_last_layer_is_found(backbone):
    if backbone.startswith("hf:"):
        pytest.importorskip("transformers")
    for classes in (10, 64):  # 64: so many outputs has a hidden layer too
        model = plan(backbone, classes).create()
        assert last_layer(model, classes, (3, 32, 32)) == LAST[backbone]


@pytest.mark.parametrize("at", [None, "stage1"])
@pytest.mark.parametrize("classes", [10, 4])
@pytest.mark.parametrize("which", [True, "fc"])
def test_all_but_the_classifier_is_taken(tmp_path, at, classes, which):
    source, target = plan("cnn-8", 10), plan("cnn-8", classes, at)
    published = source.create()
    save_model(tmp_path, published, source, {})
    model = target.create()
    fresh = {name: t.clone() for name, t in (model.base_state_dict() if at else model.state_dict()).items()}
    load_base_weights(model, tmp_path, target, replace_classifier=which)
    found = model.base_state_dict() if at else model.state_dict()
    for name, tensor in found.items():
        expected = fresh[name] if name.startswith("fc.") else published.state_dict()[name]
        assert torch.equal(tensor, expected), name
        assert not name.startswith("fc.weight") or not torch.equal(tensor, published.state_dict()[name][:classes])


def test_without_being_asked_other_classes_are_refused(tmp_path):
    save_model(tmp_path, plan("cnn-8").create(), plan("cnn-8"), {})
    target = plan("cnn-8", 4, "stage1")
    with pytest.raises(UserError, match=r"of another shape \(fc.weight is"):
        load_base_weights(target.create(), tmp_path, target)


def test_all_else_stays_strict_when_the_classifier_is_replaced(tmp_path):
    save_model(tmp_path, plan("cnn-16").create(), plan("cnn-16"), {})
    target = plan("cnn-8", 4)
    with pytest.raises(UserError, match="of another shape"):
        load_base_weights(target.create(), tmp_path, target, replace_classifier=True)
    with pytest.raises(UserError, match="has no layer 'head'"):
        load_base_weights(target.create(), tmp_path, target, replace_classifier="head")


def test_a_dual_head_model_gives_its_trunk_and_head_1(tmp_path):
    source, target = plan("cnn-8", 10, "stage1"), plan("cnn-8", 4, "stage1")
    save_model(tmp_path, source.create(), source, {"output": "aggregate"})
    model = target.create()
    load_base_weights(model, tmp_path, target, replace_classifier=True)
    published = load(tmp_path)
    for name, tensor in published.base_state_dict().items():
        assert name.startswith("fc.") or torch.equal(model.base_state_dict()[name], tensor)


def test_a_dual_head_model_of_many_classes_and_heads_gives_its_trunk_to_one_of_few(tmp_path):
    source = plan("cnn-8", 30, "stage1").model_copy(update={"heads": 3, "aggregator": {"name": "pairwise_shared"}})
    target = plan("cnn-8", 4, "stage1")
    save_model(tmp_path, source.create(), source, {"output": "aggregate"})
    model = target.create()
    load_base_weights(model, tmp_path, target, replace_classifier=True)
    published = load(tmp_path).base_state_dict()
    for name, tensor in model.base_state_dict().items():
        assert name.startswith("fc.") or torch.equal(published[name], tensor)


@pytest.mark.slow
def test_weights_of_a_wrapped_model_go_without_its_prefix(tmp_path):
    pytest.importorskip("transformers")
    architecture = plan("hf:resnet", 10, "model.resnet.encoder.stages.0")
    plain = architecture.plain()
    torch.save(plain.model.state_dict(), tmp_path / "w.pt")
    model = architecture.create()
    load_base_weights(model, tmp_path / "w.pt", architecture)
    assert all(torch.equal(model.base_state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    other = plan("hf:resnet", 4, "model.resnet.encoder.stages.0")
    transferred = other.create()
    load_base_weights(transferred, tmp_path / "w.pt", other, replace_classifier=True)
    assert transferred.base_state_dict()["model.classifier.1.weight"].shape[0] == 4


def test_of_a_network_that_came_with_its_heads_trunk_and_head_1_are_filled(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))
    given = attach_second_head(network, "1", example=torch.rand(2, 3, 8, 8))
    architecture = plan("resnet-18", 4, "1", shape=(3, 8, 8)).model_copy(update={"backbone": describe_given(given)})
    weights = {name: tensor + 1 for name, tensor in network.state_dict().items()}
    torch.save(weights, tmp_path / "w.pt")
    torch.save({**weights, "odd": torch.zeros(1)}, tmp_path / "odd.pt")
    with at_hand(lambda: given):
        model = architecture.create()
        assert not load_base_weights(model, tmp_path / "w.pt", architecture)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.base_state_dict().items())
        with pytest.raises(UserError, match=r"odd.pt: the weights do not fit the model: unknown: odd"):
            load_base_weights(model, tmp_path / "odd.pt", architecture)
        with pytest.raises(UserError, match="replace_classifier: this network came with its heads"):
            load_base_weights(model, tmp_path / "w.pt", architecture, replace_classifier=True)
        save_model(tmp_path / "m", model, architecture, {"output": "aggregate"})
        with pytest.raises(UserError, match=r"--output-of head2: the network came with its heads.*'head2'\)"):
            _of_one_head(tmp_path / "m", read_config(tmp_path / "m"), "head2")


def test_names_of_classes_beside_weights_are_read(tmp_path):
    architecture = plan("resnet-18")
    save_model(tmp_path / "m", nn.Linear(1, 1), architecture, {"class_names": ["ape", "cat"]})
    assert class_names_of(tmp_path / "m") == ("ape", "cat")
    assert class_names_of(tmp_path / "m" / "model.safetensors") == ("ape", "cat")
    assert class_names_of(tmp_path / "other.pt") == ()


@pytest.mark.parametrize("form", [nn.Identity(), nn.Flatten(0)])
def test_a_network_of_one_logit_comes_back_with_two_classes(tmp_path, form):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 1), form)
    images = torch.rand(3, 3, 2, 2)
    save(network, tmp_path / "m", example=images)
    again = load(tmp_path / "m", factory=lambda: network)
    with torch.no_grad():
        assert torch.equal(again(images), torch.stack((torch.zeros(3), network(images).flatten()), 1))
