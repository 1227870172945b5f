"""Head 2 learns from a frozen head 1: values, passes, gradients, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

import dualhead
from dualhead.errors import UserError
from dualhead.objectives import Logits, objectives
from dualhead.recipe.schema import parse_recipe
from dualhead.recipe.yaml import load_recipe
from dualhead.training import Passes
from helpers.objectives import climbed, see
from helpers.resume import outcome, train_until
from helpers.training import CallCounter, batch, counting, dual_model, stage_of, step_of, streams_of


def test_the_loss_and_its_gradient_by_hand():
    generator = torch.Generator().manual_seed(0)
    taught, clean, adv = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64).unbind()
    clean.requires_grad_(), adv.requires_grad_()
    y = torch.zeros(4, dtype=torch.int64)
    objective = objectives.build({"name": "distilled", "beta": 3})
    seen = see(objective, clean={"head1": taught, "head2": clean}, attacked={"head2": adv})
    loss = objective.loss(y, seen)
    p, s, attacked = taught.softmax(1), clean.softmax(1), adv.softmax(1)
    by_hand = [(p * (p / q).log()).sum(1) for q in (s, attacked)]
    assert torch.allclose(loss.total, by_hand[0].mean() + 3 * by_hand[1].mean())
    assert torch.allclose(climbed(objective, y, seen), by_hand[1])
    loss.total.backward()
    assert torch.allclose(clean.grad, (s - p) / 4)
    assert torch.allclose(adv.grad, 3 * (attacked - p) / 4)


def test_a_head_that_says_what_its_teacher_says_has_nothing_to_learn():
    same, objective = torch.randn(4, 5), objectives.build("distilled")
    loss = objective.loss(torch.zeros(4), see(objective, clean=same, attacked=same))
    assert float(loss.total) == pytest.approx(0, abs=1e-6)


def test_the_teacher_runs_on_clean_images_alone_and_stays_as_it_is():
    model, data = dual_model(), batch(0, 8)
    before = copy.deepcopy(model.state_dict())
    step = step_of(model, stage_of("distilled", ("head2",), start="gaussian"))
    with CallCounter(trunk=model.trunk, head1=model.head1, head2=model.head2) as calls:
        step(data, streams_of(data))
    # The trunk: clean images, ten steps, attacked images. Head 1: once, for the attack and the loss.
    assert calls == {"trunk": 12, "head1": 1, "head2": 12}
    assert not any(parameter.requires_grad for parameter in model.head1.parameters())
    for name, value in model.state_dict().items():
        assert name.startswith(("head2.", "aggregator.")) or torch.equal(value, before[name]), name
    assert not torch.equal(model.state_dict()["head2.block2.layer.0.conv1.weight"],
                           before["head2.block2.layer.0.conv1.weight"])  # fmt: skip


def test_a_third_head_learns_from_the_first_and_the_second_rests():
    model, data = dual_model(heads=3), batch(0, 8)
    before = copy.deepcopy(model.state_dict())
    stage = stage_of({"name": "distilled", "student": "head3"}, ("head3",), start="gaussian")
    with CallCounter(**{part: model.get_submodule(part) for part in ("trunk", *model.heads)}) as calls:
        step_of(model, stage)(data, streams_of(data))
    assert calls == {"trunk": 12, "head1": 1, "head3": 12}
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head3"}


@pytest.mark.parametrize("forward", ["separate", "joint"])
@pytest.mark.parametrize("micro_batch", [None, 4])
def test_the_teacher_runs_once_an_image_whatever_is_put_together(forward, micro_batch):
    model, data = dual_model(), batch(0, 8)
    seen = []
    model.head1.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    stage = stage_of("distilled", ("head2",), forward=forward, micro_batch=micro_batch, batch_size=8)
    step_of(model, stage)(data, streams_of(data))
    assert seen == ([8] if micro_batch is None else [4, 4])


def test_a_step_takes_27_passes_of_a_head():
    """12 forward, 12 to activations and 2 to weights of the student, and one forward of the teacher."""
    model, data = dual_model(), batch(0, 4)
    step = step_of(model, stage_of("distilled", ("head2",), start="gaussian"))
    with counting(model) as kernels:
        step(data, streams_of(data))
    layer = "block2.layer.0.conv2"

    def passes(head):
        return sum(kernels.counts[kind, f"{head}.{layer}"] for kind in ("forward", "input_gradient", "weight_gradient"))

    assert (passes("head1"), passes("head2")) == (1, 26)


def test_the_attack_climbs_away_from_the_teacher():
    """What is frozen is a constant; through the student alone goes a gradient to the images."""
    model, data = dual_model(), batch(0, 8)
    passes = Passes.of(model, stage_of("distilled", ("head2",)))
    model.eval()
    assert passes.is_constant(Logits("head1")) and not passes.is_constant(Logits("head2", on="attacked"))
    objective = objectives.build("distilled")
    inner, needs = objective.inner()["attacked"], objective.needs()
    used = [needs[name] for name in inner.uses]
    assert used == [Logits("head1"), Logits("head2", on="attacked")]
    features = passes.prefix(data.x)
    seen = passes.look({name: needs[name] for name in inner.uses})({"clean": features, "attacked": features})
    assert torch.allclose(seen["taught"], model.view("head1")(data.x), atol=1e-6)
    assert torch.allclose(seen["adv"], model.view("head2")(data.x), atol=1e-6)


@pytest.mark.parametrize("output", ["head1", "head2", "mean", "aggregate"])
@pytest.mark.parametrize(("objective", "parts"), [("distilled", ("head2",)), ("sat", ("trunk", "head1", "head2"))])
def test_a_stage_deploys_what_it_says_and_trains_as_without(output, objective, parts):
    if objective == "sat":
        objective = {"name": "joint", "aggregate": None, "head1": "sat", "head2": "sat", "attack": "sum"}
    model, data = dual_model(), batch(0, 8)
    twin = copy.deepcopy(model)
    stage = stage_of(objective, parts, deploy=output)
    assert stage.output == output
    step = step_of(model, stage)
    step(data, streams_of(data))
    step_of(twin, stage_of(objective, parts))(data, streams_of(data))
    for (name, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    model.eval()
    whole = model if output == "aggregate" else model.view(output)
    assert torch.allclose(Passes.of(model, stage).logits(data.x), whole(data.x), atol=1e-5)


def recipe(**change):
    content = load_recipe("digits").resolved()
    first, second = content["stages"][:2]
    content["stages"] = [first, {**second, "objective": "distilled", "deploy": "mean", **change}]
    return content


def test_a_run_of_two_stages_ends_in_the_mean_of_its_heads(tmp_path):
    small = recipe()
    for stage in small["stages"]:
        stage |= {"epochs": 1, "batch_size": 64}
    small["data"] |= {"train_limit": 300}
    small["model"] |= {"aggregator": "mean"}
    small["evaluate"] |= {"attacks": ["pgd-2"], "limit": 20, "gallery": 0}
    result = dualhead.train(parse_recipe(small), run_dir=tmp_path / "run")
    named = [row.name for row in result.rows]
    assert named == ["base model", "head 1", "head 2", "mean of heads"], "`mean` merges as the mean: measured once"
    x = torch.rand(3, 1, 8, 8)
    loaded = dualhead.load(tmp_path / "run")
    heads = [dualhead.load(tmp_path / "run", output=head)(x) for head in ("head1", "head2")]
    assert torch.allclose(loaded(x), sum(heads) / 2, atol=1e-6)


def test_a_run_of_three_heads_is_measured_by_all_of_them(tmp_path):
    small = recipe()
    second = small["stages"][1]
    third = {**second, "name": "third_head", "train": ["head3"], "objective": {"name": "distilled", "student": "head3"}}
    small["stages"].append(third)
    for stage in small["stages"]:
        stage |= {"epochs": 1, "batch_size": 64}
    small["data"] |= {"train_limit": 300}
    small["model"] |= {"aggregator": "mean", "heads": 3}
    small["evaluate"] |= {"attacks": ["pgd-2", "multihead-2"], "limit": 20, "gallery": 4}
    result = dualhead.train(parse_recipe(small), run_dir=tmp_path / "run")
    named = [row.name for row in result.rows]
    assert named == ["base model", "head 1", "head 2", "head 3", "mean of heads"]
    flops = {row.name: row.flops for row in result.rows}
    assert flops["head 1"] < flops["head 2"] < flops["head 3"] == flops["mean of heads"]
    one, two, _, three = (row.parameters for row in result.rows[1:])
    assert one == two
    assert one < three < 3 * one, "the trunk is shared"
    assert "multihead-2" in result.rows[-1].evaluation.robust_accuracy
    x = torch.rand(3, 1, 8, 8)
    heads = [dualhead.load(tmp_path / "run", output=f"head{number}")(x) for number in (1, 2, 3)]
    assert torch.allclose(dualhead.load(tmp_path / "run")(x), sum(heads) / 3, atol=1e-6)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "head 3 fails, mean of heads holds" in page, "what merges is called by its name"
    assert "The mean of 3 heads" in (tmp_path / "run" / "model" / "README.md").read_text()


@pytest.mark.slow  # with `make bits`
def test_such_a_stage_resumes_bit_for_bit(tmp_path):
    changes = ["stages.second_head.objective=distilled", "stages.second_head.deploy=mean"]
    assert train_until(tmp_path / "whole", lambda: False, *changes)
    asked = []

    def every_fourth():
        asked.append(None)
        return len(asked) % 4 == 0

    while not train_until(tmp_path / "stopped", every_fourth, *changes):
        pass
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ["head1", "head2"]}, "head1 must not be trained: it would change head1, which is the teacher"),
        ({"train": ["trunk", "head2"]}, "trunk must not be trained: it would change head1"),
        ({"train": ["aggregator"]}, "a loss on head2 changes nothing"),
        ({"objective": {"name": "distilled", "beta": -1}}, "beta must be at least 0"),
        ({"objective": {"name": "joint", "head1": "distilled"}}, "joint is made of base methods"),
        ({"objective": {"name": "distilled", "student": "head1"}}, "teacher and student are both head1"),
        ({"deploy": "head3"}, "'head3' is no output of the model; it has head1, head2, mean, aggregate"),
        ({"deploy": "best"}, "deploy: must be an output, one of head1, head2, ..., mean, aggregate; got 'best'"),
        (
            {"train": ["head3"], "objective": {"name": "distilled", "student": "head3"}},
            "the model has 2 heads, so its parts are trunk, head1, head2, aggregator; got 'head3'",
        ),
        ({"train": ["tail"]}, "must be a part, one of head1, head2, ..., trunk, aggregator, model; got 'tail'"),
    ],
)
def test_what_cannot_be_distilled_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        parse_recipe(recipe(**change))


def test_one_head_deploys_nothing_else():
    content = load_recipe("cifar10_cpu_base").resolved()
    content["stages"][0]["deploy"] = "mean"
    with pytest.raises(UserError, match="deploy: mean is an output of a model with two heads"):
        parse_recipe(content)
