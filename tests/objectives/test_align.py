"""Alignment: each distance by hand, steps against loops, the balance of AR-AT, and what is refused."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it

from dualhead.errors import UserError
from dualhead.heads import attach_second_head
from dualhead.noise import Streams
from dualhead.objectives import objectives
from dualhead.objectives.align import DomainHead, Predictor, cosine_distance, kl, mmd, pooled, squared_l2
from dualhead.recipe.yaml import load_recipe
from dualhead.system.arithmetic import FLOAT32
from dualhead.system.modes import in_eval_mode
from dualhead.threats import ThreatModel
from dualhead.training import Passes
from dualhead.training.curriculum import Curriculum
from dualhead.training.step import TrainingStep
from helpers.resume import outcome, train_until
from helpers.training import THREAT, batch, dual_model, plain_model, stage_of, streams_of

LN = math.log
EVERY = ("trunk", "head1", "head2")
U = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
V = torch.tensor([[1.0, 1.0], [4.0, -3.0]])


def test_distances_by_hand():
    assert float(cosine_distance(V, U)) == pytest.approx((1 - 1 / math.sqrt(2) + 1) / 2)
    assert float(squared_l2(V, U)) == pytest.approx((0 + 1 + 1 + 49) / 4)
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    assert float(kl(q.log(), p.log())) == pytest.approx(0.5 * LN(2) + 0.5 * LN(2 / 3))
    # Rows 0 and 2 alone: mean squared distance over the four pairs 2, so kernel values 1 and exp(-2).
    assert float(mmd(torch.tensor([[0.0]]), torch.tensor([[2.0]]))) == pytest.approx(2 - 2 * math.exp(-2))
    assert float(mmd(U, U)) == pytest.approx(0, abs=1e-6)
    assert float(mmd(U, U.flip(0))) == pytest.approx(0, abs=1e-6)  # of samples, not of pairs
    maps = torch.tensor([[[[1.0, -3.0], [2.0, 4.0]]]])
    assert float(pooled(maps)) == 1.0
    assert float(pooled(maps, rectify=True)) == 7 / 4


def step_on(model, stage, data, seed=3, epoch=0):
    """Gradients and terms of one step of ours on a copy."""
    passes = Passes.of(copy.deepcopy(model), stage, example=data.x[:1], seed=seed)
    step = TrainingStep(passes, stage, THREAT, stage.optimiser.create(passes.parameters()), FLOAT32)
    step.begin(epoch, stage.objective.begin())
    outcome = step(data, streams_of(data))
    return passes, {n: p.grad for n, p in passes.learners.named_parameters() if p.grad is not None}, outcome.terms


@pytest.mark.parametrize("distance", ["cosine", "l2", "kl", "mmd", "domain"])
def test_a_step_descends_the_formula(distance):
    model, data = dual_model(), batch(0)
    spec = {"name": "align", "base": {"name": "hybrid", "clean": "head2", "robust": "head1"}, "distance": distance}
    spec |= {"weight": 3, **({"reversal": 0.5} if distance == "domain" else {})}
    if distance in ("cosine", "l2", "kl"):
        spec["predictor"] = True
    stage = stage_of(spec, EVERY, attack="pgd-2")
    assert stage.output == "head1"
    passes, gradients, terms = step_on(model, stage, data)

    net = copy.deepcopy(model).train()
    net.set_trainable(set(EVERY))
    with in_eval_mode(net):
        x_adv = stage.attack.start_point(data.x, THREAT, streams_of(data))
        for _ in range(2):
            x_adv = x_adv.detach().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(net.head("head1", net.features(x_adv)), data.y), x_adv)
            x_adv = THREAT.project(THREAT.ascend(x_adv.detach(), slope, stage.attack.step_length(THREAT)), data.x)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        own = DomainHead(16) if distance == "domain" else Predictor(16)
    u = net.features(data.x)
    clean = F.cross_entropy(net.head("head2", u), data.y)
    v = net.features(x_adv)
    attacked = F.cross_entropy(net.head("head1", v), data.y)
    u, v = u.mean((2, 3)), v.mean((2, 3))
    if distance == "domain":
        for of in (u, v):
            of.register_hook(lambda grad: grad * -0.5)
        d_u, d_v = own(u), own(v)
        apart = -d_u.log_softmax(1)[:, 0].mean() - d_v.log_softmax(1)[:, 1].mean()
    else:
        u = u.detach()
        v = v if distance == "mmd" else own(v)
        log_p, log_q = u.log_softmax(1), v.log_softmax(1)
        cosines = F.normalize(u, dim=1).mul(F.normalize(v, dim=1)).sum(1)
        apart = {
            "cosine": 1 - cosines.mean(),
            "l2": ((u - v) ** 2).mean(),
            "kl": (log_p.exp() * (log_p - log_q)).sum(1).mean(),
            "mmd": mmd(v, u),
        }[distance]
    ((clean + attacked) / 2 + 3 * apart).backward()
    assert float(terms["alignment"]) == pytest.approx(3 * float(apart.detach()), rel=1e-4)
    by_hand = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    ours = {n.removeprefix("0."): g for n, g in gradients.items() if not n.startswith("1.")}
    assert set(ours) == set(by_hand)
    for name, grad in by_hand.items():
        assert torch.allclose(ours[name], grad, atol=2e-5, rtol=2e-3), name
    if distance != "mmd":
        for one, other in zip(passes.heads.parameters(), own.parameters(), strict=True):
            assert torch.allclose(one.grad, other.grad, atol=2e-5, rtol=2e-3)


def test_logits_of_an_output_are_aligned_and_the_base_method_is_judged():
    align = objectives.build({
        "name": "align", "base": {"name": "hybrid", "clean": "head2", "robust": "head1"}, "distance": "kl",
        "output": "head2", "stop_gradient": False, "weight": 2,
    })  # fmt: skip
    assert align.judged == "q"
    assert align.judged_output == "head1"
    u, v = torch.tensor([[0.5, 0.5]]).log().requires_grad_(), torch.tensor([[0.25, 0.75]]).log().requires_grad_()
    seen = {"align0_clean": u, "align0_attacked": v, "p": torch.zeros(1, 2), "q": torch.zeros(1, 2)}
    terms = align.loss(torch.tensor([0]), seen).terms
    assert float(terms["alignment"].detach()) == pytest.approx(2 * (0.5 * LN(2) + 0.5 * LN(2 / 3)))
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(terms["alignment"], (u, v)))


def test_the_reversal_grows_as_published():
    align = objectives.build({"name": "align", "base": "trades", "distance": "domain", "ramp": 10})
    assert align.at(0, {}).reversal == 0
    assert align.at(3, {}).reversal == pytest.approx(2 / (1 + math.exp(-3)) - 1)
    assert align.at(10, {}).reversal == align.at(99, {}).reversal == pytest.approx(2 / (1 + math.exp(-10)) - 1)


def test_weight_0_is_the_base_method():
    model, data = plain_model(), batch(0)
    aligned = {"name": "align", "base": "hybrid", "weight": 0, "layers": ["bn1"], "clean": "model", "robust": "model"}
    _, ours, _ = step_on(model, stage_of(aligned, ("model",), attack="pgd-2"), data)
    _, base, _ = step_on(model, stage_of("hybrid", ("model",), attack="pgd-2"), data)
    assert all(torch.equal(ours[name], grad) for name, grad in base.items())


AR_AT = {
    "name": "align", "base": {"name": "balanced", "clean": "head1", "robust": "head2"}, "weight": 30,
    "layers": ["block3.layer.0.bn2", "bn1"], "clean": "head1", "robust": "head2", "predictor": True, "rectify": True,
}  # fmt: skip


@pytest.mark.parametrize("predictor", [True, False])
def test_ar_at_by_hand(predictor):
    base, data = plain_model(), batch(0)
    tied = attach_second_head(base, "input", example=data.x[:2], init="tied", own=["batch_norm"])
    stage = stage_of({**AR_AT, "predictor": predictor}, EVERY, attack="pgd-2")
    assert stage.output == "head2"  # the adversarial route is deployed
    passes, _, terms = step_on(tied, stage, data)
    objective = stage.objective
    seen, head = {}, copy.deepcopy(tied).train()
    x_adv = TrainingStep(
        Passes.of(copy.deepcopy(tied), stage, example=data.x[:1], seed=3), stage, THREAT,
        stage.optimiser.create(tied.parameters()), FLOAT32,
    )._make(data, Streams.of(7, data.index).fork("attack"), {})[0]["attacked"]  # fmt: skip
    u, v = {}, {}
    for route, x, into in (("head1", data.x, u), ("head2", x_adv, v)):
        part = head.get_submodule(route)
        hooks = [
            part.get_submodule(layer).register_forward_hook(lambda m, a, out, k=layer, into=into: into.update({k: out}))
            for layer in objective.layers
        ]
        seen[route] = head.head(route, head.features(x))
        for hook in hooks:
            hook.remove()
    apart = []
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for layer in objective.layers:
            target, moved = u[layer].relu().mean((2, 3)).detach(), v[layer].relu().mean((2, 3))
            made = Predictor(64)(moved) if predictor else moved
            apart.append(1 - F.cosine_similarity(made, target, dim=1).mean())
    clean, attacked = (F.cross_entropy(seen[route], data.y) for route in ("head1", "head2"))
    assert float(terms["clean"]) == pytest.approx(0.9 * float(clean.detach()), rel=1e-4)
    assert float(terms["adversarial"]) == pytest.approx(0.1 * float(attacked.detach()), rel=1e-4)
    assert float(terms["alignment"]) == pytest.approx(30 / 2 * float(sum(apart).detach()), rel=1e-4)
    assert len(passes.heads) == (2 if predictor else 0)


def test_the_balance_is_the_accuracy_of_the_epoch_before():
    balanced = objectives.build({"name": "align", "base": "balanced", "layers": ["bn1"], "clean": "model",
                                 "robust": "model"})  # fmt: skip
    curriculum = Curriculum(balanced, steps=2)
    assert balanced.at(0, curriculum.state).base.weight == 0.1
    p = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    losses = [balanced.base.loss(torch.tensor(y), {"p": p, "q": p}) for y in ([0, 0], [0, 1])]
    assert [float(loss.figures["clean_accuracy"]) for loss in losses] == [1.0, 0.5]
    taken = torch.tensor(True)
    assert not curriculum.add(losses[0].figures, taken)
    resumed = Curriculum(balanced, steps=2)
    resumed.load_state_dict(curriculum.state_dict(), torch.device("cpu"))
    for each in (curriculum, resumed):
        assert each.add(losses[1].figures, taken)
        assert each.state == {"weight": 0.75}
    now = balanced.at(1, curriculum.state).base.loss(torch.tensor([0, 1]), {"p": p, "q": p})
    one, other = LN(1 + math.exp(-2)), LN(1 + math.exp(2))
    assert float(now.terms["adversarial"]) == pytest.approx(0.75 * (one + other) / 2)
    assert float(now.terms["clean"]) == pytest.approx(0.25 * (one + other) / 2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"base": "natural"}, "needs an adversarial base method; 'natural' attacks nothing"),
        ({"base": "align"}, "align is its own base method; list all layers in one"),
        ({"weight": -1}, "must be at least 0"),
        ({"output": "head2", "layers": ["x"]}, "output: aligns logits"),
        ({"predictor": True, "distance": "domain"}, "predictor: predicts pair by pair, which domain"),
        ({"predictor": True, "distance": "mmd"}, "predictor: predicts pair by pair, which mmd"),
        ({"distance": "domain", "stop_gradient": False}, "domain has no target to stop"),
        ({"ramp": 5}, "reversal and ramp are of distance domain"),
        ({"layers": ["bn1", "bn1"]}, "names one twice: bn1"),
        ({"clean": "head1"}, "name layers of the parts clean and robust"),
    ],
)
def test_what_does_not_fit_is_told_in_a_line(change, told):
    with pytest.raises(UserError, match=told) as caught:
        objectives.build({"name": "align", **change})
    assert "\n" not in str(caught.value)


def test_the_balance_outside_0_to_1_is_refused():
    with pytest.raises(UserError, match=r"weight must lie in \[0, 1\]"):
        objectives.build({"name": "balanced", "weight": 1.5})


def test_what_knows_the_batch_is_refused_in_pieces():
    for change in ({"predictor": True}, {"distance": "mmd"}, {"distance": "domain"}):
        with pytest.raises(Exception, match="micro_batch: the loss of 'align'"):
            stage_of({"name": "align", **change}, EVERY, micro_batch=8)
    stage_of({"name": "align"}, ("trunk", "head2"), micro_batch=8)


def test_ar_at_within_a_run_resumes_bit_for_bit(tmp_path):
    words = (
        "data.source=digits", "model.attach_at=input", "validation.every=2", "stages.*.attack.steps=1",
        "runtime.precision=float32", "runtime.layout=contiguous", "runtime.lanes=1",  # and not what is measured
    )  # fmt: skip
    assert train_until(tmp_path / "whole", lambda: False, *words, base="cifar10_cpu_ar_at")
    log = outcome(tmp_path / "whole")["metrics"]
    assert log[0]["adversarial_weight"] == pytest.approx(0.1)
    assert log[1]["adversarial_weight"] == pytest.approx(log[0]["clean_accuracy"])
    asked = []

    def every_other():
        asked.append(None)
        return len(asked) % 2 == 0

    while not train_until(tmp_path / "stopped", every_other, *words, base="cifar10_cpu_ar_at"):
        pass
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_the_published_settings_of_ar_at():
    recipe = load_recipe("cifar10_resnet18_ar_at")
    (stage,) = recipe.stages
    align = stage.objective
    assert align.layers == ("layer4.0.bn1", "layer4.0.bn2", "layer4.1.bn1", "layer4.1.bn2")
    assert (align.distance, align.weight, align.predictor, align.rectify, align.stop_gradient) == (
        "cosine", 30, True, True, True,
    )  # fmt: skip
    assert (align.base.registered_name, align.clean, align.robust, stage.output) == (
        "balanced", "head1", "head2", "head2",
    )  # fmt: skip
    assert (stage.epochs, stage.batch_size, stage.optimiser.lr, stage.optimiser.weight_decay) == (100, 128, 0.1, 5e-4)
    assert (stage.attack.steps, stage.attack.step_size) == (10, pytest.approx(2 / 255))
    assert recipe.threat == ThreatModel("Linf", 8 / 255)
