"""Training against several threats: closed forms, draws, costs, and choices that a stopped run takes up again."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from dualhead.attacks import SteepestOfSeveral
from dualhead.attacks.pgd import PGD
from dualhead.errors import UserError
from dualhead.objectives import objectives
from dualhead.objectives.any_of import AnyOf
from dualhead.objectives.base import ATTACKED, kl_divergence
from dualhead.objectives.several import contenders
from dualhead.recipe import parse_recipe
from dualhead.threats import ThreatModel
from helpers.attacks import images, network, streams
from helpers.resume import STEPS, outcome, train_until

AMONG = ["Linf:8/255", "L2:0.5", "L1:12"]
CHOICES = ["uniform", "worst", "adaptive"]


def build(name, **fields):
    return objectives.build({"name": name, **fields})


def seen(*rows):
    """Logits of the same images under each threat, by the names that methods around SAT use."""
    return {"q" if n == 0 else f"q{n + 1}": row for n, row in enumerate(rows)}


def logits(count=3, batch=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 4, generator=generator, requires_grad=True) for _ in range(count)]


Y = torch.tensor([0, 1, 2, 3, 0, 1])


def test_worst_descends_each_images_highest_loss_and_avg_the_mean():
    rows = logits()
    each = torch.stack([F.cross_entropy(q, Y, reduction="none") for q in rows])
    found = build("any_of", among=AMONG, choose="worst").loss(Y, seen(*rows))
    torch.testing.assert_close(found.total, each.amax(0).mean())
    assert sum(float(share) for share in found.figures.values()) == pytest.approx(1.0)
    gradients = torch.autograd.grad(found.total, rows)
    worst = each.argmax(0)
    for n, gradient in enumerate(gradients):  # an image's gradient reaches its worst logits alone
        assert torch.equal(gradient.abs().sum(1) > 0, worst == n)
    torch.testing.assert_close(build("avg", among=AMONG).loss(Y, seen(*rows)).total, each.mean())


def test_ramp_by_hand():
    rows = logits(2)
    first, second = rows
    right = first.argmax(1) == Y
    assert 0 < right.sum() < len(Y), "too weak a test"
    worse = torch.maximum(*(F.cross_entropy(q, Y, reduction="none") for q in rows)).mean()
    found = build("ramp", among=["Linf:8/255", "L1:12"], weight=2.0).loss(Y, seen(*rows))
    torch.testing.assert_close(found.total, worse + 2.0 * kl_divergence(first, second)[right].mean())
    assert not build("ramp").per_image


def test_with_trades_clean_logits_are_asked_for_once():
    objective = build("any_of", base="trades", among=AMONG, choose="worst")
    assert [need.on for need in objective.needs().values()] == ["clean", "attacked", "attacked2", "attacked3"]
    clean, *rows = logits(4)
    each = torch.stack([kl_divergence(clean, q) for q in rows])
    found = objective.loss(Y, {"p": clean, **seen(*rows)})
    torch.testing.assert_close(found.total, F.cross_entropy(clean, Y) + 6.0 * each.amax(0).mean())


def test_inner_maximisations_are_those_of_the_base_method_within_each_threat():
    objective = build("avg", among=["Linf:8/255", {"norm": "L1", "eps": 12, "attack": "pgd-20"}])
    inner = objective.inner()
    assert [one.threat for one in inner.values()] == [ThreatModel("Linf", 8 / 255), ThreatModel("L1", 12)]
    assert [one.attack for one in inner.values()] == [None, PGD(20)]
    first, second = logits(2)
    for made, name, row in ((ATTACKED, "q", first), ("attacked2", "q2", second)):
        assert inner[made].uses == [name]
        torch.testing.assert_close(inner[made].loss(Y, {name: row}), F.cross_entropy(row, Y, reduction="none"))


def drawn(objective, steps, accuracy):
    """How often each threat is drawn when the network's accuracy under each is as given."""
    state, counts = objective.begin(), [0] * len(objective.among)
    for _ in range(steps):
        choice = int(state["choice"])
        assert list(objective.at(0, state).active) == [choice]
        counts[choice] += 1
        means = {f"{what}_{label}": 0.0 for label in objective.labels for what in ("met", "right")}
        means |= {f"met_{objective.labels[choice]}": 1.0, f"right_{objective.labels[choice]}": accuracy[choice]}
        state = objective.advance(state, means)
    return counts


def test_draws_follow_the_errors_and_uniform_ones_do_not():
    accuracy = [0.8, 0.4]
    assert build("any_of", among=["Linf:8/255", "L1:12"]).choose == "adaptive"
    for choose, share in (("adaptive", 0.2 / 0.8), ("uniform", 0.5)):
        objective = build("any_of", among=["Linf:8/255", "L1:12"], choose=choose)
        first = drawn(objective, 1500, accuracy)[0] / 1500
        assert abs(first - share) < 4 * math.sqrt(share * (1 - share) / 1500)
    perfect = build("any_of", among=["Linf:8/255", "L1:12"])
    assert min(drawn(perfect, 60, [1.0, 1.0])) > 15  # nothing to choose by: even draws


def test_what_a_step_met_is_counted():
    objective = build("any_of", among=AMONG)
    state = {**objective.begin(), "choice": 1.0}
    (q,) = logits(1)
    found = objective.at(0, state).loss(Y, {"q": q})
    right = (q.argmax(1) == Y).float().mean()
    figures = {name: float(value) for name, value in found.figures.items()}
    expected = {"met_Linf": 0, "met_L2": 1, "met_L1": 0, "right_Linf": 0, "right_L2": float(right), "right_L1": 0}
    assert figures == pytest.approx(expected)
    torch.testing.assert_close(found.total, F.cross_entropy(q, Y))
    assert objective.at(0, state) == objective.at(0, state) != objective


def linear(x_size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(x_size, generator=generator)
    return weight, lambda x: torch.stack((torch.zeros(len(x)), x.flatten(1) @ weight), 1)


def test_msd_on_a_linear_model_reaches_the_strongest_norms_closed_form():
    """Within a ball of radius r the logit moves by r times the dual norm of the weights; the best norm's is reached."""
    weight, model = linear()
    x = 0.5 + 0.02 * (images(3, 1, 3, 4) - 0.5)
    duals = {"Linf": weight.abs().sum(), "L2": weight.norm(), "L1": weight.abs().max()}
    for strongest in duals:
        radii = {norm: 0.08 * (1.0 if norm == strongest else 0.5) / float(dual) * 2 for norm, dual in duals.items()}
        threats = tuple(ThreatModel(norm, radius) for norm, radius in radii.items())
        climb = lambda z: (model(z) - model(x))[:, 1]  # noqa: E731
        found = SteepestOfSeveral(threats, 10, 2.5).maximise(climb, x, threats[0], streams(3))
        best = max(radii[norm] * float(dual) for norm, dual in duals.items())
        torch.testing.assert_close(climb(found), torch.full((3,), best), rtol=1e-3, atol=1e-5)
        index = list(duals).index(strongest)
        assert (threats[index].distance(found, x) <= threats[index].eps + 1e-6).all()


def test_msd_stays_in_the_union_and_climbs_at_least_as_high_as_its_start():
    model, x = network(), images(5)
    y = model(x).argmax(1)
    threats = tuple(contender.threat for contender in contenders(["Linf:4/255", "L2:0.2", "L1:2"]))
    climb = lambda z: F.cross_entropy(model(z), y, reduction="none")  # noqa: E731
    found = SteepestOfSeveral(threats, 8, 2.5).maximise(climb, x, threats[0], streams(5))
    inside = torch.stack([threat.distance(found, x) <= threat.eps * (1 + 1e-5) for threat in threats])
    assert inside.any(0).all()
    assert (climb(found) > climb(x)).all()
    with pytest.raises(UserError, match="evaluate under each of its norms"):
        SteepestOfSeveral(threats, 8, 2.5).parts(10, threats[0])


def test_msd_moves_every_image_also_where_the_loss_has_no_slope_at_it():
    model, x = network(), images(16)
    p = model(x).detach()
    threats = tuple(contender.threat for contender in contenders(["Linf:8/255", "L2:0.5"]))
    climb = lambda z: kl_divergence(p, model(z))  # noqa: E731
    inner = build("msd", base="trades", among=["Linf:8/255", "L2:0.5"]).inner()[ATTACKED]
    found = inner.attack.maximise(climb, x, threats[0], streams(16))
    assert (climb(found) > 1e-4).all()
    assert torch.stack([t.distance(found, x) <= t.eps * (1 + 1e-5) for t in threats]).any(0).all()
    assert build("msd").inner()[ATTACKED].attack.begins_clean  # as published, where the loss has a slope there


@pytest.mark.parametrize("name", ["sat", "trades", "mart", "ikl", "hybrid", "balanced", "reverse_smoothing"])
def test_a_loss_is_called_flat_if_it_has_no_slope_where_both_predictions_are_one(name):
    inner, z = build(name).inner()[ATTACKED], logits(1)[0]
    clean, attacked = ({n: z.detach().clone().requires_grad_() for n in inner.uses} for _ in range(2))
    on = {n: need.on for n, need in build(name).needs().items()}
    used = {n: attacked[n] if on[n] == ATTACKED else clean[n].detach() for n in inner.uses}
    inner.loss(Y, used).sum().backward()
    slope = max(float(attacked[n].grad.abs().max()) for n in inner.uses if on[n] == ATTACKED)
    assert (slope < 1e-6) == inner.flat


METHODS = {
    **{choose: {"name": "any_of", "choose": choose, "among": ["Linf:0.1", "L1:3"]} for choose in CHOICES},
    "avg": {"name": "avg", "among": ["Linf:0.1", "L1:3"]},
    "msd": {"name": "msd", "among": ["Linf:0.1", "L1:3"], "steps": 2},
    "ramp": {"name": "ramp", "among": ["Linf:0.1", "L1:3"]},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_is_written_in_full_and_read_back(method):
    recipe = {
        "name": "several", "data": {"source": "digits"}, "model": {"backbone": "cnn"}, "threat": "Linf:0.1",
        "stages": [{"name": "only", "train": ["model"], "objective": METHODS[method], "epochs": 1}],
    }  # fmt: skip
    parsed = parse_recipe(recipe)
    assert parse_recipe(parsed.resolved()) == parsed
    assert parsed.resolved()["stages"][0]["objective"]["among"][1] == {"norm": "L1", "eps": 3.0}


@pytest.mark.slow  # with `make bits`
@pytest.mark.parametrize("method", ["adaptive", "uniform"])
def test_a_choice_goes_on_bit_for_bit_where_it_was_stopped(method, tmp_path):
    fields = ", ".join(f"{key}: {value}" for key, value in METHODS[method].items() if key != "among")
    more = ("stages.*.objective={" + fields + ", among: [Linf:0.1, L1:3]}",)
    assert train_until(tmp_path / "whole", lambda: False, *more)
    done, count = False, 0
    while not done:  # stopped after a few steps each time
        asked = iter([False] * 6 + [True])
        done = train_until(tmp_path / "stopped", lambda asked=asked: next(asked, True), *more)
        count += 1
    assert count > STEPS / 8
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "stopped")
    lines = outcome(tmp_path / "whole")["metrics"]
    met = [line["met_Linf"] for line in lines]
    assert 0 < sum(met) < len(met), "one threat alone was drawn: too weak a test"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"name": "any_of", "among": ["Linf:0.1"]}, "among: names 1, and needs at least 2"),
        ({"name": "any_of", "among": "Linf:0.1"}, "among: must list threats"),
        ({"name": "any_of", "among": ["Linf:0.1", "L9:1"]}, "among.1: unknown threat 'L9'"),
        (
            {"name": "any_of", "among": ["Linf:0.1", {"name": "flow", "eps": 1, "attack": "square"}]},
            "among.1.attack .square. cannot be trained with",
        ),
        ({"name": "any_of", "base": "natural"}, "base: must be a method with one attack"),
        ({"name": "avg", "base": {"name": "any_of"}}, "base: must be a method with one attack"),
        ({"name": "msd", "among": ["Linf:0.1", "flow:0.1"]}, "msd steps along norms, and flow is none"),
        ({"name": "msd", "steps": 0}, "steps must be at least 1"),
        ({"name": "ramp", "among": AMONG}, "names 3, and pairs two threats"),
        ({"name": "ramp", "weight": -1}, "weight must be at least 0"),
        (
            {"name": "any_of", "base": "trades", "among": ["L2:0.5", {"norm": "Linf", "eps": 0.1, "attack": "fgsm"}]},
            "among.1: attack fgsm begins at the images themselves",
        ),
    ],
)
def test_what_does_not_fit_is_refused(spec, words):
    with pytest.raises(UserError, match=words):
        objectives.build(spec)


def test_two_of_a_kind_are_told_apart():
    assert AnyOf(among=contenders(["L2:0.1", "L2:0.5", "L1:12"])).labels == ["L2_1", "L2_2", "L1"]


@pytest.mark.parametrize(
    ("name", "key"),
    [("any_of", "among.0"), ("replay", "among.0"), ("ewc", "old"), ("after_dder", "old.0"), ("alr", "")],
)
@pytest.mark.parametrize(
    ("attack", "told"),
    [
        ("square", " 'square' cannot be trained with"),
        ({"name": "pgd", "restarts": 5}, ".restarts: is for measuring"),
        ({"name": "pgd", "target": "next"}, ".target: is for measuring"),
    ],
)
def test_attacks_of_an_objective_are_refused_as_those_of_a_stage_are(name, key, attack, told):
    """Restarts and the like would be left out without a word."""
    place = key.partition(".")[0]
    one = {"norm": "L2", "eps": 0.5, "attack": attack}
    given = {"attack": attack} if not key else {place: one if key == "old" else [one, "Linf:8/255"]}
    given |= {"router": 3} if name == "after_dder" else {}
    with pytest.raises(UserError) as refused:
        build(name, **given)
    assert f"{key}{'.' if key else ''}attack{told}" in str(refused.value)
