"""Cutting models: by table over the models of transformers, and one small model for each thing that can go wrong."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from dualhead.errors import UserError
from dualhead.heads import attach_second_head, layers, split_model
from dualhead.heads.splitting.base import is_shape_only
from dualhead.system.generators import all_generator_states, seed_generators
from helpers.architectures import ARCHITECTURES, CLASSES, assert_same_function, assert_second_head_trains, examine

FAST = {"ConvNeXt", "ViT", "Swin"}
TABLE = Path(__file__).parents[2] / "docs" / "splitting.md"
IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, id=a.name, marks=() if a.name in FAST else pytest.mark.slow) for a in ARCHITECTURES],
)
def test_models_of_transformers(architecture, place):
    pytest.importorskip("transformers")
    assert examine(architecture, place) in TABLE.read_text().splitlines(), "run tools/make_splitting_table.py"


class Net(nn.Module):
    """A residual network with what makes cutting hard switched on by name.

    Always there: a class-token-like parameter and a buffer of the container, a defaulted argument, dropout by function,
    an operation in place behind the first layer, and a shape taken from the images.
    """

    def __init__(self, *, wants=""):
        super().__init__()
        self.wants = wants
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.token = nn.Parameter(torch.rand(1, 8, 1, 1), requires_grad=wants != "fixed token")
        self.register_buffer("scale", torch.full((1,), 0.7))
        self.drop = nn.Dropout(0.2)
        self.block1 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.block2 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.unused = nn.Linear(2, 2)
        self.fc = nn.Linear(8, CLASSES)
        if wants == "tied weights":
            self.block2[0].weight = self.block1[0].weight

    def forward(self, x, mask=None, *, flag=False):
        if mask is not None or flag:
            raise AssertionError
        batch = x.shape[0]
        if self.wants == "data branch" and x.mean() > 1e6:
            return x
        if self.wants == "random branch" and self.training and torch.rand(()) < 0.5:
            x = x + 1
        x = F.relu_(self.stem(x))
        x = self.drop(self.bn(x)) + self.token.expand(batch, -1, -1, -1) * self.scale
        residual = x
        x = self.block1(x)
        if self.wants == "twice before":
            x = self.block1(x)
        x = F.dropout(x, 0.3, self.training)
        x += residual
        if self.training:
            x = x * 1.5
        residual = x
        x = (self.block1 if self.wants == "twice across" else self.block2)(x) + residual
        x = self.drop(x).flatten(2).mean(2).reshape(batch, 8)
        if self.wants == "token behind":
            x = x + self.token.flatten()
        logits = self.fc(x)
        return {"dict": {"logits": logits}, "tuple": (logits, x)}.get(self.wants, logits)


@pytest.mark.parametrize("wants", ["", "dict", "tuple", "tied weights", "token behind", "fixed token"])
@pytest.mark.parametrize("at", ["stem", "bn", "block1", "block1.0", "block2", "block2.0"])
def test_traced_cuts(wants, at):
    torch.manual_seed(0)
    model = Net(wants=wants)
    split = split_model(model, at, IMAGES)
    assert split.how == "traced"
    assert_same_function(model, split, IMAGES)


@pytest.mark.parametrize("wants", ["data branch", "random branch"])
@pytest.mark.parametrize("at", ["stem", "block1", "block2.0"])
def test_what_cannot_be_traced_is_cut_by_whole_passes_with_a_warning(wants, at):
    model = Net(wants=wants)
    with pytest.warns(UserWarning, match="paid twice"):
        split = split_model(model, at, IMAGES)
    assert split.how == "functional"
    assert_same_function(model, split, IMAGES)
    with pytest.warns(UserWarning, match="paid twice"):
        classifier = attach_second_head(model, at, example=IMAGES, init="clone")
    assert_second_head_trains(classifier, IMAGES)
    assert classifier.state_dict().keys() == copy.deepcopy(classifier).state_dict().keys()


@pytest.mark.parametrize("wants", ["", "data branch"])
@pytest.mark.filterwarnings("ignore:layer")
def test_keys_and_given_model_are_kept(wants):
    model = Net(wants=wants)
    model.bn.eval()  # a mixture of modes
    model.stem.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    split = split_model(model, "block1", IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [p.grad for p in model.parameters()] == [None] * len(list(model.parameters()))
    trunk, tail = split.trunk.state_dict(), split.tail.state_dict()
    assert not trunk.keys() & tail.keys()
    fresh = Net(wants=wants)
    fresh.load_state_dict({**trunk, **tail}, strict=True)
    with torch.no_grad():
        for part in (split.trunk, split.tail):
            for parameter in part.parameters():
                parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Rounded(torch.autograd.Function):
    """Rounds, and hands the gradient straight through."""

    @staticmethod
    def forward(ctx, x):
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class OwnGradient(nn.Module):
    """A network whose forward has something to say about gradients alone.

    Args:
        rule: what it says to features: a function of its own.
        shared: whether a layer runs on both sides of `block1`, which only a trace can cut.
        training: whether it says so in training mode alone.
    """

    def __init__(self, rule, *, shared=False, training=False):
        super().__init__()
        self.rule, self.shared, self.training_only = rule, shared, training
        self.stem, self.block1, self.block2 = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8))
        self.fc = nn.Linear(8, CLASSES)
        self.stored = None

    def forward(self, x):
        x = self.stem(x)
        if self.training or not self.training_only:
            x = self.rule(x)
        x = self.block1(self.block2(x) if self.shared else x).relu()
        self.stored = x
        return self.fc(self.block2(x).mean((2, 3)))


def fixed(x):
    with torch.no_grad():
        return x * 1.0


def halved(x):
    if x.requires_grad:
        x = x * 1.0
        x.register_hook(lambda gradient: gradient / 2)
    return x


def doubled(x):
    return x * 2 if torch.is_grad_enabled() else x


@pytest.mark.parametrize("rule", [Rounded.apply, fixed, halved, doubled], ids=["straight", "fixed", "hook", "enabled"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:layer")
def test_a_cut_model_has_the_models_gradients(rule, training):
    """A trace lays a forward bare, and loses what that says about gradients: attacks would then find nothing."""
    torch.manual_seed(0)
    model = OwnGradient(rule, training=training)
    model.block2.bias.requires_grad_(False)
    split = split_model(model, "block1", IMAGES)
    assert split.how == "functional"
    assert_same_function(model, split, IMAGES)


def test_a_cut_with_other_gradients_is_refused_and_leaves_nothing_behind():
    model = OwnGradient(Rounded.apply, shared=True)
    model.fc.bias.requires_grad_(False)
    with pytest.raises(UserError, match="another gradient with respect to the images in training mode"):
        split_model(model, "block1", IMAGES)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["fc.bias"]
    assert not model.stored.requires_grad and not IMAGES.requires_grad
    copy.deepcopy(model)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:layer")
def test_the_layer_recommended_is_cut_as_it_is_listed(training):
    model = OwnGradient(Rounded.apply, training=training)
    (best,) = (info for info in layers(model, IMAGES) if info.recommended)
    assert split_model(model, best.name, IMAGES).how == best.how == "functional"


@pytest.mark.parametrize("wants", ["", "data branch"])
@pytest.mark.filterwarnings("ignore:layer")
def test_a_forward_that_works_on_its_input_in_place_leaves_the_example_alone(wants):
    class Shifting(Net):
        def forward(self, x):
            return super().forward(x.sub_(0.5))

    torch.manual_seed(0)
    model, example = Shifting(wants=wants).eval(), IMAGES.clone()
    dual = attach_second_head(model, "block1", example=example)
    assert dual.split_how == ("functional" if wants else "traced")
    layers(model, example)
    assert torch.equal(example, IMAGES)
    torch.testing.assert_close(dual.view("head1")(IMAGES.clone()), model(IMAGES.clone()))


class FreezesNorm:
    """Keeps its batch norm in evaluation mode, whatever mode it is in itself."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class FrozenNet(FreezesNorm, Net):
    pass


class FrozenSequential(FreezesNorm, nn.Sequential):
    pass


@pytest.mark.parametrize("how", ["sequential", "traced", "functional"])
@pytest.mark.filterwarnings("ignore:layer")
def test_what_a_model_keeps_in_evaluation_mode_stays_so_in_the_halves(how):
    torch.manual_seed(0)
    model = FrozenNet(wants="data branch" if how == "functional" else "")
    at = "block1"
    if how == "sequential":
        at = "1"
        model = FrozenSequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten(),
            nn.Linear(128, CLASSES),
        )  # fmt: skip
    split = split_model(model, at, IMAGES)
    assert split.how == how
    assert_same_function(model, split, IMAGES)
    dual = attach_second_head(model, at, example=IMAGES, init="clone").train()
    before = copy.deepcopy(dict(dual.named_buffers()))
    dual.head_logits(IMAGES)
    after = dict(dual.named_buffers())
    assert all(torch.equal(after[n], b) for n, b in before.items() if "running" in n and "aggregator" not in n)


def test_several_tensors_cross_a_residual_connection():
    split = split_model(Net(), "block1.0", IMAGES)
    features = split.trunk.eval()(IMAGES)
    assert [f.shape[1:] for f in features if not is_shape_only(f)] == [(8, 8, 8), (8, 8, 8)]


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("at", ["stem", "block1", "block2.0"])
def test_the_batch_may_differ_from_the_examples(batch, at):
    model = Net().eval()
    split = split_model(model, at, IMAGES)
    images = torch.rand(batch, 3, 8, 8)
    torch.testing.assert_close(split.tail.eval()(split.trunk.eval()(images)), model(images))


def test_each_half_has_its_own_mode():
    """A functional dropout behind the cut is alive although the trunk is in evaluation mode, and the reverse."""
    split = split_model(Net(), "block1", IMAGES)
    split.trunk.eval()
    features = split.trunk(IMAGES)
    assert torch.equal(features[0], split.trunk(IMAGES)[0])
    split.tail.train()
    assert not torch.allclose(split.tail(features), split.tail(features))
    split.tail.eval()
    split.trunk.train()
    assert torch.equal(split.tail(features), split.tail(features))


@pytest.mark.parametrize("wants", ["", "data branch"])
@pytest.mark.filterwarnings("ignore:layer")
def test_a_cut_model_moves_as_a_whole(wants):
    """Another type of number, as another device, replaces buffers and parameters' contents."""
    classifier = attach_second_head(Net(wants=wants), "bn", example=IMAGES, init="clone").eval()
    expected = classifier(IMAGES)
    moved = classifier.double()
    assert moved(IMAGES.double()).dtype == torch.float64
    torch.testing.assert_close(moved(IMAGES.double()).float(), expected)
    with torch.no_grad():
        moved.head2.scale.zero_()  # a buffer of the container itself, behind the cut
    z = moved.head_logits(IMAGES.double())
    assert not torch.allclose(z[:, 0], z[:, 1])


@pytest.mark.parametrize("at", ["0", "1", "1.0", "2"])
def test_nested_sequentials(at):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), inner, nn.Dropout(0.2), nn.Flatten(), nn.Linear(4 * 36, CLASSES))
    split = split_model(model, at, IMAGES)
    assert split.how == "sequential"
    assert_same_function(model, split, IMAGES)
    assert {*split.trunk.state_dict(), *split.tail.state_dict()} == set(model.state_dict())


def test_a_tail_that_works_in_place_leaves_the_features_to_the_other_head():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 36, CLASSES))
    split = split_model(model, "0", IMAGES)
    features = split.trunk(IMAGES)
    kept = features.clone()
    split.tail(features)
    assert torch.equal(features, kept) and (kept < 0).any()


class WithSplit(Net):
    """Has a cut of its own, right or wrong."""

    def __init__(self, wrong=False):
        super().__init__()
        self.wrong = wrong

    def forward(self, x):
        return self.fc(self.block1(self.stem(x)).mean((2, 3)))

    def split(self, at):
        if at != "stem":
            raise KeyError(at)
        trunk, tail = (
            WithSplit.Part(self, "stem"),
            WithSplit.Part(self, "bn", "token", "scale", "block1", "block2", "fc"),
        )
        tail.unused = self.unused
        tail.factor = 2.0 if self.wrong else 1.0
        return trunk, tail

    class Part(nn.Module):
        def __init__(self, whole, *names):
            super().__init__()
            for name in names:
                value = getattr(whole, name)
                if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                    self.register_buffer(name, value)
                else:
                    setattr(self, name, value)

        def forward(self, x):
            if hasattr(self, "stem"):
                return self.stem(x)
            return self.fc(self.block1(x).mean((2, 3))) * self.factor


def test_the_models_own_split_comes_first():
    model = WithSplit()
    split = split_model(model, "stem", IMAGES)
    assert split.how == "own"
    assert_same_function(model, split, IMAGES)
    assert split_model(model, "block1", IMAGES).how == "traced"  # a layer that it does not offer


def test_a_wrong_split_of_its_own_is_passed_over_with_a_warning():
    with pytest.warns(UserWarning, match="passed over: the cut model gives other logits"):
        assert split_model(WithSplit(wrong=True), "stem", IMAGES).how == "traced"


def test_weights_shared_across_the_cut_are_handled_but_not_half_frozen():
    torch.manual_seed(0)
    model = Net(wants="twice across")
    split = split_model(model, "bn", IMAGES)  # both calls lie behind
    assert_same_function(model, split, IMAGES)
    for tied in ("tied weights", "token behind"):
        classifier = attach_second_head(Net(wants=tied), "block1", example=IMAGES, init="clone")
        assert_second_head_trains(classifier, IMAGES)  # head 2 has a copy of its own
        classifier.set_trainable({"trunk", "head1"})
        with pytest.raises(UserError, match=r"trunk and head1 share .* train both or neither"):
            classifier.set_trainable({"trunk"})


@pytest.mark.parametrize(
    ("model", "at", "words"),
    [
        (Net(wants="twice before"), "block1", r"called 2 times.*; the nearest layers that work: '\w+', '\w+'"),
        (Net(wants="twice across"), "block1", "called 2 times"),
        (Net(), "unused", "not called in a forward pass; the nearest layers that work: '"),
        (Net(), "fc", "nothing that could be trained lies behind it; the nearest layers that work: 'block2"),
        (Net(), "blok1", "no layer 'blok1'; did you mean 'block1'"),
        (Net(), "", "no layer ''"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)), "0", r"logits of shape \[2, 5, 8, 8\]"),
    ],
    ids=["twice", "across", "unused", "last", "misspelt", "root", "map"],
)
def test_what_cannot_be_cut_says_why_in_one_line(model, at, words):
    with pytest.raises(UserError, match=words) as caught:
        split_model(model, at, IMAGES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "draw", [random.random, np.random.rand, lambda: torch.rand(()).item()], ids=["python", "numpy", "torch"]
)
@pytest.mark.filterwarnings("ignore:layer")
def test_chance_in_a_container_is_never_frozen_and_random_numbers_stay_where_they_are(draw):
    """Whatever the generators are when the model is cut: a branch that a trace took by chance stays open."""
    model = OwnGradient(lambda x: x * 2 if draw() < 0.5 else x, training=True)
    for seed in range(4):
        seed_generators(seed, IMAGES.device)
        before = all_generator_states(IMAGES.device)
        assert split_model(model, "block1", IMAGES).how == "functional"
        assert all_generator_states(IMAGES.device) == before


@pytest.mark.parametrize(
    ("model", "example", "words"),
    [
        (Net(), torch.rand(2, 1, 8, 8), r"fails on the example in training mode, as \[3, 1, 8, 8\]: .* 3 channels"),
        (Net(), torch.rand(3, 8, 8), r"fails on the example in training mode, as \[3, 8, 8\]"),
        (nn.Sequential(nn.Unflatten(0, (1, 2)), nn.Linear(1, 1)), IMAGES, r"fails on the example .* \[3, 3, 8, 8\]"),
    ],
    ids=["channels", "unbatched", "two images only"],
)
def test_a_model_that_fails_on_the_example_says_so_in_one_line(model, example, words):
    with pytest.raises(UserError, match=words) as caught:
        split_model(model, "0" if isinstance(model, nn.Sequential) else "stem", example)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:layer")
def test_a_layer_may_have_any_name_in_a_whole_pass():
    class Named(Net):
        def __init__(self):
            super().__init__(wants="data branch")
            self.share, self.model = nn.Linear(CLASSES, CLASSES), nn.Linear(CLASSES, CLASSES)

        def forward(self, x):
            return self.model(self.share(super().forward(x)))

    assert split_model(Named(), "block1", IMAGES).how == "functional"


def test_a_buffer_that_is_an_expanded_view_is_cut_reset_and_loaded():
    class Centred(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("centre", torch.full((1, 3, 1, 1), 0.5).expand(1, 3, 8, 8))
            self.register_buffer("offset", torch.zeros(1).expand(CLASSES))

        def forward(self, x):
            return super().forward(x - self.centre) + self.offset

    dual = attach_second_head(Centred(), "block1", example=IMAGES)
    dual.load_state_dict(copy.deepcopy(dual.state_dict()))
    assert dual.head2.offset.tolist() == [0.0] * CLASSES


class SharedAndBranching(Net):
    def forward(self, x):
        x = self.block1(self.bn(self.stem(x)))
        if x.sum() > 1e6:
            return x
        return self.fc(self.block2(self.bn(x)).mean((2, 3)))


def test_shared_weights_in_a_whole_pass_are_refused():
    with pytest.raises(UserError, match=r"traced: .*what a tensor holds; functional: bn is used on both sides"):
        split_model(SharedAndBranching(), "block1", IMAGES)


def test_layers_lists_cuts_with_what_they_cost():
    torch.manual_seed(0)

    def stage(inputs, outputs, stride):
        return nn.Sequential(
            *[nn.Conv2d(inputs if i == 0 else outputs, outputs, 3, stride if i == 0 else 1, 1) for i in (0, 1)]
        )

    model = nn.Sequential()
    for index, (inputs, outputs, stride) in enumerate([(3, 8, 1), (8, 16, 2), (16, 32, 2)]):
        model.add_module(f"stage{index + 1}", stage(inputs, outputs, stride))
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flat", nn.Flatten())
    model.add_module("fc", nn.Linear(32, CLASSES))
    found = {info.name: info for info in layers(model, IMAGES)}
    assert list(found) == ["stage1.0", "stage1", "stage2.0", "stage2", "stage3.0", "flat"]
    assert [name for name, info in found.items() if info.recommended] == ["stage1"]
    assert {info.how for info in found.values()} == {"sequential"}
    assert found["stage1"].shapes == ((8, 8, 8),) and found["stage2"].shapes == ((16, 4, 4),)
    total = sum(p.numel() for p in model.parameters())
    for info in found.values():
        assert info.parameters_before + info.parameters_after == total
    macs = [3 * 8 * 64, 8 * 8 * 64, 8 * 16 * 16, 16 * 16 * 16, 16 * 32 * 4, 32 * 32 * 4]
    cost = [9 * m for m in macs] + [32 * CLASSES]
    assert found["stage1"].cost_after == pytest.approx(1 - sum(cost[:2]) / sum(cost))
    assert found["flat"].cost_after == pytest.approx(cost[-1] / sum(cost))


def test_layers_names_what_cannot_be_cut_and_why():
    found = {info.name: info for info in layers(Net(wants="twice across"), IMAGES)}
    assert found["block1"].how is None and "called 2 times" in found["block1"].why_not
    assert found["bn"].how == "traced"
