"""What every registered threat keeps to, and that every registered attack works with it or refuses it in one line."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dualhead.attacks import Attack, Maximiser, Query, attacks, maximise_within
from dualhead.errors import UserError
from dualhead.threats import ThreatModel, build_threat, threats, typical_eps
from helpers.attacks import images, network, streams

THREATS = {
    "Linf": ThreatModel("Linf", "8/255"),
    "L2": ThreatModel("L2", 0.3),
    "L1": ThreatModel("L1", 2.0),
    **{name: threats.build({"name": name, "eps": threats.get(name).typical_eps}) for name in threats.names()},
}
SHORT = {"steps": 2, "queries": 4, "searches": 2, "targets": 2, "angles": 3, "shifts": 2}
each_threat = pytest.mark.parametrize("threat", THREATS.values(), ids=THREATS)


def shortened(name: str) -> Attack:
    """An attack, or the members of a suite, whose numbers are fixed, with few steps."""

    def short(attack):
        return dataclasses.replace(attack, **{k: v for k, v in SHORT.items() if hasattr(attack, k)})

    built = attacks.build(name)
    if not hasattr(built, "members"):
        return short(built)

    class Short(type(built)):
        def members(self, norm):
            return [short(member).labelled(member.label) for member in super().members(norm)]

    return Short()


@each_threat
def test_the_origin_is_the_image_and_stays(threat):
    x = images(4)
    threat = threat.for_images(x.shape[1:])
    origin = threat.lift(x)
    assert torch.equal(threat.render(origin), x)
    assert torch.equal(threat.project(origin, origin), origin)
    assert torch.equal(threat.confine(origin, origin), origin)
    assert threat.distance(origin, origin).tolist() == [0.0] * 4
    assert threat.distance(origin, origin).dtype == torch.float64


@each_threat
@pytest.mark.parametrize("where", ["ball", "sphere"])
def test_starts_lie_within_the_budget_and_belong_to_their_sample(threat, where):
    x = images(6)
    threat = threat.for_images(x.shape[1:])
    origin = threat.lift(x)
    start = threat.start(origin, streams(6), where)
    assert (threat.distance(start, origin) <= threat.eps + 1e-5).all()
    assert (threat.distance(start, origin) > 0).all()
    rows = torch.tensor([4, 1])
    assert torch.equal(threat.start(origin[rows], streams(6)[rows], where), start[rows])
    image = threat.render(start)
    assert image.shape == x.shape
    assert ((image >= 0) & (image <= 1)).all()


@each_threat
def test_a_direction_is_no_longer_than_the_budget_and_as_long_where_no_box_cuts_it(threat):
    x = images(6)
    threat = threat.for_images(x.shape[1:])
    origin = threat.lift(x)[2]
    direction = threat.direction(origin, streams(6)[torch.tensor([2])])
    assert direction.shape == origin.shape
    length = float(threat.distance((origin + direction)[None], origin[None]))
    assert 0 < length <= threat.eps * (1 + 1e-5) + 1e-5
    assert length == pytest.approx(threat.eps, rel=1e-5) or threat.family not in ("Linf", "L2")


def test_a_usual_budget_can_be_built_and_nothing_else_has_one():
    assert all(build_threat(f"{family}:{typical_eps(family)}").family == family for family in THREATS)
    assert typical_eps("anything") is None


@each_threat
def test_steps_climb_and_come_back_to_the_budget(threat):
    x = images(4)
    threat = threat.for_images(x.shape[1:])
    origin = threat.lift(x)
    start = threat.start(origin, streams(4), "ball")
    point = start.clone().requires_grad_()
    target = images(4, seed=9)

    def nearness(image):
        return -(image - target).square().flatten(1).sum(1)

    before = nearness(threat.render(point))
    (gradient,) = torch.autograd.grad(before.sum(), point)
    steps = torch.full((4,), 0.01 * threat.eps)
    moved = threat.ascend(start, gradient, 0.01 * threat.eps)
    assert torch.equal(moved, threat.ascend(start, gradient, steps))
    assert (nearness(threat.render(moved)) > before).all()
    confined = threat.confine(threat.ascend(start, gradient, 10 * threat.eps), origin)
    assert (threat.distance(confined, origin) <= threat.eps).all()


@each_threat
def test_it_is_what_it_says_of_itself(threat):
    assert build_threat(threat.describe()) == threat
    assert threat.within(threat.eps) == threat
    assert threat.within(threat.eps / 2).eps == threat.eps / 2
    assert threat.kind in THREATS


@each_threat
@pytest.mark.parametrize("name", attacks.names())
def test_every_attack_works_or_refuses_in_one_line(threat, name):
    model, x = network(4), images(5)
    outputs = lambda z: torch.stack((model(z),) * 3, 1)  # noqa: E731
    y, attack = model(x).argmax(1), shortened(name)
    if not attack.takes(threat):
        with pytest.raises(UserError) as refused:
            attack(model, x, y, threat, generator=streams(5), outputs_fn=outputs)
        assert f"attack {name} is defined for " in str(refused.value)
        assert f"threat {threat.kind}; use " in str(refused.value)
        assert "\n" not in str(refused.value)
        return
    threat = threat.for_images(x.shape[1:])
    origin = threat.lift(x)
    query = Query(model, outputs).through(threat.render)
    points = attack.search_points(query, origin, y, threat, streams(5))
    assert (threat.distance(points, origin) <= threat.eps).all()
    image = attack(model, x, y, threat, generator=streams(5), outputs_fn=outputs)
    assert torch.equal(image, threat.render(points))
    assert ((image >= 0) & (image <= 1)).all()
    assert not image.requires_grad


@each_threat
@pytest.mark.parametrize("name", [name for name in attacks.names() if issubclass(attacks.get(name), Maximiser)])
def test_what_trains_climbs_within_every_threat(threat, name):
    model, x = network(), images(6)
    if threat.kind == "rotation":  # one step of 30 degrees goes across many maxima, and need not climb
        threat = build_threat({"name": "rotation", "eps": 3, "shift": 0.3})

    def climb(image):
        assert image.shape == x.shape
        return -model(image)[:, 0]

    attacked = maximise_within(attacks.build(name), climb, x, threat, streams(6))
    assert attacked.shape == x.shape
    assert not attacked.requires_grad
    assert ((attacked >= 0) & (attacked <= 1)).all()
    assert (climb(attacked) > climb(x)).float().mean() > 0.5


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_for_norms_what_is_climbed_is_given_to_the_bit(norm):
    """`maximise_within` is the loop of Madry et al. 2018, written down here."""
    model, x, threat = network(), images(4), THREATS[norm]
    y = model(x).argmax(1)

    def climb(image):
        return torch.nn.functional.cross_entropy(model(image), y, reduction="none")

    attacked = threat.ball_point(x, streams(4))
    for _ in range(3):
        point = attacked.clone().requires_grad_()
        (slope,) = torch.autograd.grad(climb(point).sum(), point)
        if norm == "Linf":
            moved = attacked + 2 / 255 * slope.sign()
            attacked = torch.min(torch.max(moved, x - threat.eps), x + threat.eps).clamp(0, 1)
        else:
            length = torch.linalg.vector_norm(slope.flatten(1), dim=1).clamp_min(1e-12).reshape(-1, 1, 1, 1)
            change = attacked + 2 / 255 * slope / length - x
            length = torch.linalg.vector_norm(change.flatten(1), dim=1).clamp_min(1e-12)
            attacked = (x + change * (threat.eps / length).clamp_max(1.0).reshape(-1, 1, 1, 1)).clamp(0, 1)
    attack = attacks.build({"name": "pgd", "steps": 3, "step_size": 2 / 255})
    assert torch.equal(maximise_within(attack, climb, x, threat, streams(4)), attacked)
