"""Schedules by their values, optimisers by the steps they take."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dualhead.errors import UserError
from dualhead.heads import attach_second_head
from dualhead.training import Passes
from dualhead.training.layer_decay import decayed_groups, layer_scales
from dualhead.training.optimisation import optimisers, schedules
from helpers.architectures import ARCHITECTURES
from helpers.training import plain_model


@pytest.mark.parametrize(
    ("spec", "epochs", "values"),
    [
        ("step", 10, {0: 1, 9.99: 1}),
        ({"name": "step", "milestones": [75, 90]}, 100, {0: 1, 74.99: 1, 75: 0.1, 89.9: 0.1, 90: 0.01, 99.9: 0.01}),
        ({"name": "step", "milestones": [2], "gamma": 0.5}, 4, {1.99: 1, 2: 0.5}),
        ({"name": "step", "milestones": [5], "warmup": 2}, 9, {0: 0, 0.5: 0.25, 2: 1, 5: 0.1}),
        ({"name": "cyclic", "peak": 0.4}, 10, {0: 0, 2: 0.5, 4: 1, 7: 0.5, 10: 0}),
        ({"name": "cyclic", "peak": "1/4"}, 8, {1: 0.5, 2: 1, 5: 0.5}),
        ("cosine", 10, {0: 1, 2.5: 0.5 + math.sqrt(2) / 4, 5: 0.5, 10: 0}),
        ({"name": "cosine", "warmup": 2}, 10, {0: 0, 1: 0.5, 2: 1, 6: 0.5, 10: 0}),
    ],
    ids=str,
)
def test_values_at_points(spec, epochs, values):
    schedule = schedules.build(spec)
    for epoch, factor in values.items():
        assert schedule.factor(epoch, epochs) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize("name", schedules.names())
@settings(max_examples=60)
@given(epochs=st.integers(1, 300), share=st.floats(0, 1, exclude_max=True))
def test_every_schedule_stays_between_zero_and_one(name, epochs, share):
    factor = schedules.build(name).factor(share * epochs, epochs)
    assert 0 <= factor <= 1 + 1e-12


def test_stepping_agrees_with_torch():
    schedule = schedules.build({"name": "step", "milestones": [3, 5], "gamma": 0.2})
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimiser, [3, 5], gamma=0.2)
    for epoch in range(8):
        assert schedule.factor(epoch, 8) == pytest.approx(optimiser.param_groups[0]["lr"])
        optimiser.step()
        reference.step()


@pytest.mark.parametrize(
    "settings_",
    [
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
        {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 2e-4},
        {"lr": 0.5, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0},
    ],
)
def test_sgd_steps_as_the_formula_says(settings_):
    """v <- m v + (g + wd w); w <- w - lr (g + wd w + m v) with Nesterov, w - lr v without."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimiser = optimisers.build({"name": "sgd", **settings_}).create([parameter])
    w, v = [1.0, -2.0], [0.0, 0.0]
    for step in range(5):
        gradient = [0.3 * w[0] + 0.1 * step, w[1] ** 2]
        optimiser.zero_grad()
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimiser.step()
        for i in range(2):
            d = gradient[i] + settings_["weight_decay"] * w[i]
            v[i] = settings_["momentum"] * v[i] + d
            w[i] -= settings_["lr"] * (d + settings_["momentum"] * v[i] if settings_["nesterov"] else v[i])
        assert parameter.tolist() == pytest.approx(w, rel=1e-12)


def test_adamw_steps_as_the_formula_says():
    """w <- w - lr wd w - lr m^ / (sqrt(v^) + eps), with means that are corrected for their start at 0."""
    lr, (b1, b2), eps, decay = 0.01, (0.8, 0.95), 1e-6, 0.1
    parameter = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    spec = {"name": "adamw", "lr": lr, "betas": [b1, b2], "eps": eps, "weight_decay": decay}
    optimiser = optimisers.build(spec).create([parameter])
    w, m, v = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0]
    for step in range(1, 6):
        gradient = [0.3 * w[0] + 0.1 * step, w[1] ** 2]
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimiser.step()
        for i in range(2):
            m[i] = b1 * m[i] + (1 - b1) * gradient[i]
            v[i] = b2 * v[i] + (1 - b2) * gradient[i] ** 2
            moved = (m[i] / (1 - b1**step)) / (math.sqrt(v[i] / (1 - b2**step)) + eps)
            w[i] -= lr * decay * w[i] + lr * moved
        assert parameter.tolist() == pytest.approx(w, rel=1e-9)


def test_without_decay_of_vectors_a_step_without_gradient_leaves_them_alone():
    matrix, token, bias = (nn.Parameter(torch.ones(shape)) for shape in ((3, 2), (1, 1, 4), (5,)))
    for parameter in (matrix, token, bias):
        parameter.grad = torch.zeros_like(parameter)
    optimisers.build({"name": "adamw", "lr": 0.1, "weight_decay": 0.5, "decay": "matrices"}).create(
        [bias, matrix, token]
    ).step()
    assert torch.allclose(matrix, torch.full((3, 2), 0.95))
    assert torch.equal(token, torch.ones(1, 1, 4)) and torch.equal(bias, torch.ones(5))


TORCH = {
    "Adam": {"betas": [0.8, "0.95"], "weight_decay": "1e-2"}, "NAdam": {}, "RAdam": {}, "RMSprop": {"momentum": 0.9},
    "Adagrad": {}, "Adadelta": {}, "Adamax": {}, "ASGD": {}, "Rprop": {}, "Adafactor": {}, "SGD": {"momentum": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("name", TORCH)
def test_optimisers_of_torch_step_as_they_do_by_themselves(name):
    """And they survive a checkpoint: the second half runs on another one that has taken over the state."""
    spec = {"name": "torch", "optimiser": name, "lr": "1e-2", "options": TORCH[name]}
    found, expected = (nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3)) for _ in range(2))
    chosen = optimisers.build(optimisers.describe(optimisers.build(spec)))
    ours = chosen.create([found])
    options = {"betas": (0.8, 0.95), "weight_decay": 0.01} if name == "Adam" else TORCH[name]
    theirs = getattr(torch.optim, name)([expected], lr=1e-2, **options)
    for step in range(6):
        if step == 3:
            state = ours.state_dict()
            ours = chosen.create([found])
            ours.load_state_dict(state)
        for parameter, optimiser in ((found, ours), (expected, theirs)):
            parameter.grad = (parameter.detach() ** 2 + step).sin()
            optimiser.step()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_the_flag_that_skips_steps_is_there_where_torch_has_it():
    fused = {name for name in TORCH if _flagged(optimisers.build(f"torch:{name}"))}
    assert fused == {"Adam", "Adagrad", "SGD"} and _flagged(optimisers.build("adamw"))


def _flagged(optimiser):
    return getattr(optimiser.create([nn.Parameter(torch.zeros(1))]), "_step_supports_amp_scaling", False)


@pytest.mark.parametrize("name", ["cosine", "step"])
def test_warm_up_by_steps_is_warm_up_by_epochs(name):
    by_steps = schedules.build({"name": name, "warmup_steps": 30}).in_epochs(20)
    by_epochs = schedules.build({"name": name, "warmup": 1.5})
    assert by_steps == by_epochs and by_epochs.in_epochs(20) == by_epochs
    assert by_steps.factor(15 / 20, 4) == pytest.approx(0.5)
    assert by_steps.factor(30 / 20, 4) == 1


# ---- layer decay


def test_scales_are_those_of_beit():
    model = nn.Module()
    for name in ("patch_embed.proj", "head", *(f"blocks.{i}.mlp" for i in (10, 2, 0, 1))):
        place = model
        *path, last = name.split(".")
        for step in path:
            if not hasattr(place, step):
                place.add_module(step, nn.Module())
            place = getattr(place, step)
        place.add_module(last, nn.Linear(2, 2, bias=False))
    model.cls_token = nn.Parameter(torch.zeros(2))
    assert layer_scales(model, 0.5) == {
        "cls_token": 0.5**5, "patch_embed.proj.weight": 0.5**5, "blocks.0.mlp.weight": 0.5**4,
        "blocks.1.mlp.weight": 0.5**3, "blocks.2.mlp.weight": 0.5**2, "blocks.10.mlp.weight": 0.5, "head.weight": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["ViT", "DeiT", "BEiT", "DINOv2", "Swin", "SigLIP", "CLIP", "ViT MSN"])
def test_transformers_are_understood(name):
    pytest.importorskip("transformers")
    [architecture] = [each for each in ARCHITECTURES if each.name == name]
    model = architecture.create()
    scales, blocks = layer_scales(model, 0.5), architecture.block_names(model)
    for number, block in enumerate(blocks):
        inside = {scale for parameter, scale in scales.items() if parameter.startswith(f"{block}.")}
        assert inside == {0.5 ** (len(blocks) - number)}, block
    assert scales["classifier.weight"] == 1
    assert {s for n, s in scales.items() if "embeddings" in n} == {0.5 ** (len(blocks) + 1)}


def test_a_second_head_has_the_scales_of_the_first():
    pytest.importorskip("transformers")
    [architecture] = [each for each in ARCHITECTURES if each.name == "ViT"]
    model = architecture.create()
    whole = layer_scales(model, 0.7)
    dual = attach_second_head(model, "vit.layers.1", example=architecture.images())
    scales = layer_scales(dual, 0.7)
    assert {name.removeprefix("trunk.").removeprefix("head1."): scale for name, scale in scales.items()
            if name.startswith(("trunk.", "head1."))} == whole  # fmt: skip
    for name, scale in scales.items():
        assert not name.startswith("head2.") or scale == scales[name.replace("head2.", "head1.")]
        assert not name.startswith("aggregator.") or scale == 1
    dual.set_trainable({"head2"})
    groups = decayed_groups(Passes(dual, {"head2"}), 0.7)
    assert [group["lr_scale"] for group in groups] == pytest.approx([1, 0.7])
    optimiser = optimisers.build({"name": "adamw", "decay": "matrices"}).create(groups)
    assert {(group["lr_scale"], group["weight_decay"]) for group in optimiser.param_groups} == {
        (1.0, 0.01), (1.0, 0.0), (0.7, 0.01), (0.7, 0.0)
    }  # fmt: skip


def test_layer_decay_is_refused_where_there_are_no_blocks():
    with pytest.raises(UserError, match="is for transformers, with embeddings and blocks"):
        layer_scales(plain_model(), 0.5)


@pytest.mark.parametrize(
    ("registry", "spec", "words"),
    [
        (optimisers, {"name": "sgd", "lr": 0}, "lr must be greater than 0"),
        (optimisers, {"name": "sgd", "lr": "x"}, "'x' is not a number"),
        (optimisers, {"name": "sgd", "momentum": 1}, r"momentum must lie in \[0, 1\)"),
        (optimisers, {"name": "sgd", "momentum": 0}, "nesterov needs momentum"),
        (optimisers, {"name": "sgd", "weight_decay": -1}, "weight_decay must be at least 0"),
        (optimisers, {"name": "adamw", "lr": -1}, "lr must be greater than 0"),
        (optimisers, {"name": "adamw", "betas": [0.9, 1]}, r"betas must lie in \[0, 1\), got 1"),
        (optimisers, {"name": "adamw", "eps": 0}, "eps must be greater than 0"),
        (optimisers, {"name": "adamw", "weight_decay": -1}, "weight_decay must be at least 0"),
        (optimisers, {"name": "adamw", "decay": "some"}, "'all' or 'matrices'"),
        (optimisers, {"name": "adamw", "momentum": 0.9}, "no such key"),
        (optimisers, "torch:adam", "torch.optim has no 'adam' in torch .*; did you mean 'Adam'"),
        (optimisers, "torch:Optimizer", "torch.optim has no 'Optimizer'"),
        (optimisers, "torch:lr_scheduler", "torch.optim has no 'lr_scheduler'"),
        (optimisers, "torch:LBFGS", "LBFGS evaluates the loss again"),
        (optimisers, "torch:SparseAdam", "SparseAdam needs sparse gradients"),
        (optimisers, {"name": "torch", "optimiser": "Adam", "lr": 0}, "lr must be greater than 0"),
        (optimisers, {"name": "torch", "optimiser": "Adam", "options": {"beta": 1}}, "did you mean 'betas'"),
        (optimisers, {"name": "torch", "optimiser": "Adam", "options": {"fused": False}}, "it is set by the recipe"),
        (optimisers, {"name": "torch", "optimiser": "Adam", "options": {"eps": -1}}, "Adam cannot be used so: .*eps"),
        (schedules, {"name": "cosine", "warmup_steps": -1}, "warmup_steps must be at least 0"),
        (schedules, {"name": "cosine", "warmup_steps": 5, "warmup": 1}, "say the same thing"),
        (schedules, {"name": "step", "milestones": [5, 5]}, "ascending epochs"),
        (schedules, {"name": "step", "milestones": [0]}, "ascending epochs"),
        (schedules, {"name": "step", "gamma": 0}, "gamma must lie"),
        (schedules, {"name": "step", "warmup": -1}, "warmup must be at least 0"),
        (schedules, {"name": "cyclic", "peak": 1}, "peak must lie"),
        (schedules, {"name": "cosine", "warmup": -1}, "warmup must be at least 0"),
    ],
)
def test_impossible_settings_are_refused(registry, spec, words):
    with pytest.raises(UserError, match=words):
        registry.build(spec)
