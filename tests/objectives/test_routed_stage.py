"""A stage that trains one router: its loss by hand, its pseudo-tasks, and what it leaves as it is."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it

from dualhead.data import StreamImages
from dualhead.errors import UserError
from dualhead.heads import attach_second_head
from dualhead.heads.aggregators import aggregators
from dualhead.models import Normalize, backbones
from dualhead.objectives import Features, Logits, objectives
from dualhead.system.arithmetic import FLOAT32
from dualhead.threats import ThreatModel
from dualhead.training import Passes
from dualhead.training.step import TrainingStep
from helpers.training import THREAT, batch, counting, stage_of, streams_of

L2 = {"norm": "L2", "eps": 0.3}


def build(**fields):
    return objectives.build({"name": "after_dder", **fields})


def model(**fields):
    torch.manual_seed(0)
    backbone = backbones.build("cnn-4")
    base = backbone.create(10, (3, 12, 12), Normalize([0.5] * 3, [0.25] * 3))
    aggregator = aggregators.build({"name": "after_dder", **fields})
    dual = attach_second_head(base, "stage1", example=torch.rand(2, 3, 12, 12), heads=3, aggregator=aggregator)
    dual.part("router1").trained.fill_(1)
    return dual


def step_of(dual, objective, parts):
    stage = stage_of(objective, parts)
    passes = Passes.of(dual, stage)
    return TrainingStep(passes, stage, THREAT, stage.optimiser.create(passes.parameters()), FLOAT32)


def further(data):
    return {"noise": StreamImages(torch.rand(data.x.shape, generator=torch.Generator().manual_seed(3)))}


def test_the_loss_by_hand():
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor([0, 2, 1, 3])
    clean, attacked = torch.randn(2, 4, 5, generator=generator)
    weights = torch.rand(4, 3, generator=generator)
    objective = build(router=2, old=["Linf:0.1"], clean=0.25, sentinel=2.0, balance=0.5)
    scores = {name: torch.randn(4, 1, generator=generator) for name in objective.needs() if name.startswith("score")}
    assert set(scores) == {"score_attacked", "score_clean", "score_old1", "score_noisy", "score_mixed"}
    found = objective.loss(y, {"clean": clean, "attacked": attacked, "weights": weights, **scores})
    load = weights.sum(0)
    own = -torch.sigmoid(scores.pop("score_attacked")).log().mean()
    others = torch.stack([-(1 - torch.sigmoid(s)).log().mean() for s in scores.values()]).mean()
    expected = (
        F.cross_entropy(attacked, y) + 0.25 * F.cross_entropy(clean, y) + 2.0 * (own + others) / 2
        + 0.5 * (load - load.mean()).square().mean() / load.mean() ** 2
    )  # fmt: skip
    torch.testing.assert_close(found.total, expected)
    assert 0 <= float(found.figures["sentinel_right"]) <= 1


def test_clean_images_are_the_first_routers_own_and_later_ones_leave_them():
    assert "score_clean" in build(router=1).needs()
    zero = {name: torch.zeros(2, 1) for name in build(router=1).needs()}
    far = {"score_clean": torch.full((2, 1), 50.0)}
    logits = {"clean": torch.zeros(2, 3), "attacked": torch.zeros(2, 3), "weights": torch.ones(2, 3)}
    y = torch.tensor([0, 1])
    first, second = (build(router=n, rest=["noisy"]).loss(y, {**zero, **logits, **far}).terms for n in (1, 2))
    assert first["sentinel"] < second["sentinel"]


def test_pseudo_tasks_are_made_of_clean_images_and_attacked_through_old_routers():
    objective = build(router=3, old=["Linf:0.1", {**L2, "attack": "pgd-3"}])
    assert list(objective.inner()) == ["attacked", "old1", "old2"]
    assert objective.inner()["old2"].through == {"through": Logits("router2", "old2")}
    assert objective.threats() == (None, ThreatModel("Linf", 0.1), ThreatModel("L2", 0.3))
    x, drawn = torch.rand(2, 4, 1, 2, 2)
    made = objective.views({"clean": x, "noise": drawn})
    assert (made["noisy"] - x).abs().max() <= 0.1 + 1e-6
    share = 0.25 + 0.5 * drawn[:, 0, 0, 0]
    torch.testing.assert_close(made["mixed"][1], share[1] * x[1] + (1 - share[1]) * x[0])


def test_images_of_an_old_router_are_attacked_through_it_within_its_threat():
    dual, data = model(), batch(0)
    step = step_of(dual, build(router=2, old=[{**L2, "attack": "pgd-3"}]), ("router2",))
    images = step._make(data, streams_of(data), further(data))[0]
    moved = (images["old1"] - data.x).flatten(1).norm(dim=1)
    assert (moved <= 0.3 + 1e-5).all()
    router = dual.eval().view("router1")
    with torch.no_grad():
        losses = [F.cross_entropy(router(x), data.y) for x in (data.x, images["old1"])]
    assert losses[1] > losses[0]


@pytest.mark.parametrize("parts", [("router2",), ("head2", "router2")])
def test_a_step_moves_what_trains_alone(parts):
    dual, data = model(experts="grown"), batch(0)
    before = copy.deepcopy(dual)
    step = step_of(dual, build(router=2, old=["Linf:8/255"]), parts)
    told = step(data, streams_of(data), further(data))
    assert bool(told.taken)
    assert int(dual.part("router2").trained) == 1
    assert int(dual.part("router3").trained) == 0
    for name in ("trunk", *dual.heads, *dual.routers):
        now, then = dual.part(name).state_dict(), before.part(name).state_dict()
        assert any(not torch.equal(now[key], then[key]) for key in now) == (name in parts), name


def test_gradients_of_a_step_are_those_of_the_whole_model():
    dual, data = model(), batch(0)
    objective = build(router=2)
    step = step_of(dual, objective, ("router2",))
    noise = further(data)
    images = step._make(data, streams_of(data), noise)[0]
    parameters = dict(dual.part("router2").named_parameters())
    dual.train()
    view, trunk = dual.view("router2"), dual.trunk
    seen = {"clean": view(data.x), "attacked": view(images["attacked"])}
    for name, need in objective.needs().items():
        if isinstance(need, Features):
            layer = dual.part("router2").get_submodule(need.layer)
            seen[name] = layer(trunk(images[need.on]).mean((2, 3)))
    expected = torch.autograd.grad(objective.loss(data.y, seen).total, list(parameters.values()))
    step(data, streams_of(data), noise)
    for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_where_only_a_router_learns_the_heads_run_forward_alone():
    dual, data = model(), batch(0)
    step = step_of(dual, build(router=2, sentinel=0, balance=0), ("router2",))
    with counting(dual, len(data.x)) as counter:
        step(data, streams_of(data), {}, one_thread=True)
    for part in ("trunk", "head1"):  # 10 steps, and the two sets of images of the loss
        assert set(counter.of("forward", part).values()) == {12}
        assert not counter.of("weight_gradient", part)


def test_layers_of_routers_are_seen_without_heads():
    dual = model()
    passes = Passes.of(dual, stage_of(build(router=2), ("head2", "router2")))
    look = passes.look({"score": Features("router2", "clean", "score")})
    calls = []
    dual.get_submodule("head1").register_forward_hook(lambda *_: calls.append(1))
    data = batch(0)
    found = look({"clean": passes.prefix(data.x)})["score"]
    assert found.shape == (len(data.x), 1)
    assert not calls


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router": 0}, "router must be at least 1"),
        ({"router": 1, "old": ["Linf:0.1"]}, "old: names 1 threats, and router 1 has 0 before it"),
        ({"router": 2, "old": ["Linf"]}, "old"),
        ({"clean": -1}, "clean must be at least 0"),
        ({"noise": 0}, "noise must be greater than 0"),
        ({"rest": []}, "the first router needs pseudo-tasks"),
        ({"rest": ["blurred"]}, "rest"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        build(**fields)


def test_a_router_that_the_model_lacks_is_refused():
    with pytest.raises(UserError, match="router4"):
        Passes.of(model(), stage_of(build(router=4), ("router4",)))
