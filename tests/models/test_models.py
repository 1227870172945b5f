"""Backbones hold what the field publishes; weights are read without running anything and load whole or not at all."""

import json
import math
import os
import pickle
import re
import sys
import types
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import nn

from dualhead.errors import UserError
from dualhead.heads import attach_second_head, split_model
from dualhead.models import (
    Normalize,
    Wrapped,
    backbones,
    channel_statistics,
    count_parameters,
    load_state,
    read_state,
    write_state,
)
from dualhead.models import normalize as normalize_module
from dualhead.models.base import check_logits
from helpers.published import (
    CASES,
    preactresnet_table,
    state_for,
    wideresnet_table,
)

# --- The published parameter tables, from the architectures' rules alone ---

COUNTS = {
    "wideresnet-34-10": 46_160_474,
    "resnet-18": 11_173_962,
    "resnet-34": 21_282_122,
    "resnet-50": 23_520_842,
    "preactresnet-18": 11_172_170,
}


def make(spec, classes=10, shape=(3, 32, 32), normalize=None):
    return backbones.build(spec).create(classes, shape, normalize or Normalize.identity(shape[0]))


@pytest.mark.parametrize("spec", CASES)
def test_published_names_and_shapes_load_strictly(spec):
    table = CASES[spec]
    classes = next(shape[0] for name, shape in table.items() if name in ("fc.bias", "linear.bias"))
    normalize = Normalize([0.49, 0.48, 0.45], [0.25, 0.24, 0.26])
    with torch.device("meta"):  # names and shapes need no memory
        model = make(spec, classes)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == table
    if spec in COUNTS:
        assert count_parameters(model) == COUNTS[spec]
    if spec != "wideresnet-34-10":
        model = make(spec, classes, normalize=normalize)
        state = state_for(table)
        model.load_state_dict(state, strict=True)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_preactresnet_without_the_final_norm_has_the_published_count():
    model = make({"name": "preactresnet", "final_norm": False})
    assert count_parameters(model) == 11_171_146
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == preactresnet_table((2, 2, 2, 2), False, 10)


# --- The computation, against the formulas of the papers on plain tensors ---


def norm(state, name, x):
    p = [state[f"{name}.{n}"] for n in ("running_mean", "running_var", "weight", "bias")]
    return F.batch_norm(x, p[0], p[1], p[2], p[3], training=False)


def conv(state, name, x, stride=1):
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def reference_wideresnet(state, x, depth):
    x = conv(state, "conv1", x)
    for stage in (1, 2, 3):
        for i in range((depth - 4) // 6):
            at, stride = f"block{stage}.layer.{i}", 2 if stage > 1 and i == 0 else 1
            pre = norm(state, f"{at}.bn1", x).relu()
            skip = conv(state, f"{at}.convShortcut", pre, stride) if f"{at}.convShortcut.weight" in state else x
            inner = norm(state, f"{at}.bn2", conv(state, f"{at}.conv1", pre, stride)).relu()
            x = skip + conv(state, f"{at}.conv2", inner)
    x = F.avg_pool2d(norm(state, "bn1", x).relu(), x.shape[2:]).flatten(1)
    return F.linear(x, state["fc.weight"], state["fc.bias"])


def reference_resnet(state, x, blocks, convolutions):
    x = norm(state, "bn1", conv(state, "conv1", x)).relu()
    strided = 1 if convolutions == 2 else 2
    for stage, count in enumerate(blocks, 1):
        for i in range(count):
            at, stride, out = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1, x
            for j in range(1, convolutions + 1):
                out = norm(state, f"{at}.bn{j}", conv(state, f"{at}.conv{j}", out, stride if j == strided else 1))
                out = out.relu() if j < convolutions else out
            if f"{at}.shortcut.0.weight" in state:
                x = norm(state, f"{at}.shortcut.1", conv(state, f"{at}.shortcut.0", x, stride))
            x = (out + x).relu()
    return F.linear(F.avg_pool2d(x, x.shape[2:]).flatten(1), state["linear.weight"], state["linear.bias"])


def reference_preactresnet(state, x, blocks, raw):
    x = conv(state, "conv1", x)
    for stage, count in enumerate(blocks, 1):
        for i in range(count):
            at, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            pre = norm(state, f"{at}.bn1", x).relu()
            inner = norm(state, f"{at}.bn2", conv(state, f"{at}.conv1", pre, stride)).relu()
            if f"{at}.shortcut.0.weight" in state:
                x = conv(state, f"{at}.shortcut.0", x if raw else pre, stride)
            x = x + conv(state, f"{at}.conv2", inner)
    x = norm(state, "bn", x).relu() if "bn.weight" in state else x
    return F.linear(F.avg_pool2d(x, x.shape[2:]).flatten(1), state["linear.weight"], state["linear.bias"])


FAST_AT = {"name": "preactresnet", "final_norm": False, "shortcut": "raw"}
REFERENCES = [
    ("wideresnet-16-2", wideresnet_table(16, 2, 10), lambda s, x: reference_wideresnet(s, x, 16)),
    ("resnet-18", CASES["resnet-18"], lambda s, x: reference_resnet(s, x, (2, 2, 2, 2), 2)),
    ("resnet-50", CASES["resnet-50"], lambda s, x: reference_resnet(s, x, (3, 4, 6, 3), 3)),
    ("preactresnet-18", CASES["preactresnet-18"], lambda s, x: reference_preactresnet(s, x, (2, 2, 2, 2), False)),
    (FAST_AT, preactresnet_table((2,) * 4, False, 10), lambda s, x: reference_preactresnet(s, x, (2,) * 4, True)),
]


@pytest.mark.parametrize(("spec", "table", "reference"), REFERENCES, ids=lambda v: v if isinstance(v, str) else "")
def test_published_weights_compute_what_the_papers_say(spec, table, reference):
    mean, std = [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]
    model = make(spec, normalize=Normalize(mean, std)).double().eval()
    state = {name: t.double() if t.is_floating_point() else t for name, t in state_for(table).items()}
    assert load_state(model, state, "test") == ()
    images = torch.rand(2, 3, 16, 24, dtype=torch.float64)
    mean, std = (torch.tensor(given).double() for given in (mean, std))  # as float32 has them
    shifted = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    torch.testing.assert_close(model(images), reference(state, shifted), rtol=1e-6, atol=1e-6)


def test_the_two_shortcuts_of_preactresnet_differ_although_their_names_agree():
    state, images = state_for(CASES["preactresnet-18"]), torch.rand(1, 3, 8, 8)
    logits = []
    for shortcut in ("activated", "raw"):
        model = make({"name": "preactresnet", "shortcut": shortcut}).eval()
        load_state(model, state, "test")
        logits.append(model(images))
    assert not torch.allclose(*logits)


def test_wideresnet_starts_at_he_fan_out():
    torch.manual_seed(0)
    model = make("wideresnet-10-4")
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            wanted = (2 / (module.weight.shape[0] * module.weight[0, 0].numel())) ** 0.5
            assert module.weight.std().item() == pytest.approx(wanted, rel=0.05)
    assert torch.equal(model.fc.bias, torch.zeros(10))


def test_a_stem_of_stride_2_halves_the_resolution_and_takes_the_same_weights():
    whole, half = (make({"name": "wideresnet", "depth": 10, "width": 1, "stem_stride": stride}) for stride in (1, 2))
    half.load_state_dict(whole.state_dict())
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(half.conv1(x), whole.conv1(x)[..., ::2, ::2])
    assert half(x).shape == whole(x).shape


def test_dropout_acts_in_training_only():
    model = make({"name": "wideresnet", "depth": 10, "width": 1, "dropout": 0.5})
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == wideresnet_table(10, 1, 10)
    images = torch.rand(4, 3, 8, 8)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


# --- What holds of every backbone ---


class Tiny(nn.Module):
    """A stranger's model."""

    def __init__(self, num_classes=10, channels=3):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(self.layer1(x).mean((2, 3)))


Output = namedtuple("Output", ["loss", "logits"])


@pytest.fixture
def fake_timm(monkeypatch):
    module = types.ModuleType("timm")
    module.calls = []

    def create_model(name, *, pretrained, num_classes, in_chans, **more):
        module.calls.append((name, pretrained, more))
        if name not in ("tiny", "tiny_vit"):
            raise RuntimeError(f"Unknown model ({name})")
        return Tiny(num_classes, in_chans)

    module.create_model = create_model
    module.get_pretrained_cfg = lambda name: types.SimpleNamespace(fixed_input_size=name.endswith("vit"))
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Write a module into the current directory, which is not on the path yet, and give its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    name = f"user_{tmp_path.name.replace('-', '_')}"
    yield lambda text: (tmp_path / f"{name}.py").write_text(text) and name
    sys.modules.pop(name, None)


TINY_HF = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
    "downsample_in_first_stage": False,
}
OWN = """
import torch
def make(num_classes):
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.LazyLinear(num_classes))
"""


@pytest.fixture
def spec_of(fake_timm, user_module, tmp_path):
    """A spec for each name: its defaults, or the smallest network of those that need to be told."""

    def spec(name):
        if name == "factory":
            return f"{user_module(OWN)}:make"
        if name == "hf":
            pytest.importorskip("transformers")
            from transformers import AutoConfig

            settings = dict(TINY_HF)
            AutoConfig.for_model(settings.pop("model_type"), **settings).save_pretrained(tmp_path / "config")
            return f"hf:{tmp_path / 'config'}"
        small = {
            "timm": "timm:tiny",
            "wideresnet": "wideresnet-10-1",
            "with_norm": {"name": "with_norm", "backbone": "cnn-4", "norm": "group"},
        }
        return small.get(name, name)

    return spec


# Of RobustBench, the package makes the network and a file of weights must lie there: `test_weights_of_others.py`.
@pytest.mark.parametrize("name", [name for name in backbones.names() if name not in ("robustbench", "given")])
class TestContract:
    """Every registered backbone, including those that files added later bring."""

    @pytest.mark.parametrize("shape", [(1, 28, 28), (3, 17, 24), (4, 8, 8)])
    def test_takes_any_channels_and_size(self, name, shape, spec_of):
        model = make(spec_of(name), 7, shape)
        images = torch.rand(2, *shape)
        for mode in (True, False):
            logits = model.train(mode)(images)
            assert logits.shape == (2, 7)
            assert logits.dtype == torch.float32
            assert logits.isfinite().all()

    def test_a_seed_fixes_the_weights(self, name, spec_of):
        spec, states = spec_of(name), []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            states.append(make(spec, 5, (3, 16, 16)).state_dict())
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])

    def test_normalises_inside(self, name, spec_of):
        spec = spec_of(name)
        torch.manual_seed(0)
        plain = make(spec, 5, (3, 16, 16)).eval()
        torch.manual_seed(0)
        model = make(spec, 5, (3, 16, 16), Normalize([0.5, 0.4, 0.3], [0.25, 0.5, 2.0])).eval()
        images = torch.rand(2, 3, 16, 16)
        shifted = (images - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.25, 0.5, 2.0]).view(3, 1, 1)
        torch.testing.assert_close(model(images), plain(shifted))

    def test_images_do_not_meet_in_eval_mode(self, name, spec_of):
        model = make(spec_of(name), 5, (3, 16, 16)).eval()
        images = torch.rand(4, 3, 16, 16)
        together = model(images)
        others = torch.cat([images[:1], torch.rand(3, 3, 16, 16)])
        torch.testing.assert_close(model(others)[:1], together[:1])
        torch.testing.assert_close(model(images.flip(0)).flip(0), together)

    def test_the_input_has_a_gradient_and_stays_as_it_was(self, name, spec_of):
        model = make(spec_of(name), 5, (3, 16, 16))
        images = torch.rand(2, 3, 16, 16, requires_grad=True)
        before = images.detach().clone()
        model(images)[:, 0].sum().backward()
        assert images.grad.abs().sum() > 0
        assert torch.equal(images.detach(), before)
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_the_attach_point_exists_and_leaves_something_behind_it(self, name, spec_of):
        backbone = backbones.build(spec_of(name))
        model = backbone.create(5, (3, 16, 16), Normalize.identity(3))
        if backbone.attach_at is None:
            assert name in ("factory", "given", "timm", "hf", "with_norm")
            return
        trunk = model.get_submodule(backbone.attach_at)
        assert 0 < count_parameters(trunk) < count_parameters(model) / 2

    def test_weights_round_trip(self, name, spec_of, tmp_path):
        spec = spec_of(name)
        model = make(spec, 5, (3, 16, 16))
        model(torch.rand(4, 3, 16, 16))  # moves the batch-norm statistics
        write_state(model.state_dict(), tmp_path / "model.safetensors")
        other = make(spec, 5, (3, 16, 16))
        assert load_state(other, read_state(tmp_path / "model.safetensors"), "test") == ()
        assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in model.state_dict().items())

    def test_the_description_builds_the_same(self, name, spec_of):
        backbone = backbones.build(spec_of(name))
        assert backbones.build(backbones.describe(backbone)) == backbone

    @pytest.mark.parametrize(
        ("classes", "shape", "channels", "said"),
        [
            (1, (3, 8, 8), 3, "at least 2 classes"),
            (5, (3, 0, 8), 3, "image shape"),
            (5, (3, 8), 3, "image shape"),
            (5, (1, 8, 8), 3, "normalisation is for 3 channels, but the images have 1"),
        ],
    )
    def test_impossible_requests_are_refused(self, name, classes, shape, channels, said, spec_of):
        with pytest.raises(UserError, match=said):
            backbones.build(spec_of(name)).create(classes, shape, Normalize.identity(channels))


@pytest.mark.parametrize("spec", ["cnn", "wideresnet-10-1", "resnet-18", "preactresnet-18"])
def test_own_backbones_can_be_traced(spec):
    model = make(spec, normalize=Normalize([0.5] * 3, [0.25] * 3)).eval()
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(torch.fx.symbolic_trace(model)(images), model(images))


def test_the_small_cnn_learns_small_images():
    torch.manual_seed(0)
    model, generator = make("cnn-16", 4, (1, 8, 8)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    patterns = torch.rand(4, 1, 8, 8, generator=generator)

    def batch(size):
        y = torch.randint(4, (size,), generator=generator)
        return (patterns[y] + 0.3 * torch.randn(size, 1, 8, 8, generator=generator)).clamp(0, 1), y

    for _ in range(60):
        x, y = batch(64)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    x, y = batch(500)
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.97


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("wideresnet-33-10", "depth must be 6 n"),
        ("wideresnet-4-1", "depth must be 6 n"),
        ("wideresnet-10-0", "width must be at least 1"),
        ({"name": "wideresnet", "stem_stride": 4}, "stem_stride must be 1 or 2, got 4"),
        ({"name": "wideresnet", "dropout": 1.0}, "dropout must lie in"),
        ("resnet-20", "should be 18, 34 or 50"),
        ({"name": "preactresnet", "shortcut": "none"}, "should be 'activated' or 'raw'"),
        ("cnn-0", "width must be at least 1"),
        ({"name": "cnn", "stages": 1}, "stages must lie between 2 and 6"),
        ({"name": "cnn", "convolutions": 0}, "convolutions must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(spec, said):
    with pytest.raises(UserError, match=said):
        backbones.build(spec, "model.backbone")


# --- Normalisation ---


def test_identity_changes_nothing():
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(Normalize.identity(3)(images), images)
    assert Normalize.identity(3).is_identity
    assert not Normalize([0.0], [2.0]).is_identity


def test_normalisation_is_not_saved():
    assert Normalize([0.5], [0.5]).state_dict() == {}


def test_grey_images_do_not_broadcast_to_colour():
    with pytest.raises(UserError, match="takes images of 3 channels"):
        make("cnn")(torch.rand(2, 1, 8, 8))


def test_bytes_are_not_taken_for_values_in_0_to_1():
    with pytest.raises(UserError, match=r"floating images in \[0, 1\], got torch.uint8; divide bytes by 255"):
        make("cnn")(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        ([0.5], [0.0], "std must be greater than 0"),
        ([0.5], [-1.0], "std must be greater than 0"),
        ([0.5, 0.5], [1.0], "got 2 and 1"),
        ([], [], "got 0 and 0"),
        ([float("nan")], [1.0], "must be finite"),
        ([0.0], [float("inf")], "must be finite"),
    ],
)
def test_impossible_normalisations_are_refused(mean, std, said):
    with pytest.raises(UserError, match=said):
        Normalize(mean, std)


@pytest.mark.parametrize("chunk", [1, 1000, 1 << 24])
def test_channel_statistics_are_those_of_the_pixels(chunk, monkeypatch):
    monkeypatch.setattr(normalize_module, "CHUNK", chunk)
    images = torch.randint(0, 256, (37, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = channel_statistics(images)
    pixels = images.double().div(255).transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.tensor(mean, dtype=torch.float64), pixels.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.tensor(std, dtype=torch.float64), pixels.std(1, unbiased=False), rtol=1e-12, atol=0
    )


def test_channel_statistics_of_a_constant_have_no_spread_and_do_not_normalise():
    mean, std = channel_statistics(torch.full((5, 1, 3, 3), 51, dtype=torch.uint8))
    assert mean == (0.2,)
    assert std == (0.0,)
    with pytest.raises(UserError, match="std must be greater than 0"):
        Normalize(mean, std)


@pytest.mark.parametrize("images", [torch.rand(2, 3, 4, 4), torch.zeros(0, 3, 4, 4, dtype=torch.uint8)])
def test_channel_statistics_refuse_what_is_not_a_set_of_images(images):
    with pytest.raises(UserError, match="uint8"):
        channel_statistics(images)


# --- Other people's models ---


def test_a_trial_leaves_the_model_as_it_was():
    model = Tiny()
    model.layer1[1].eval()  # a part that its owner froze
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_logits(model, 10, (3, 8, 8), "test")
    assert model.training
    assert not model.layer1[1].training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_factory_keeps_the_names_of_its_layers_unless_something_is_put_around_it(user_module):
    name = user_module(
        "import torch\nclass Net(torch.nn.Module):\n"
        "    def __init__(self, num_classes):\n        super().__init__()\n"
        "        self.fc = torch.nn.Linear(12, num_classes)\n"
        "    def forward(self, x):\n        return self.fc(x.flatten(1))\n"
        "class Pair(Net):\n    def forward(self, x):\n        return super().forward(x), x\n"
        "def anything(**options):\n    assert options == {'num_classes': 4}\n    return Net(**options)\n"
        "def fixed():\n    return Net(4)\n"
    )
    for factory in ("Net", "anything", "fixed"):
        assert list(make(f"{name}:{factory}", 4, (3, 2, 2)).state_dict()) == ["fc.weight", "fc.bias"]
    shifted = make(f"{name}:Net", 4, (3, 2, 2), Normalize([0.5] * 3, [1.0] * 3))
    paired = make(f"{name}:Pair", 4, (3, 2, 2))
    for model in (shifted, paired):
        assert isinstance(model, Wrapped)
        assert list(model.state_dict()) == ["model.fc.weight", "model.fc.bias"]
        assert model(torch.rand(2, 3, 2, 2)).shape == (2, 4)
    weights = {"fc.weight": torch.ones(4, 12), "fc.bias": torch.zeros(4)}
    load_state(shifted, weights, "test")  # the author's own checkpoint has no prefix
    assert torch.equal(shifted.model.fc.weight, weights["fc.weight"])


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ("absent", "has no 'absent'"),
        ("number", "'number' is a int; it must be a function"),
        ("module", "is a Linear; it must be a function"),
        ("text", "returned str, not a torch.nn.Module"),
        ("broken", "the factory failed: RuntimeError: no weights here"),
        ("five", r"logits of shape \(1, 5\) for one image; the data have 4 classes"),
        ("chokes", "fails on one image of shape"),
        ("double", r"parameters are torch.float64; they must be torch.float32"),
        ("dumb", "returned dict without logits"),
    ],
)
def test_a_factory_that_does_not_keep_the_contract_is_told_what_is_wrong(attribute, said, user_module):
    name = user_module(
        "import torch\nnumber = 3\nmodule = torch.nn.Linear(1, 1)\n"
        "def text():\n    return 'model'\n"
        "def broken():\n    raise RuntimeError('no weights here')\n"
        "def five():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))\n"
        "def double():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4)).double()\n"
        "def chokes():\n    return torch.nn.Linear(99, 4)\n"
        "class Dumb(torch.nn.Module):\n    def forward(self, x):\n        return {'scores': x, 'features': x}\n"
        "def dumb():\n    return Dumb()\n"
    )
    with pytest.raises(UserError, match=said) as caught:
        make(f"{name}:{attribute}", 4, (3, 2, 2))
    assert "\n" not in str(caught.value)


def test_a_factory_of_more_classes_is_measured_by_their_names(user_module):
    name = user_module(
        "import torch\n"
        "def five():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))\n"
        "def named():\n    return five()\n"
        "named.class_names = list('abcde')\n"
    )
    five = backbones.build(f"{name}:five")
    with pytest.raises(UserError, match=r"so \(1, 4\) would be right; for images of some .* class_names, in the order"):
        five.published(4, (3, 2, 2))
    with pytest.raises(UserError, match=r"so \(1, 4\) would be right$"):  # it cannot be trained so
        five.create(4, (3, 2, 2), Normalize.identity(3))
    assert backbones.build(f"{name}:named").published(4, (3, 2, 2)).class_names == tuple("abcde")
    before = torch.get_rng_state()
    assert backbones.build(f"{name}:named").weights_class_names(5) == tuple("abcde")
    assert backbones.build(f"{name}:five").weights_class_names(5) == ()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_without_values_is_refused_in_one_line(user_module):
    name = user_module(
        "import torch\n"
        "def make():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4)).to('meta')\n"
    )
    with pytest.raises(UserError, match=r"^model .*: the factory returned tensors without values \(device meta\)"):
        make(f"{name}:make", 4, (3, 2, 2))


def test_a_missing_module_and_a_module_that_fails_are_told_apart(user_module):
    with pytest.raises(UserError, match="there is no module 'no_such_module'"):
        make("no_such_module.models:make")
    with pytest.raises(UserError, match=r"write package\.module:factory"):
        make({"name": "factory", "path": "no_colon"})
    name = user_module("import no_such_dependency")
    with pytest.raises(UserError, match=f"importing '{name}' failed: ModuleNotFoundError.*no_such_dependency"):
        make(f"{name}:make")
    user_module("def broken(:")
    with pytest.raises(UserError, match=f"importing '{name}' failed: SyntaxError"):
        make(f"{name}:make")


def test_timm_is_asked_for_what_the_recipe_says(fake_timm):
    make("timm:tiny")
    make({"name": "timm", "model": "tiny", "pretrained": True})
    make("timm:tiny_vit", 10, (3, 16, 24))
    assert fake_timm.calls == [("tiny", False, {}), ("tiny", True, {}), ("tiny_vit", False, {"img_size": (16, 24)})]
    with pytest.raises(UserError, match="model 'timm:large': RuntimeError: Unknown model"):
        make("timm:large")


def test_without_timm_the_user_learns_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        make("timm:resnet18")


def test_without_transformers_the_user_learns_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        make("hf:resnet")


class TestTransformers:
    """Models of the transformers library, from folders: nothing is fetched."""

    @pytest.fixture
    def folder(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        settings = dict(TINY_HF)
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), num_labels=10, **settings)
        transformers.AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "published")
        return tmp_path / "published"

    def test_a_type_of_model_and_a_file_are_understood(self, folder):
        assert count_parameters(make("hf:resnet")) == 23_528_522  # ResNet-50 with 10 classes
        model = make(f"hf:{folder / 'config.json'}", 3, (1, 8, 8))
        assert model(torch.rand(2, 1, 8, 8)).shape == (2, 3)

    def test_a_second_head_shares_the_trunk_as_it_does_in_the_bare_model(self, folder, recwarn):
        model = make(f"hf:{folder}")
        at = next(name for name, _ in model.named_modules() if re.fullmatch(r"model\.\w+\.encoder\.stages\.0", name))
        assert split_model(model, at, torch.rand(2, 3, 32, 32)).how == "traced"
        assert not [w for w in recwarn if "trunk is paid twice" in str(w.message)]

    def test_pretrained_weights_are_those_in_the_folder(self, folder):
        published = read_state(folder / "model.safetensors")
        model = make({"name": "hf", "config": str(folder), "pretrained": True})
        assert all(torch.equal(tensor, model.model.state_dict()[name]) for name, tensor in published.items())
        fresh = make(f"hf:{folder}")
        assert any(not torch.equal(tensor, fresh.model.state_dict()[name]) for name, tensor in published.items())
        load_state(fresh, published, "test")
        images = torch.rand(2, 3, 16, 16)
        assert torch.equal(fresh.eval()(images), model.eval()(images))

    def test_another_number_of_classes_renews_the_classifier_alone(self, folder):
        published = read_state(folder / "model.safetensors")
        model = make({"name": "hf", "config": str(folder), "pretrained": True}, 4)
        state = model.model.state_dict()
        assert model(torch.rand(2, 3, 16, 16)).shape == (2, 4)
        same = [name for name in published if not name.startswith("classifier")]
        assert all(torch.equal(published[name], state[name]) for name in same)

    def test_weights_that_do_not_fit_are_refused(self, folder):
        published = read_state(folder / "model.safetensors")
        name = next(name for name in published if name.endswith("convolution.weight"))
        write_state({key: t for key, t in published.items() if key != name}, folder / "model.safetensors")
        with pytest.raises(UserError, match="do not fit the model in 1 tensors"):
            make({"name": "hf", "config": str(folder), "pretrained": True})

    def test_what_is_published_is_measured_with_its_weights_and_its_normalisation(self, folder):
        told = {"do_normalize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
        (folder / "preprocessor_config.json").write_text(json.dumps(told))
        backbone = backbones.build(f"hf:{folder}")
        model, images = backbone.published(10, (3, 16, 16)).eval(), torch.rand(2, 3, 16, 16)
        assert model.normalize.mean.flatten().tolist() == pytest.approx(told["image_mean"])
        spec = {"name": "hf", "config": str(folder), "pretrained": True}
        plain = backbones.build(spec).create(10, (3, 16, 16), Normalize(told["image_mean"], told["image_std"])).eval()
        assert torch.equal(model(images), plain(images))
        assert backbones.build(spec).published_normalisation() == (tuple(told["image_mean"]), tuple(told["image_std"]))
        assert backbone.published_normalisation() is None  # with fresh weights nothing is asked of images
        with pytest.raises(UserError, match="it is for 10 classes, and the images have 4"):
            backbone.published(4, (3, 16, 16))

    def test_weights_that_do_not_say_how_they_normalise_are_told(self, folder, caplog):
        with caplog.at_level("WARNING"):
            backbones.build(f"hf:{folder}").published(10, (3, 16, 16))
        assert "no preprocessor_config.json says how its images are normalised" in caplog.text

    def test_a_trained_model_needs_the_folder_no_more(self, folder):
        spec = {"name": "hf", "config": str(folder), "pretrained": True}
        alone = backbones.describe(backbones.build(spec).on_its_own())
        trained = make(spec)
        folder.rename(folder.with_name("gone"))
        loaded = make(alone)
        load_state(loaded, trained.state_dict(), "test")
        images = torch.rand(2, 3, 16, 16)
        assert torch.equal(loaded.eval()(images), trained.eval()(images))
        assert backbones.build("hf:resnet").on_its_own() == backbones.build("hf:resnet")

    def test_a_type_of_model_has_no_weights(self):
        pytest.importorskip("transformers")
        with pytest.raises(UserError, match="has no weights; name a folder"):
            make({"name": "hf", "config": "resnet", "pretrained": True})

    def test_a_text_model_is_no_image_classifier(self):
        pytest.importorskip("transformers")
        with pytest.raises(UserError, match="model 'hf:bert'"):
            make("hf:bert")


# --- Weights ---

TABLE = wideresnet_table(10, 1, 10)


def test_the_unused_part_of_published_wideresnets_is_left_out_and_said_so(caplog):
    model, published = make("wideresnet-10-1"), state_for(wideresnet_table(10, 1, 10, sub_block=True))
    left_out = load_state(model, published, "model_cifar_wrn.pt")
    assert set(left_out) == {name for name in published if name.startswith("sub_block1.")}
    assert "sub_block1" in caplog.text
    assert all(torch.equal(tensor, published[name]) for name, tensor in model.state_dict().items())


def test_a_sub_block_that_is_not_the_published_one_is_refused():
    published = state_for(wideresnet_table(10, 1, 10, sub_block=True))
    del published["sub_block1.layer.0.conv1.weight"]
    with pytest.raises(UserError, match=r"unexpected .*sub_block1"):
        load_state(make("wideresnet-10-1"), published, "file")


def test_checkpoints_from_before_the_counters_load():
    old = {name: t for name, t in state_for(TABLE).items() if not name.endswith("num_batches_tracked")}
    model = make("wideresnet-10-1")
    load_state(model, old, "file")
    assert model.bn1.num_batches_tracked == 0
    with_one = old | {"bn1.num_batches_tracked": torch.tensor(5)}
    with pytest.raises(UserError, match="6 missing"):
        load_state(model, with_one, "file")


def test_weights_that_do_not_fit_name_what_is_wrong_and_change_nothing():
    model = make("wideresnet-10-1")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = state_for(wideresnet_table(10, 1, 100)) | {"extra.weight": torch.zeros(1)}
    del state["conv1.weight"], state["bn1.bias"]
    with pytest.raises(UserError) as caught:
        load_state(model, state, "weights.pt")
    message = str(caught.value)
    assert message.startswith("weights.pt: ")
    assert "\n" not in message
    assert "2 missing (conv1.weight, bn1.bias)" in message
    assert "1 unexpected (extra.weight)" in message
    assert "2 of another shape (fc.weight is (100, 64), (10, 64) in the model" in message
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize(
    "keys", [(), ("state_dict",), ("model",), ("net",), ("model_state_dict",), ("model", "state_dict")]
)
def test_state_dicts_are_found_within_checkpoints(prefix, keys, tmp_path):
    state = {"module_x.weight": torch.rand(2, 3), "odule.bias": torch.rand(2), "counter": torch.tensor(3)}
    content = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    for key in reversed(keys):
        content = {key: content, "epoch": 76, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    torch.save(content, tmp_path / "checkpoint.pt")
    found = read_state(tmp_path / "checkpoint.pt")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_prefix_that_only_some_names_have_stays(tmp_path):
    state = {"module.weight": torch.rand(2), "head.weight": torch.rand(2)}
    write_state(state, tmp_path / "w.safetensors")
    assert read_state(tmp_path / "w.safetensors").keys() == state.keys()


def test_old_files_of_torch_and_files_with_parameters_are_read(tmp_path):
    state = {"weight": nn.Parameter(torch.rand(3))}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    found = read_state(tmp_path / "old.pth")
    assert torch.equal(found["weight"], state["weight"])
    assert not found["weight"].requires_grad


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj, protocol=2))])
def test_code_in_a_file_of_weights_is_not_run(write, tmp_path):
    write({"state_dict": {"weight": torch.rand(2)}, "extra": Trap(tmp_path / "sprung")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil.pt: ") as caught:
        read_state(tmp_path / "evil.pt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()
    with (tmp_path / "evil.pt").open("rb") as file:  # the trap is real
        (torch.load if write is torch.save else lambda f, **_: pickle.load(f))(file, weights_only=False)
    assert (tmp_path / "sprung").exists()


def test_a_refusal_names_the_code_and_the_way_out(tmp_path):
    torch.save({"state_dict": {"weight": torch.rand(2)}, "args": types.SimpleNamespace(lr=0.1)}, tmp_path / "args.pt")
    with pytest.raises(UserError, match=r"would run code \(types.SimpleNamespace\).*model.state_dict"):
        read_state(tmp_path / "args.pt")


def damaged(path):
    write_state({"weight": torch.rand(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize(
    ("fill", "said"),
    [
        (lambda path: None, "there is no such file"),
        (lambda path: path.mkdir(), "there is no such file"),
        (lambda path: path.write_bytes(b""), "neither a safetensors file"),
        (lambda path: path.write_text("not weights at all"), "neither a safetensors file"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "neither a safetensors file"),
        (damaged, "not a whole safetensors file"),
        (lambda path: torch.save(torch.rand(3), path), "holds Tensor, not a state dict"),
        (lambda path: torch.save({}, path), "an empty dict"),
        (lambda path: torch.save({"epoch": 3}, path), "entry 'epoch' is int"),
        (lambda path: torch.save({"model": {"a": 1}}, path), r"\['model'\]: not a state dict: entry 'a' is int"),
        (lambda path: torch.save({"net": {"a": torch.ones(1)}, "model": {"a": torch.zeros(1)}}, path), "several"),
    ],
)
def test_files_that_hold_no_weights_are_refused_in_one_line(fill, said, tmp_path):
    fill(tmp_path / "file")
    with pytest.raises(UserError, match=said) as caught:
        read_state(tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_writing_takes_shared_and_strided_tensors_and_leaves_nothing_beside(tmp_path):
    base = torch.rand(4, 6)
    state = {"a": base, "b": base, "c": base.t(), "d": base[:, ::2], "n": torch.tensor(3), "h": base.half()}
    write_state(state, tmp_path / "new" / "w.safetensors")
    found = read_state(tmp_path / "new" / "w.safetensors")
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in state.items())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["w.safetensors"]


def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    write_state({"weight": torch.zeros(3)}, path)

    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_state({"weight": torch.ones(3)}, path)
    assert torch.equal(read_state(path)["weight"], torch.zeros(3))
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("name", ["wideresnet-10-2", "cnn-16"])
def test_a_second_head_starts_from_the_backbones_own_initialisation(name):
    torch.manual_seed(0)
    model = backbones.build(name).create(10, (3, 32, 32), Normalize.identity(3))
    dual = attach_second_head(model, backbones.build(name).attach_at, example=torch.rand(2, 3, 32, 32), num_classes=10)
    assert not dual.head2.get_parameter("fc.bias").any()
    for key, weight in dual.head2.named_parameters():
        if weight.dim() == 4:
            expected = math.sqrt(2.0 / (weight.shape[0] * weight.shape[2] * weight.shape[3]))
            assert weight.std().item() == pytest.approx(expected, rel=0.15)
            assert not torch.equal(weight, dual.head1.get_parameter(key))
