"""Several outputs trained at once: values, passes, gradients, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from dualhead.errors import UserError
from dualhead.objectives import Logits, objectives
from dualhead.objectives.joint import alikeness
from dualhead.objectives.reverse_smoothing import learn_confusions, log_reversed_target
from dualhead.recipe.schema import parse_recipe
from dualhead.recipe.yaml import load_recipe
from dualhead.training import Passes
from helpers.objectives import climbed, see
from helpers.resume import outcome, train_until
from helpers.training import CallCounter, batch, dual_model, stage_of, step_of, streams_of

OUTPUTS = ("head1", "head2", "aggregate")
ALL = ("trunk", "head1", "head2", "aggregator")


def random_logits(outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 6, outputs, 5, generator=generator, dtype=torch.float64), torch.arange(6) % 5


def seen_by(objective, **images):
    """What an objective sees of logits [B, outputs, C] of clean and attacked images."""
    return see(objective, **{on: dict(zip(OUTPUTS, z.unbind(1), strict=False)) for on, z in images.items()})


def test_joint_is_the_weighted_sum_of_its_base_methods():
    (clean, adv), y = random_logits(3)
    spec = {
        "name": "joint", "head1": "sat", "head2": {"name": "trades", "beta": 2}, "aggregate": "mart",
        "head1_weight": 0.5, "head2_weight": 2, "aggregate_weight": 3, "attack": "sum",
    }  # fmt: skip
    joint = objectives.build(spec)
    methods = [(objectives.build(spec[name]), spec[f"{name}_weight"]) for name in OUTPUTS]
    alone = [see(m, clean=clean[:, i], attacked=adv[:, i]) for i, (m, _) in enumerate(methods)]
    seen = seen_by(joint, clean=clean, attacked=adv)
    by_hand = sum(w * m.loss(y, own).total for (m, w), own in zip(methods, alone, strict=True))
    assert torch.allclose(joint.loss(y, seen).total, by_hand)
    inner = sum(w * climbed(m, y, own) for (m, w), own in zip(methods, alone, strict=True))
    assert torch.allclose(climbed(joint, y, seen), inner)
    assert objectives.build(objectives.describe(joint)) == joint


def test_each_head_learns_from_the_merged_prediction_which_learns_nothing_from_it():
    (clean, _), y = random_logits(3)
    clean.requires_grad_()
    joint = objectives.build({"name": "joint", "head1": "natural", "head2": "natural", "aggregate": "natural",
                              "distillation": 2})  # fmt: skip
    term = joint.loss(y, seen_by(joint, clean=clean)).terms["distillation"]
    p = clean.softmax(2)
    by_hand = (p[:, 2:] * (p[:, 2:].log() - p[:, :2].log())).sum((1, 2)).mean() / 2
    assert torch.allclose(term, 2 * by_hand)
    term.backward()
    assert torch.equal(clean.grad[:, 2], torch.zeros(6, 5, dtype=torch.float64))
    assert torch.allclose(clean.grad[:, 0], (p[:, 0] - p[:, 2]) / 6)


@pytest.mark.parametrize("aggregate", ["sat", None])
def test_distillation_is_the_mean_of_both_passes_from_the_aggregate_or_the_mean_of_heads(aggregate):
    (clean, adv), y = random_logits(2 if aggregate is None else 3)
    joint = objectives.build({"name": "joint", "head1": "trades", "head2": "trades", "aggregate": aggregate,
                              "attack": "head1", "distillation": 2})  # fmt: skip
    by_hand = 0.0
    for logits in (clean, adv):
        merged = (logits.mean(1) if aggregate is None else logits[:, 2]).log_softmax(1)
        for head in (0, 1):
            by_hand += (merged.exp() * (merged - logits[:, head].log_softmax(1))).sum(1).mean() / 4
    assert torch.allclose(joint.loss(y, seen_by(joint, clean=clean, attacked=adv)).terms["distillation"], 2 * by_hand)


def test_diversity_is_of_the_attacked_images():
    (clean, adv), y = random_logits(2)
    joint = objectives.build({"name": "joint", "head1": "trades", "head2": "trades", "aggregate": None,
                              "attack": "head1", "diversity": 3})  # fmt: skip
    term = joint.loss(y, seen_by(joint, clean=clean, attacked=adv)).terms["diversity"]
    assert torch.allclose(term, 3 * alikeness(adv[:, 0], adv[:, 1], y).mean())


def test_diversity_by_hand():
    """Wrong classes at (0.8, 0.2) and (0.6, 0.4): the cosine is 0.56 over the lengths."""
    one = torch.tensor([[5.0, math.log(0.8), math.log(0.2)]], dtype=torch.float64)
    other = torch.tensor([[-2.0, math.log(0.6), math.log(0.4)]], dtype=torch.float64)
    cosine = (0.8 * 0.6 + 0.2 * 0.4) / math.sqrt((0.8**2 + 0.2**2) * (0.6**2 + 0.4**2))
    assert float(alikeness(one, other, torch.tensor([0]))) == pytest.approx(-math.log(1 - cosine**2 + 1e-6))


def test_diversity_is_least_for_heads_that_err_alike_and_ignores_the_true_class():
    first = torch.tensor([[9.0, 1.0, 0.0, 0.0]])
    y = torch.tensor([0])
    same, moved = alikeness(first, first, y), alikeness(first, torch.tensor([[-5.0, 1.0, 0.0, 0.0]]), y)
    assert float(same) == pytest.approx(-math.log(1e-6), rel=0.1)
    assert torch.allclose(same, moved, rtol=0.1)
    one, other = torch.tensor([[0.0, 50.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 50.0, 0.0]])
    assert abs(float(alikeness(one, other, y))) < 1e-4


def test_reverse_smoothing_by_hand():
    p, y = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64), torch.tensor([0])
    b = 1.1 * 0.7 / (1.0001 - 0.7)
    expected = [0.7, (1 + b) * 0.2, (1 + b) * 0.1]
    q = log_reversed_target(p.log(), y, torch.tensor([1.1], dtype=torch.float64)).exp()
    assert q[0].tolist() == pytest.approx(expected)
    assert float(q.sum()) == pytest.approx(1 + 1.1 * 0.7, rel=1e-3)  # the mass that the method's description gives
    sure = log_reversed_target(torch.tensor([[0.98, 0.01, 0.01]]).log(), y, torch.tensor([1.0])).exp()
    assert float(sure[0, 0] / sure.sum()) == pytest.approx(0.5, abs=0.01)
    s = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    found = learn_confusions(p.log(), s.log(), y, torch.tensor([1.1], dtype=torch.float64))
    assert float(found) == pytest.approx(sum(a * math.log(a / c) for a, c in zip(expected, s[0].tolist(), strict=True)))


def test_reverse_smoothing_weighs_images_by_what_the_attack_did():
    def one_hot(*classes):
        return 4.0 * F.one_hot(torch.tensor(classes), 3).double()

    y = torch.tensor([0, 0, 0])
    z1, z1_adv = one_hot(0, 0, 1), one_hot(0, 1, 1)  # kept, turned, wrong from the start
    z2 = torch.randn(3, 3, dtype=torch.float64)
    clean, adv = torch.stack((z1, z2), 1), torch.stack((z1_adv, z2), 1)
    objective = objectives.build("reverse_smoothing")
    terms = objective.loss(y, seen_by(objective, clean=clean, attacked=adv)).terms
    alpha = torch.tensor([1.0, 1.1, 0.0], dtype=torch.float64)
    by_hand = learn_confusions(z1_adv, z2, y, alpha)[:2].sum() / 3
    assert torch.allclose(terms["second_adversarial"], by_hand)
    assert torch.allclose(terms["second_clean"], 0.1 * learn_confusions(z1, z2, y, torch.full((3,), 0.9)).mean())


def test_reverse_smoothing_decays_as_published():
    objective = objectives.build("reverse_smoothing")
    for epoch, decays in ((0, 0), (59, 0), (60, 1), (70, 2), (80, 3), (90, 4), (100, 5), (150, 5)):
        now = objective.at(epoch, {})
        first, second = 0.95**decays, 0.8**decays
        weights = (now.clean_weight, now.divergence, now.second_adversarial, now.second_clean)
        assert weights == pytest.approx((first, first, second, 0.1 * second))


def test_reverse_smoothing_trains_head_1_by_its_target_too():
    """As in the public code, whose target is no constant: the gradient of the literal sum."""
    teacher, student = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y, alpha = torch.tensor([0, 1, 2, 0]), torch.full((4,), 1.1, dtype=torch.float64)
    p = teacher.softmax(1)
    true = F.one_hot(y, 3)
    b = 1.1 * (p * true).sum(1, keepdim=True) / (1.0001 - (p * true).sum(1, keepdim=True))
    q = p * (1 + b) - b * p * true
    literal = (q * (q.log() - student.log_softmax(1))).sum()
    found = learn_confusions(teacher, student, y, alpha).sum()
    assert torch.allclose(found, literal)
    for ours, plain in zip(*(torch.autograd.grad(loss, (teacher, student)) for loss in (found, literal)), strict=True):
        assert torch.allclose(ours, plain)


# ---- passes


@pytest.mark.parametrize("attack", ["aggregate", "sum"])
def test_trunk_and_heads_run_once_a_pass_however_many_losses(attack):
    model, data = dual_model(), batch(0, 8)
    step = step_of(model, stage_of({"name": "joint", "attack": attack}, ALL, start="gaussian"))
    with CallCounter(trunk=model.trunk, head1=model.head1, head2=model.head2) as calls:
        result = step(data, streams_of(data))
    assert calls == {"trunk": 13, "head1": 13, "head2": 13}
    assert bool(result.taken)
    assert set(result.terms) == {
        "loss", *(f"{o}_{t}" for o in ("head1", "head2", "aggregate") for t in ("clean", "divergence")),
    }  # fmt: skip


def test_an_attack_on_one_head_does_not_run_the_other():
    model, data = dual_model(), batch(0, 8)
    step = step_of(model, stage_of("reverse_smoothing", ("trunk", "head1", "head2"), start="gaussian"))
    with CallCounter(trunk=model.trunk, head1=model.head1, head2=model.head2) as calls:
        step(data, streams_of(data))
    assert calls == {"trunk": 13, "head1": 13, "head2": 2}


GUIDED = {"name": "joint", "head1": "trades", "head2": "natural", "aggregate": None, "attack": "head1", "guidance": 2}


@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_a_head_that_is_not_trained_on_attacked_images_does_not_see_them(forward):
    model, data = dual_model(), batch(0, 8)
    stage = stage_of(GUIDED, ("trunk", "head1", "head2"), start="gaussian", forward=forward)
    seen = []
    handle = model.head2.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with CallCounter(head1=model.head1, head2=model.head2) as calls:
        step_of(model, stage)(data, streams_of(data))
    handle.remove()
    assert calls == {"head1": 12 if forward == "joint" else 13, "head2": 1}
    assert seen == [8]  # its batch norm knows clean images only
    assert stage.output == "head1"


def rows_of(head):
    """Numbers of images in the passes through a head, as they come."""
    rows = []
    head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    return rows


def joined_and_separate(model, parts, objective):
    """What an objective needs of images and their negatives, seen in one pass and in two, and which rows heads saw."""
    data = batch(0, 8)
    stage = stage_of(objective, parts)
    passes, needs = Passes.of(model, stage), stage.objective.needs()
    model.eval()  # batch norm apart, how images are put together does not matter
    images = {"clean": data.x, "attacked": 1 - data.x}
    crossing = {on: passes.constant(x) for on, x in images.items()}
    rows = {head: rows_of(model.get_submodule(head)) for head in model.heads}
    joined = passes.look(needs, ("clean", "attacked"))(crossing)
    once = {head: list(seen) for head, seen in rows.items()}
    separate = passes.look(needs)(crossing)
    assert joined.keys() == separate.keys() == needs.keys()
    for name, need in needs.items():
        assert torch.allclose(joined[name], separate[name], atol=1e-5), name
        assert torch.allclose(joined[name], model.view(need.output)(images[need.on]), atol=1e-5), name
    return once


@pytest.mark.parametrize("parts", [("trunk", "head1", "head2"), ("head1", "head2")])
def test_a_joint_forward_of_heads_that_see_different_images_is_what_separate_ones_give(parts):
    assert joined_and_separate(dual_model(), parts, GUIDED) == {"head1": [16], "head2": [8]}


@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_a_head_that_is_not_trained_on_clean_images_does_not_see_them(forward):
    model, data = dual_model(), batch(0, 8)
    stage = stage_of({**GUIDED, "head1": "sat"}, ("trunk", "head1", "head2"), forward=forward)
    seen = []
    for number, head in enumerate((model.head1, model.head2), 1):
        head.register_forward_hook(lambda module, inputs, output, number=number: seen.append((number, len(output))))
    result = step_of(model, stage)(data, streams_of(data))
    assert sorted(seen) == [(1, 8)] * 11 + [(2, 8)]  # ten steps of the attack
    assert set(result.terms) == {"loss", "head1_adversarial", "head2_clean", "guidance"}


@pytest.mark.parametrize("parts", [("trunk", "head1", "head2"), ("head1", "head2")])
def test_in_a_joint_forward_each_head_can_have_images_of_its_own(parts):
    assert joined_and_separate(dual_model(), parts, {**GUIDED, "head1": "sat"}) == {"head1": [8], "head2": [8]}


def test_guidance_pulls_head_1_under_attack_and_head_2_on_clean_images_to_one_another():
    (clean, adv), y = random_logits(2)
    clean.requires_grad_(), adv.requires_grad_()
    joint = objectives.build(GUIDED)
    assert joint.outputs == ("head2", "head1")
    assert {need.on for need in joint.needs().values() if need.output == "head2"} == {"clean"}
    merged = objectives.build({"name": "joint", "aggregate": "natural", "attack": "head1"})
    assert merged.needs()[merged.judged] == Logits("aggregate", "attacked")  # although its loss sees clean images alone
    named = {
        on: dict(zip(("head2", "head1"), z.unbind(1), strict=True)) for on, z in (("clean", clean), ("attacked", adv))
    }
    term = joint.loss(y, see(joint, **named)).terms["guidance"]
    distance = adv[:, 1] - clean[:, 0]
    assert torch.allclose(term, 2 * distance.square().mean())
    term.backward()
    assert torch.allclose(adv.grad[:, 1], 4 * distance.detach() / distance.numel())
    assert torch.allclose(clean.grad[:, 0], -adv.grad[:, 1])
    assert not clean.grad[:, 1].any()
    assert not adv.grad[:, 0].any()


def test_one_joint_step_is_the_loop_written_plainly():
    ours, theirs = dual_model(), dual_model()
    data = batch(0, 8)
    spec = {"name": "joint", "head1": "sat", "head2": "natural", "aggregate": "sat", "head2_weight": 0.5}
    step = step_of(ours, stage_of(spec, ALL, lr=0.01))
    theirs.eval()
    streams, x_adv = streams_of(data), None
    x, eps = data.x, 8 / 255
    x_adv = (x + eps * (2 * streams.uniform(*x.shape[1:]) - 1)).clamp(0, 1)
    for _ in range(10):
        x_adv.requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(theirs(x_adv), data.y, reduction="sum"), x_adv)
        x_adv = torch.min(torch.max(x_adv.detach() + 2 / 255 * g.sign(), x - eps), x + eps).clamp(0, 1)
    theirs.train()
    optimiser = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    features, attacked = theirs.trunk(x), None
    clean2 = theirs.head2(features)
    attacked = theirs.trunk(x_adv)
    both = torch.stack((theirs.head1(attacked), theirs.head2(attacked)), 1)
    loss = F.cross_entropy(both[:, 0], data.y) + 0.5 * F.cross_entropy(clean2, data.y)
    (loss + F.cross_entropy(theirs.aggregator(both), data.y)).backward()
    optimiser.step()
    step(data, streams_of(data))
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), atol=2e-4), name


def test_frozen_parts_stay_bit_equal_while_the_rest_trains_jointly():
    model, data = dual_model(), batch(0, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spec = {"name": "joint", "head1": None, "aggregate": "sat"}
    step_of(model, stage_of(spec, ("head2", "aggregator")))(data, streams_of(data))
    for name, value in model.state_dict().items():
        frozen = name.startswith(("trunk.", "head1."))
        assert not frozen or torch.equal(value, before[name]), name
    assert all(p.grad is None for part in (model.trunk, model.head1) for p in part.parameters())


@pytest.mark.parametrize("deployed", ["head1", "head2", "mean", "aggregate"])
def test_passes_give_the_deployed_output_and_call_the_trained_one_the_stage_s_own(deployed):
    model, x = dual_model(), batch(0, 4).x
    passes = Passes(model, ALL, deployed=deployed)
    model.eval()
    assert passes.trained == "aggregate"
    assert torch.allclose(passes.logits(x), model.view(deployed)(x) if deployed != "aggregate" else model(x))
    seen = passes.look({"own": Logits(), "second": Logits("head2")})({"clean": passes.prefix(x)})
    assert torch.allclose(seen["own"], model(x))
    assert torch.allclose(seen["second"], model.view("head2")(x))


JOINT = [
    "stages.*.epochs=1",
    "stages.main_head.train=[trunk, head1, head2, aggregator]",
    "stages.main_head.objective={name: joint, distillation: 0.5, diversity: 0.1}",
]


@pytest.mark.slow  # with `make bits`
def test_a_joint_stage_within_a_run_resumes_bit_for_bit(tmp_path):
    assert train_until(tmp_path / "whole", lambda: False, *JOINT)
    asked = []

    def every_fourth():
        asked.append(None)
        return len(asked) % 4 == 0

    while not train_until(tmp_path / "stopped", every_fourth, *JOINT):
        pass
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_head1_learns_from_a_loss_on_a_head_that_is_tied_to_it():
    content = load_recipe("digits").resolved()
    content["stages"] = [{**content["stages"][0], "train": ["trunk", "head1", "head2"], "objective": "sat"}]
    content["model"] |= {"second_head": "tied", "aggregator": "mean"}
    assert parse_recipe(content).stages[0].output == "head2"
    content["stages"][0]["train"] = ["head1"]
    content["stages"][0]["objective"] = {"name": "trades", "clean": "head1", "robust": "head2"}
    parse_recipe(content)
    content["model"]["second_head"] = "clone"
    with pytest.raises(UserError, match="a loss on head2 changes nothing"):
        parse_recipe(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ["trunk", "head1", "head2"], "objective": "sat"}, "head1 would learn nothing, since the loss is on"),
        ({"train": ["aggregator"], "objective": "joint"}, "a loss on head1 changes nothing"),
        ({"train": ["trunk"], "objective": {"name": "joint", "aggregate": None}}, "attack: aggregate has no adversar"),
        ({"objective": {"name": "joint", "head1": None, "head2": None}}, "joint needs at least two of"),
        ({"objective": {"name": "joint", "head1": "joint"}}, "joint is made of base methods"),
        ({"objective": {"name": "joint", "head1": None, "distillation": 1}}, "need a loss on head1 and on head2"),
        ({"objective": {"name": "joint", "head2": None, "guidance": 1}}, "guidance needs an adversarial base method"),
        *(
            ({"objective": {"name": "joint", "head1": one}}, "joint is made of base methods that are a loss alone")
            for one in (  # a window, a penalty, an attack of its own, and a penalty within another method
                "balanced",
                {"name": "ewc", "old": "Linf:0.1"},
                {"name": "msd", "among": ["Linf:0.1", "L1:3"]},
                {"name": "logit_pairing", "base": {"name": "ewc", "old": "Linf:0.1"}},
            )
        ),
        ({"objective": {"name": "joint", "guidance": -1}}, "guidance must be at least 0"),
    ],
)
def test_what_cannot_be_trained_jointly_is_refused(change, message):
    content = load_recipe("digits").resolved()
    content["stages"] = [{**content["stages"][0], "train": list(ALL), **change}]
    with pytest.raises(UserError, match=message):
        parse_recipe(content)
