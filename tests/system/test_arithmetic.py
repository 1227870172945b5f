"""The arithmetic of training: bf16 with channels-last images, and with contiguous ones where a model needs them."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch import nn

from dualhead.errors import Interrupted, UserError
from dualhead.evaluation import evaluate, make_gallery
from dualhead.recipe.yaml import load_recipe
from dualhead.runs import prepare, stages
from dualhead.runs.run import train
from dualhead.system import arithmetic as measured
from dualhead.system.arithmetic import (
    BF16,
    BF16_CONTIGUOUS,
    FLOAT32,
    FLOAT32_CHANNELS_LAST,
    FLOAT32_CONTIGUOUS,
    choose_arithmetic,
    with_lanes,
)
from dualhead.system.devices import float32_products
from dualhead.threats.lp import ThreatModel
from helpers.e2e import TINY

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

SHORT = (*TINY, "data.train_limit=104", "evaluate.limit=8", "evaluate.gallery=0")
"""Overrides for runs of one stage of which only their arithmetic is looked at."""


@pytest.fixture
def nothing_known(monkeypatch, tmp_path):
    """No measurement of another test counts."""
    monkeypatch.setenv("DUALHEAD_CACHE", str(tmp_path / "cache"))


class Flattens(nn.Module):
    """A convolution whose features are flattened by `view`, which wants them contiguous, or by `flatten`."""

    def __init__(self, *, by_view):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 5)
        self.by_view = by_view

    def forward(self, x):
        x = self.conv(x)
        return self.fc(x.view(x.shape[0], -1) if self.by_view else x.flatten(1))


def layout(model):
    last = model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    return "channels last" if last and not model.conv.weight.is_contiguous() else "contiguous"


def test_channels_last_fails_where_features_are_viewed():
    model = Flattens(by_view=True)
    BF16.lay_out(model)
    with pytest.raises(RuntimeError, match="view"):
        BF16.wrap(model)(IMAGES)


@pytest.mark.parametrize(("by_view", "expected"), [(True, BF16_CONTIGUOUS), (False, BF16)])
def test_bf16_takes_the_layout_that_the_model_takes(by_view, expected):
    model = Flattens(by_view=by_view).train()
    chosen = choose_arithmetic("bf16", model, IMAGES)
    assert chosen == expected
    assert chosen.name == "bf16"
    assert layout(model) == ("contiguous" if by_view else "channels last")
    assert model.training
    torch.testing.assert_close(chosen.wrap(model)(IMAGES), model(IMAGES), rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize("by_view", [True, False])
def test_auto_measures_and_leaves_the_layout_it_chose(by_view):
    model = Flattens(by_view=by_view)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen = choose_arithmetic("auto", model, IMAGES, seconds=0.01)
    assert chosen in ({FLOAT32_CONTIGUOUS, BF16_CONTIGUOUS} if by_view else {FLOAT32, FLOAT32_CHANNELS_LAST, BF16})
    assert layout(model) == ("channels last" if chosen.channels_last else "contiguous")
    assert chosen.wrap(model)(IMAGES).shape == (4, 5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("precision", "seconds", "expected"),
    [
        ("float32", [1.0, 0.95], FLOAT32),
        ("float32", [1.0, 0.8], FLOAT32_CHANNELS_LAST),
        ("auto", [1.0, 0.8, 0.75], FLOAT32_CHANNELS_LAST),
        ("auto", [1.0, 0.95, 0.85], BF16),
        ("auto", [1.0, 0.8, 0.5], BF16),
    ],
)
@pytest.mark.usefixtures("nothing_known")
def test_what_is_clearly_faster_is_chosen_and_float32_has_two_layouts(monkeypatch, precision, seconds, expected):
    model, clock = Flattens(by_view=False), iter(seconds)
    monkeypatch.setattr(measured, "_seconds_per_pass", lambda *_: next(clock))
    assert choose_arithmetic(precision, model, IMAGES) == expected
    assert layout(model) == ("channels last" if expected.channels_last else "contiguous")
    assert next(clock, None) is None


@pytest.mark.parametrize(
    ("precision", "pinned", "expected"),
    [
        ("float32", "contiguous", FLOAT32_CONTIGUOUS),
        ("float32", "channels_last", FLOAT32_CHANNELS_LAST),
        ("bf16", "contiguous", BF16_CONTIGUOUS),
        ("bf16", "channels_last", BF16),
    ],
)
def test_precision_and_layout_together_leave_nothing_to_the_clock(monkeypatch, precision, pinned, expected):
    monkeypatch.setattr(measured, "_fastest", lambda *_: pytest.fail("measured"))
    model = Flattens(by_view=False)
    assert choose_arithmetic(precision, model, IMAGES, pinned) == expected
    torch.testing.assert_close(expected.wrap(model)(IMAGES), model(IMAGES), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("seconds", "said"), [([12.0, 1.0], True), ([1.0, 1.0], False), ([1.0, 2.0], False)])
def test_bf16_that_is_asked_for_where_it_is_slow_is_taken_with_a_word(monkeypatch, caplog, tmp_path, seconds, said):
    clock = iter(seconds)
    monkeypatch.setattr(measured, "_seconds_per_pass", lambda *_: next(clock))
    settings = [*SHORT, "runtime.precision=bf16", "runtime.lanes=1"]
    train(load_recipe("digits_base", settings), run_dir=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["precision"] == "bf16"
    assert next(clock, None) is None
    assert ("bf16 takes 12.0 times as long as float32; auto takes the faster one" in caplog.text) == said


def test_a_layout_that_the_model_cannot_take_is_refused():
    with pytest.raises(UserError, match=r"runtime\.layout: .* write contiguous or auto"):
        choose_arithmetic("float32", Flattens(by_view=True), IMAGES, "channels_last")


@pytest.mark.parametrize(("word", "expected"), [("contiguous", False), ("channels_last", True)])
def test_a_recipe_sets_the_layout(tmp_path, word, expected):
    train(load_recipe("digits_base", [*SHORT, f"runtime.layout={word}"]), run_dir=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["channels_last"] is expected


@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_any_layout_reach_such_a_model_contiguous(channels):
    model = Flattens(by_view=True)
    model.conv = nn.Conv2d(channels, 4, 3, padding=1)
    images = torch.rand(4, 8, 8, channels).permute(0, 3, 1, 2)
    with pytest.raises(RuntimeError, match="view"):
        FLOAT32.wrap(model)(images)
    chosen = choose_arithmetic("float32", model, images.contiguous())
    assert chosen == FLOAT32_CONTIGUOUS
    x = images.requires_grad_()
    (gradient,) = torch.autograd.grad(chosen.wrap(model)(x).sum(), x)
    assert gradient.shape == x.shape


def test_a_model_that_fails_anyway_fails_with_its_own_words():
    broken = nn.Sequential(nn.Flatten(), nn.Linear(7, 5))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        choose_arithmetic("auto", broken, IMAGES, seconds=0.01)


@pytest.mark.parametrize(("words", "expected"), [("1", 1), ("3", 3)])
def test_a_recipe_sets_the_lanes(tmp_path, words, expected):
    recipe = load_recipe("digits_base", [*SHORT, f"runtime.lanes={words}"])
    train(recipe, run_dir=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["lanes"] == expected
    with pytest.raises(UserError, match=r"runtime\.lanes"):
        load_recipe("digits", ["runtime.lanes=0"])


def test_lanes_are_chosen_by_the_clock_and_only_where_they_can_help(monkeypatch):
    model, example = Flattens(by_view=False), torch.rand(64, 3, 8, 8)
    seconds = {"lanes": 1.0}
    monkeypatch.setattr(measured, "_fastest", lambda *_: seconds["lanes"])
    monkeypatch.setattr(measured, "_seconds_per_pass", lambda *_: 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert with_lanes(FLOAT32, model, example) == FLOAT32
    seconds["lanes"] = 0.8
    assert with_lanes(FLOAT32, model, example).lanes == 2
    assert with_lanes(FLOAT32, model, example[:20]) == FLOAT32
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert with_lanes(FLOAT32, model, example) == FLOAT32


def tf32_flags():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("tf32", [True, False])
def test_products_are_rounded_inside_only_and_only_if_asked(tf32):
    before = tf32_flags()
    with pytest.raises(ValueError, match="ends"), float32_products(tf32=tf32):
        assert tf32_flags() == (tf32, tf32)
        raise ValueError("ends")
    assert tf32_flags() == before


@pytest.mark.parametrize("look", [partial(evaluate, attacks=["fgsm"]), make_gallery])
def test_evaluations_ask_for_exact_products_whatever_torch_has_set(look):
    seen = []

    def model(x):
        seen.append(tf32_flags())
        return x.flatten(1)[:, :2]

    with float32_products(tf32=True):
        look(Function(model), IMAGES, torch.zeros(4, dtype=torch.int64), threat=ThreatModel("Linf", 0.1))
    assert set(seen) == {(False, False)}


@pytest.mark.parametrize(("precision", "rounded"), [("float32", False), ("auto", False), ("tf32", True)])
def test_training_rounds_products_if_the_recipe_says_so(tmp_path, monkeypatch, precision, rounded):
    def stop(*args):
        raise Interrupted(str(tf32_flags()))

    monkeypatch.setattr(prepare, "refuse_tf32", lambda device: None)
    monkeypatch.setattr(stages, "_train_stage", stop)
    with pytest.raises(Interrupted, match=str(rounded)):
        train(load_recipe("digits", [*TINY, f"runtime.precision={precision}"]), run_dir=tmp_path / "run")
    written = json.loads((tmp_path / "run" / "environment.json").read_text())["precision"]
    assert written in {"auto": ("float32", "bf16")}.get(precision, (precision,))


class Function(nn.Module):
    """A module of a function, with something to ask for its device."""

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.function = function

    def forward(self, x):
        return self.function(x) * self.weight
