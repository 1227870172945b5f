"""HAT: a standard model's labels beyond the ball, from a stage of the same run or from weights that exist."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
import yaml
from pydantic import ValidationError

from dualhead.errors import Interrupted, UserError
from dualhead.models import read_state
from dualhead.objectives import objectives
from dualhead.objectives.base import kl_divergence
from dualhead.recipe.yaml import load_recipe
from dualhead.runs.run import train
from dualhead.saving.architecture import Architecture
from dualhead.system.arithmetic import FLOAT32
from dualhead.system.flops import CountFlops
from dualhead.training import Passes, Stage
from dualhead.training.step import TrainingStep
from helpers.objectives import climbed, see
from helpers.resume import outcome
from helpers.training import THREAT, CallCounter, batch, dual_model, plain_model, stage_of, step_of, streams_of


def hat(**fields):
    return {"name": "hat", "weights": "any", **fields}


def step_with(model, standard, parts=("model",), **fields):
    stage = stage_of(hat(**fields), parts, lr=0.01)
    passes = Passes.of(model, stage, teachers={"helper": standard})
    return TrainingStep(passes, stage, THREAT, stage.optimiser.create(passes.parameters()), FLOAT32)


def test_the_loss_and_its_gradient_by_hand():
    generator = torch.Generator().manual_seed(0)
    clean, adv, told, far = torch.randn(4, 6, 5, generator=generator, dtype=torch.float64).unbind()
    far.requires_grad_()
    y = torch.arange(6) % 5
    base, objective = objectives.build({"name": "trades", "beta": 2.5}), objectives.build(hat(gamma=0.7))
    seen = see(objective, clean=clean, attacked={"": adv, "helper": told}, beyond=far)
    alone = see(base, clean=clean, attacked=adv)
    loss = objective.loss(y, seen)
    labels = told.argmax(1)
    by_hand = -far.log_softmax(1)[torch.arange(6), labels].mean()
    assert torch.allclose(loss.terms["helper"], 0.7 * by_hand)
    assert torch.allclose(loss.total, base.loss(y, alone).total + 0.7 * by_hand)
    assert torch.equal(climbed(objective, y, seen), climbed(base, y, alone)), "the attack is the base method's"
    loss.total.backward()
    assert torch.allclose(far.grad, 0.7 * (far.softmax(1) - F.one_hot(labels, 5)).detach() / 6)


def test_beyond_the_ball_lie_the_images_stretched_and_beyond_black_and_white_too():
    clean, attacked = torch.tensor([[[[0.0, 0.5, 0.9]]]]), torch.tensor([[[[0.1, 0.4, 1.0]]]])
    made = objectives.build(hat(stretch=3)).views({"clean": clean, "attacked": attacked})
    assert set(made) == {"beyond"}
    assert torch.allclose(made["beyond"], torch.tensor([[[[0.3, 0.2, 1.2]]]]))


@pytest.mark.parametrize("base", ["sat", "mart", "logit_pairing", "hybrid"])
def test_without_weight_it_is_its_base_method(base):
    generator = torch.Generator().manual_seed(1)
    clean, adv, told, far = torch.randn(4, 6, 5, generator=generator).unbind()
    y, alone, objective = torch.arange(6) % 5, objectives.build(base), objectives.build(hat(gamma=0, base=base))
    seen = see(objective, clean=clean, attacked={"": adv, "helper": told}, beyond=far)
    own = see(alone, clean=clean, attacked=adv)
    assert torch.equal(objective.loss(y, seen).total, alone.loss(y, own).total)
    assert torch.equal(climbed(objective, y, seen), climbed(alone, y, own))
    assert objective.judged == alone.judged or objective.needs()[objective.judged] == alone.needs()[alone.judged]


def test_a_step_descends_by_trades_and_the_helper_term():
    ours, standard, data = plain_model(), plain_model(seed=5), batch(0, 8)
    theirs = copy.deepcopy(ours)
    reference = step_of(theirs, stage_of({"name": "trades", "beta": 2.5}, ("model",), lr=0.01))
    x_adv = reference._prepare(data, streams_of(data), {}).crossing["attacked"]
    labels = copy.deepcopy(standard).eval()(x_adv).argmax(1)

    outcome_ = step_with(ours, standard, gamma=0.7, stretch=3.0)(data, streams_of(data))

    theirs.train()
    clean, adv, far = (theirs(x) for x in (data.x, x_adv, data.x + 3.0 * (x_adv - data.x)))
    term = 0.7 * F.cross_entropy(far, labels)
    loss = F.cross_entropy(clean, data.y) + 2.5 * kl_divergence(clean, adv).mean() + term
    optimiser = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    loss.backward()
    optimiser.step()
    assert float(outcome_.terms["helper"]) == pytest.approx(term.item(), rel=1e-4)
    assert float(outcome_.terms["loss"]) == pytest.approx(loss.item(), rel=1e-4)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-5), name


def test_it_costs_four_passes_and_leaves_the_standard_model_as_it_is():
    model, standard, data = plain_model(), plain_model(seed=5), batch(0, 4)
    before = {name: value.clone() for name, value in standard.state_dict().items()}
    costs = []
    steps = (step_of(plain_model(), stage_of("trades", ("model",), lr=0.01)), step_with(model, standard))
    for step in steps:
        with CountFlops() as counter:
            step(data, streams_of(data))
        costs.append(counter.total)
    with CountFlops() as forward, torch.no_grad():
        model(data.x)
    assert 3.5 < (costs[1] - costs[0]) / forward.total <= 4
    assert all(torch.equal(value, before[name]) for name, value in standard.state_dict().items())


def test_only_the_head_that_is_deployed_sees_the_images_beyond_the_ball():
    guided = {"name": "joint", "head1": "trades", "head2": "natural", "aggregate": None, "attack": "head1",
              "guidance": 1}  # fmt: skip
    model, data = dual_model(), batch(0, 8)
    step = step_with(model, plain_model(seed=5), ("trunk", "head1", "head2"), base=guided)
    seen = []
    model.head2.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with CallCounter(head1=model.head1) as calls:
        assert "helper" in step(data, streams_of(data)).terms
    assert calls["head1"] == 14  # ten steps and the start's target, clean, attacked, and beyond
    assert seen == [8]


@pytest.mark.parametrize("objective", ["trades", {"name": "sat", "label_smoothing": 0.1}])
def test_a_stage_as_it_was_written_before_reads_as_the_objective(objective):
    """Runs that are finished hold `helper` beside their objective, and null where a stage has none."""
    fields = {"weights": "standard", "gamma": 0.25, "stretch": 3}
    old = stage_of(objective, ("model",), helper=fields)
    assert old == stage_of({"name": "hat", **fields, "base": objective}, ("model",))
    assert old.objective == objectives.build({"name": "hat", **fields, "base": objective})
    assert not hasattr(old, "helper")
    assert stage_of(objective, ("model",), helper=None) == stage_of(objective, ("model",))


def test_a_helper_without_an_objective_is_refused_as_before():
    with pytest.raises(ValidationError, match="objective"):
        Stage.model_validate({"name": "hat", "train": ("model",), "epochs": 1, "helper": {"weights": "x"}})


def hat_recipe(folder, *, weights="standard", init="reset", old=False, **more):
    """Natural training and HAT on few digits; `old`: as stages were written before it was an objective."""
    fields = {"weights": weights, **more}
    method = (
        {"objective": "trades", "helper": fields} if old else {"objective": {"name": "hat", "base": "trades", **fields}}
    )
    short = {"epochs": 1, "batch_size": 32, "train": ["model"]}
    content = {
        "data": {"source": "digits", "validation": 32, "train_limit": 128},
        "model": {"backbone": "cnn-2"},
        "threat": {"norm": "Linf", "eps": 0.1},
        "stages": [
            {"name": "standard", "objective": "natural", **short},
            {
                "name": "hat", **method, "attack": "pgd-2", "init": init, **short, "epochs": 2,
            },
        ],
        "validation": {"attack": "pgd-1"},
        "evaluate": {"attacks": ["pgd-2"], "limit": 16, "gallery": 0},
        "runtime": {"device": "cpu", "precision": "float32", "layout": "channels_last", "lanes": 1},
    }  # fmt: skip
    path = folder / "hat.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_recipe(str(path))


def test_a_recipe_as_it_was_written_before_is_the_same_recipe(tmp_path):
    assert hat_recipe(tmp_path, gamma=0.3, old=True).resolved() == hat_recipe(tmp_path, gamma=0.3).resolved()


def test_a_stage_of_the_run_is_the_helper_and_the_next_begins_afresh(tmp_path):
    """Without epochs the stage ends where the run began, not where natural training did."""
    recipe = hat_recipe(tmp_path)
    still = recipe.stages[1].model_copy(update={"epochs": 0})
    recipe = recipe.model_copy(update={"stages": (recipe.stages[0], still)})
    train(recipe, run_dir=tmp_path / "run")
    ended = read_state(tmp_path / "run" / "checkpoints" / "hat" / "last.safetensors")
    natural = read_state(tmp_path / "run" / "checkpoints" / "standard" / "last.safetensors")
    torch.manual_seed(0)
    config = json.loads((tmp_path / "run" / "checkpoints" / "config.json").read_text())
    begun = Architecture.parse(config["architecture"], "config").create()
    for name, parameter in begun.named_parameters():
        assert torch.equal(ended[name], parameter), name
    assert any(not torch.equal(natural[name], parameter) for name, parameter in begun.named_parameters())


def test_a_finished_run_is_the_helper_and_gives_the_same_numbers(tmp_path):
    within = train(hat_recipe(tmp_path), run_dir=tmp_path / "within")
    only = hat_recipe(tmp_path)
    train(only.model_copy(update={"stages": only.stages[:1]}), run_dir=tmp_path / "standard")
    recipe = hat_recipe(tmp_path, weights=str(tmp_path / "standard"))
    lines = [json.loads(line) for line in (tmp_path / "within" / "metrics.jsonl").read_text().splitlines()]
    assert [("helper" in line) for line in lines] == [False, True, True]
    beside = train(recipe, run_dir=tmp_path / "beside")
    for a, b in zip(within.model.state_dict().values(), beside.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_stopped_at_steps_it_goes_on_bit_for_bit(tmp_path):
    train(hat_recipe(tmp_path), run_dir=tmp_path / "whole")
    asked, stopped = [], 0
    while True:
        try:
            train(
                hat_recipe(tmp_path), run_dir=tmp_path / "stopped", stop=lambda: asked.append(0) or len(asked) % 4 == 0
            )
        except Interrupted:
            stopped += 1
        else:
            break
    assert stopped >= 2
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_what_cannot_be_a_helper_is_refused_before_anything_is_written(tmp_path):
    for fields, message in (
        ({"weights": "nowhere"}, "stages.1.objective, teacher helper: nowhere: there is no such folder"),
        ({"weights": "hat"}, "stages.1.objective, teacher helper: hat: there is no such folder"),
        ({"stretch": 1}, "stages.hat.objective: stretch must be greater than 1, got 1; 2 is as published"),
        ({"gamma": -1}, "stages.hat.objective: gamma must be at least 0, got -1"),
        ({"base": {"name": "hat", "weights": "x"}}, "stages.hat.objective: hat is its own base method"),
        ({"base": "natural"}, "stages.hat.objective: hat labels attacked images, and its base method has none"),
    ):
        with pytest.raises(UserError, match=message):
            train(hat_recipe(tmp_path, **fields), run_dir=tmp_path / "run")
        assert not (tmp_path / "run").exists()
    with pytest.raises(ValidationError, match="hat labels attacked images, and its base method has none"):
        stage_of("natural", ("model",), helper={"weights": "x"})
