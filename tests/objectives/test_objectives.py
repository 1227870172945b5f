"""Base methods: against closed forms by hand, and each registered one against the contract of `Objective`."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualhead.attacks import RandomPoint
from dualhead.errors import UserError
from dualhead.objectives import Images, Labels, Logits, Objective, check_weighable, objectives, weighted
from dualhead.objectives.base import Around
from dualhead.objectives.sat import SAT
from helpers.objectives import REQUIRED, climbed, see, shipped
from helpers.training import CallCounter, batch, dual_model, stage_of, step_of, streams_of

LN = math.log
# Softmax of the logarithms of the probabilities is the probabilities: two images, three classes.
CLEAN = torch.tensor([[LN(0.5), LN(0.25), LN(0.25)], [LN(0.1), LN(0.6), LN(0.3)]], dtype=torch.float64)
ATTACKED = torch.tensor([[LN(0.25), LN(0.5), LN(0.25)], [LN(0.2), LN(0.2), LN(0.6)]], dtype=torch.float64)
Y = torch.tensor([0, 1])

KL_1 = 0.5 * LN(0.5 / 0.25) + 0.25 * LN(0.25 / 0.5)
KL_2 = 0.1 * LN(0.1 / 0.2) + 0.6 * LN(0.6 / 0.2) + 0.3 * LN(0.3 / 0.6)
CE_CLEAN = (-LN(0.5) - LN(0.6)) / 2
CE_ATTACKED = (-LN(0.25) - LN(0.2)) / 2
MARGIN = (-LN(1.0001 - 0.5) - LN(1.0001 - 0.6)) / 2


@pytest.mark.parametrize(
    ("spec", "terms", "inner"),
    [
        ("natural", {"clean": CE_CLEAN}, None),
        ("sat", {"adversarial": CE_ATTACKED}, [-LN(0.25), -LN(0.2)]),
        ({"name": "trades", "beta": 6}, {"clean": CE_CLEAN, "divergence": 6 * (KL_1 + KL_2) / 2}, [KL_1, KL_2]),
        ({"name": "trades", "beta": 0}, {"clean": CE_CLEAN, "divergence": 0.0}, [KL_1, KL_2]),
        (
            {"name": "mart", "beta": 5},
            {"adversarial": CE_ATTACKED + MARGIN, "divergence": 5 * (KL_1 * (1 - 0.5) + KL_2 * (1 - 0.6)) / 2},
            [-LN(0.25), -LN(0.2)],
        ),
        ({"name": "mart", "beta": 0}, {"adversarial": CE_ATTACKED + MARGIN, "divergence": 0.0}, [-LN(0.25), -LN(0.2)]),
        ("hybrid", {"clean": CE_CLEAN / 2, "adversarial": CE_ATTACKED / 2}, [-LN(0.25), -LN(0.2)]),
        (
            {"name": "hybrid", "alpha": 0.25},
            {"clean": CE_CLEAN / 4, "adversarial": 3 * CE_ATTACKED / 4},
            [-LN(0.25), -LN(0.2)],
        ),
        (
            {"name": "logit_pairing", "base": "sat", "weight": 3},
            {"adversarial": CE_ATTACKED, "pairing": 3 * (2 * LN(2) ** 2 + LN(2) ** 2 + LN(3) ** 2 + LN(2) ** 2) / 6},
            [-LN(0.25), -LN(0.2)],
        ),
    ],
    ids=str,
)
def test_the_values_of_closed_forms(spec, terms, inner):
    objective = objectives.build(spec)
    seen = see(objective, clean=CLEAN, attacked=ATTACKED)
    loss = objective.loss(Y, seen)
    assert {name: float(term) for name, term in loss.terms.items()} == pytest.approx(terms)
    assert float(loss.total) == pytest.approx(sum(terms.values()))
    if inner is None:
        assert objective.inner() == {}
    else:
        assert climbed(objective, Y, seen).tolist() == pytest.approx(inner)


def test_the_gradient_of_the_divergence_by_hand():
    """d KL(p || q) / d log-odds of q is q - p, and TRADES lets it flow into p too."""
    clean, attacked = CLEAN.clone().requires_grad_(), ATTACKED.clone().requires_grad_()
    trades = objectives.build({"name": "trades", "beta": 2})
    trades.loss(Y, see(trades, clean=clean, attacked=attacked)).terms["divergence"].backward()
    p, q = CLEAN.softmax(1), ATTACKED.softmax(1)
    assert torch.allclose(attacked.grad, 2 * (q - p) / 2)
    ratio = p.log() - q.log()
    kl = (p * ratio).sum(1, keepdim=True)
    assert torch.allclose(clean.grad, 2 * p * (ratio - kl) / 2)


def logits(seed, batch=6, classes=5, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    clean, attacked = scale * torch.randn(2, batch, classes, generator=generator, dtype=torch.float64)
    return clean, attacked, torch.randint(classes, (batch,), generator=generator)


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.floats(0, 10))
def test_mart_equals_a_plain_reading_of_the_paper(seed, beta):
    clean, attacked, y = logits(seed)
    total = 0.0
    for z, z_adv, label in zip(clean.softmax(1).tolist(), attacked.softmax(1).tolist(), y.tolist(), strict=True):
        wrong = max(p for k, p in enumerate(z_adv) if k != label)
        kl = sum(p * LN(p / q) for p, q in zip(z, z_adv, strict=True))
        total += -LN(z_adv[label]) - LN(1.0001 - wrong) + beta * kl * (1 - z[label])
    mart = objectives.build({"name": "mart", "beta": beta})
    found = mart.loss(y, see(mart, clean=clean, attacked=attacked)).total
    assert float(found) == pytest.approx(total / len(y), rel=1e-9)


def test_mart_takes_a_mixed_image_for_none_of_its_classes():
    """As CutMix makes them: the wrong classes are those that the image holds nothing of."""
    shares = torch.tensor([[0.7, 0.3, 0.0]], dtype=torch.float64)
    attacked = torch.tensor([[LN(0.5), LN(0.3), LN(0.2)]], dtype=torch.float64)
    mart = objectives.build("mart")
    terms = mart.loss(shares, see(mart, clean=attacked, attacked=attacked)).terms
    assert float(terms["adversarial"]) == pytest.approx(-0.7 * LN(0.5) - 0.3 * LN(0.3) - LN(1.0001 - 0.2))


@settings(max_examples=25)
@given(st.integers(0, 2**31))
def test_trades_without_beta_is_natural_training(seed):
    clean, attacked, y = logits(seed)
    trades, natural = objectives.build({"name": "trades", "beta": 0}), objectives.build("natural")
    found = trades.loss(y, see(trades, clean=clean, attacked=attacked))
    assert torch.equal(found.total, natural.loss(y, see(natural, clean=clean)).total)


@pytest.mark.parametrize(("alpha", "end"), [(0, "sat"), (1, "natural")])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_ends_of_hybrid_training_are_sat_and_natural_training(alpha, end, smoothing):
    clean, attacked, y = logits(8)
    ends = [{"name": end}, {"name": "hybrid", "alpha": alpha}]
    alone, hybrid = (objectives.build({**spec, "label_smoothing": smoothing}) for spec in ends)
    seen = [see(objective, clean=clean, attacked=attacked) for objective in (alone, hybrid)]
    assert torch.equal(hybrid.loss(y, seen[1]).total, alone.loss(y, seen[0]).total)
    if end == "sat":
        assert torch.equal(climbed(hybrid, y, seen[1]), climbed(alone, y, seen[0]))


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_a_share_of_clean_images_that_is_none_is_refused(alpha):
    with pytest.raises(UserError, match=rf"alpha must lie in \[0, 1\], got {alpha:g}; 0.5 is as published"):
        objectives.build({"name": "hybrid", "alpha": alpha})


@pytest.mark.parametrize("name", ["trades", "mart", "hybrid"])
def test_two_outputs_see_clean_and_attacked_images_as_one_would(name):
    """A value is that of one output with the same logits; what the other outputs say there has no part in it."""
    clean, attacked, y = logits(9)
    alone, apart = objectives.build(name), objectives.build({"name": name, "clean": "head1", "robust": "head2"})
    one = see(alone, clean=clean, attacked=attacked)
    two = see(apart, clean={"head1": clean}, attacked={"head2": attacked})
    assert set(two) == set(one)
    assert torch.equal(apart.loss(y, two).total, alone.loss(y, one).total)
    assert torch.equal(climbed(apart, y, two), climbed(alone, y, one))
    assert apart.outputs == ("head1", "head2") and alone.outputs == ()
    assert apart.judged_output == "head2"
    assert objectives.build(objectives.describe(apart)) == apart


@pytest.mark.parametrize("spec", ["trades", "mart"])
def test_beta_below_zero_is_refused(spec):
    with pytest.raises(UserError, match="beta must be at least 0, got -1"):
        objectives.build({"name": spec, "beta": -1})


@pytest.mark.parametrize(("name", "target"), [("trades", 1), ("mart", 0), ("hybrid", 0)])
def test_of_two_outputs_each_head_runs_on_its_own_images_alone(name, target):
    """Head 1 on clean images, once more if the attack has a target; head 2 in ten steps and on what they lead to."""
    model, data = dual_model(), batch(0, 8)
    stage = stage_of({"name": name, "clean": "head1", "robust": "head2"}, ("trunk", "head1", "head2"))
    assert stage.output == "head2"
    with CallCounter(head1=model.head1, head2=model.head2) as calls:
        outcome = step_of(model, stage)(data, streams_of(data))
    assert calls == {"head1": 1 + target, "head2": 11}
    assert bool(outcome.taken)
    for head in (model.head1, model.head2):
        assert any(bool(parameter.grad.any()) for parameter in head.parameters())


@pytest.mark.parametrize("base", ["trades", "mart"])
def test_logit_pairing_of_weight_0_is_its_base_method(base):
    clean, adv, y = logits(7)
    paired, alone = objectives.build({"name": "logit_pairing", "base": base, "weight": 0}), objectives.build(base)
    both, own = (see(objective, clean=clean, attacked=adv) for objective in (paired, alone))
    assert torch.equal(paired.loss(y, both).total, alone.loss(y, own).total)
    assert torch.equal(climbed(paired, y, both), climbed(alone, y, own))
    assert paired.inner()["attacked"].uses == alone.inner()["attacked"].uses
    assert objectives.build(objectives.describe(paired)) == paired


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": -1}, "weight must be at least 0, got -1"),
        ({"base": "natural"}, "logit_pairing needs an adversarial base method"),
        ({"base": "joint"}, "logit_pairing needs an adversarial base method of one output"),
        ({"base": "logit_pairing"}, "logit_pairing is its own base method"),
        ({"base": {"name": "hat", "weights": "x", "base": "logit_pairing"}}, "logit_pairing is its own base method"),
    ],
)
def test_what_cannot_be_paired_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        objectives.build({"name": "logit_pairing", **change})


HEADS = {"clean": "head1", "robust": "head2"}
VARIANTS = {
    **{name: {"name": name, **REQUIRED.get(name, {})} for name in shipped()},
    **{f"{name} on two heads": {"name": name, **HEADS} for name in ("trades", "mart", "hybrid")},
    "hat on two heads": {"name": "hat", "weights": "standard", "base": {"name": "trades", **HEADS}},
    "hat around logit_pairing": {"name": "hat", "weights": "standard", "base": "logit_pairing"},
    "joint with ties": {"name": "joint", "attack": "sum", "distillation": 1, "diversity": 1, "head2": "natural"},
    "joint with guidance": {"name": "joint", "attack": "head1", "head2": "natural", "aggregate": None, "guidance": 1},
}
PAIRED = ("air", "alr", "logit_pairing", "hat around logit_pairing", "joint with guidance", "energy", "grad_align")
"""Those whose loss is of logits, or of gradients of images, and not of predictions, as published."""
ORDER = torch.tensor([3, 1, 5, 0, 4, 2])


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param


@pytest.fixture
def objective(variant) -> Objective:
    return objectives.build(VARIANTS[variant])


@pytest.fixture
def adversarial(objective) -> Objective:
    if not objective.adversarial:
        pytest.skip("attacks nothing")
    return objective


def seen_for(objective, seed, scale=3.0, batch=6, classes=5):
    """Logits for each need, equal ones for equal needs and unlike ones for others; labels."""
    generator = torch.Generator().manual_seed(seed)

    def make(need):
        if isinstance(need, Labels):
            return torch.randint(classes, (batch,), generator=generator)
        if isinstance(need, Images):
            return torch.rand(batch, 1, 1, 1, generator=generator, dtype=torch.float64)
        return scale * torch.randn(batch, classes, generator=generator, dtype=torch.float64)

    made = {need: make(need) for need in dict.fromkeys(objective.needs().values())}
    y = torch.randint(classes, (batch,), generator=generator)
    return {name: made[need] for name, need in objective.needs().items()}, y


def moved(seen, move):
    return {name: move(tensor) for name, tensor in seen.items()}


def changed(objective, seen, need):
    """The same but for what one need gives, under whatever names it goes."""
    names = [name for name, other in objective.needs().items() if other == need]

    def other(value):
        if isinstance(need, Labels):
            return (value + 1) % 5
        return 1 - value if isinstance(need, Images) else value.roll(1, 1) + torch.arange(5)

    return {**seen, **{name: other(seen[name]) for name in names}}


def searching(objective):
    """Inner maximisations that ask the model, by name; the others draw random points."""
    return {made: inner for made, inner in objective.inner().items() if not isinstance(inner.attack, RandomPoint)}


def test_contract_terms_add_up_to_a_finite_scalar(objective):
    seen, y = seen_for(objective, 0)
    loss = objective.loss(y, seen)
    assert loss.total.shape == ()
    assert loss.total.isfinite()
    assert loss.terms
    assert all(term.shape == () for term in loss.terms.values())
    assert torch.allclose(sum(loss.terms.values()), loss.total)


def test_contract_loss_is_the_mean_over_the_batch(objective):
    if not objective.per_image:
        pytest.skip("depends on the other images of its batch, as it says")
    seen, y = seen_for(objective, 1)
    each = [objective.loss(y[i : i + 1], moved(seen, lambda t, i=i: t[i : i + 1])).total for i in range(len(y))]
    assert torch.allclose(objective.loss(y, seen).total, torch.stack(each).mean())


def test_contract_weights_of_classes_multiply_each_images_loss_or_are_refused(objective):
    if not objective.per_image:
        with pytest.raises(UserError, match=f"'{objective.registered_name}' is no mean over images"):
            check_weighable(objective)
        return
    if objective.streams():
        with pytest.raises(UserError, match="draws images of its own, whose classes the weights do not know"):
            check_weighable(objective)
        return
    check_weighable(objective)
    seen, y = seen_for(objective, 1)
    seen = moved(seen, lambda t: t.requires_grad_())
    weights = torch.tensor([0.5, 3.0, 1.0, 0.25, 2.0], dtype=torch.float64)
    each = [objective.loss(y[i : i + 1], moved(seen, lambda t, i=i: t[i : i + 1])).total for i in range(len(y))]
    expected = (torch.stack(each) * weights[y]).mean()
    found = weighted(objective, weights, y, seen)
    assert torch.allclose(found.total, expected)
    assert torch.allclose(sum(found.terms.values()), expected)
    asked = list(dict.fromkeys(seen.values()))
    both = [torch.autograd.grad(loss, asked, retain_graph=True, allow_unused=True) for loss in (found.total, expected)]
    for a, b in zip(*both, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b)


def test_a_mixed_image_has_the_mean_weight_of_its_classes():
    objective, weights = objectives.build("sat"), torch.tensor([1.0, 3.0, 10.0])
    logits, shares = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[0.25, 0.75, 0.0]])
    plain, found = objective.loss(shares, {"q": logits}), weighted(objective, weights, shares, {"q": logits})
    assert float(found.total / plain.total) == pytest.approx(0.25 * 1 + 0.75 * 3)


@dataclasses.dataclass(frozen=True)
class Constrained(SAT):
    """A base method whose loss has all that a loss can have."""

    def loss(self, y, seen):
        loss = super().loss(y, seen).with_figures(highest=seen["q"].max())
        return dataclasses.replace(loss, constraint=seen["q"].square().mean())


def test_weights_of_classes_multiply_the_constraint_and_not_the_figures():
    y, weights = torch.tensor([0, 2]), torch.tensor([2.0, 1.0, 0.0])
    logits = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, 1.0]])
    found = weighted(Constrained(), weights, y, {"q": logits})
    assert float(found.constraint) == pytest.approx(2.0 * float(logits[0].square().mean()) / 2)
    assert float(found.figures["highest"]) == 2.0
    assert weighted(SAT(), weights, y, {"q": logits}).constraint is None


WRAPPERS = [
    name
    for name in shipped()
    if issubclass(objectives.get(name), Around) and "base" in objectives.get(name).__dataclass_fields__
]


def wrapped(name, base):
    """A method around another base method; skips where that is refused."""
    try:
        return objectives.build({**VARIANTS[name], "base": base})
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", [name for name in WRAPPERS if name != "agem"])
def test_contract_of_wrappers_figures_and_constraint_of_the_base_method_survive(name):
    objective = wrapped(name, Constrained())
    objective = objective.at(0, objective.begin())
    seen, y = seen_for(objective, 8)
    found = objective.loss(y, seen)
    under = torch.stack([seen[key] for key in ("q", "q2", "q3") if key in seen])
    torch.testing.assert_close(found.constraint, under.square().mean())
    torch.testing.assert_close(found.figures["highest"], under.amax((1, 2)).mean())


def test_agem_refuses_a_base_method_with_a_constraint():
    objective = wrapped("agem", Constrained())
    seen, y = seen_for(objective, 8)
    with pytest.raises(UserError, match="base: has a constraint of its own, and agem sets one"):
        objective.loss(y, seen)


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("base", ["agem", "any_of", "balanced", "joint", "lwf", "align", "grad_align"])
def test_contract_of_wrappers_nothing_of_the_base_method_is_lost(name, base):
    objective = wrapped(name, VARIANTS[base])
    state = objective.begin()
    objective = objective.at(0, state)
    own = objective.base
    seen, y = seen_for(objective, 9)
    alone, found = own.loss(y, {key: seen[key] for key in own.needs()}), objective.loss(y, seen)
    assert own.needs().items() <= objective.needs().items()
    assert alone.terms.keys() <= found.terms.keys()
    assert all(torch.equal(figure, found.figures[key]) for key, figure in alone.figures.items())
    assert alone.constraint is None or torch.equal(alone.constraint, found.constraint)
    torch.testing.assert_close(sum(found.terms.values()), found.total)
    if objective.window():
        means = {key: float(value) for key, value in {**found.terms, **found.figures}.items()}
        assert objective.advance(state, means).keys() == state.keys()


@pytest.mark.parametrize("name", WRAPPERS)
def test_contract_of_wrappers_none_is_its_own_base_method_however_deep(name):
    for between in ({"name": "lwf"}, {"name": "hat", "weights": "x"}):
        inside = {**between, "base": VARIANTS[name]}
        for base in (VARIANTS[name], inside):
            with pytest.raises(UserError, match=r"is its own base method; |base: must be a method with one attack"):
                objectives.build({**VARIANTS[name], "base": base})


@pytest.mark.parametrize("name", ["air", "align", "elle", "grad_align", "hat", "logit_pairing", "lwf"])
def test_an_ascent_from_seeds_is_no_attack_on_the_images(name):
    base = {"name": "energy", "base": "natural", "start_steps": 1}
    with pytest.raises(UserError, match=r"adversarial base method|its base method has none"):
        objectives.build({**VARIANTS[name], "base": base})


def test_only_what_says_so_depends_on_the_other_images_of_a_batch():
    assert [name for name in shipped() if not objectives.build(VARIANTS[name]).per_image] == ["air", "ikl", "ramp"]


def test_contract_inner_loss_is_one_number_per_image_by_itself(adversarial):
    seen, y = seen_for(adversarial, 2)
    for made, inner in searching(adversarial).items():
        value = climbed(adversarial, y, seen, made)
        assert value.shape == y.shape
        assert torch.allclose(climbed(adversarial, y[ORDER], moved(seen, lambda t: t[ORDER]), made), value[ORDER])
        searched = [name for name in inner.uses if adversarial.needs()[name].on == made]
        points = {name: seen[name].clone().requires_grad_() for name in searched}
        climbed(adversarial, y, {**seen, **points}, made).sum().backward()
        for point in points.values():
            assert point.grad.isfinite().all()
        assert (sum(point.grad.abs().sum(1) for point in points.values()) > 0).all()


def test_contract_order_of_images_and_names_of_classes_do_not_matter(objective):
    seen, y = seen_for(objective, 3)
    before = objective.loss(y, seen).total
    assert torch.allclose(before, objective.loss(y[ORDER], moved(seen, lambda t: t[ORDER])).total)
    classes = torch.tensor([4, 2, 0, 3, 1])
    order = classes.argsort()
    named = {1: lambda labels: order[labels], 2: lambda logits: logits[:, classes], 4: lambda images: images}
    renamed = objective.loss(order[y], moved(seen, lambda t: named[t.dim()](t))).total
    assert torch.allclose(before, renamed)


def test_contract_a_shift_of_all_logits_of_an_image_does_not_matter(objective, variant):
    if variant in PAIRED:
        pytest.skip("pairs logits, not predictions, as published")
    seen, y = seen_for(objective, 4)
    needs = list(dict.fromkeys(objective.needs().values()))
    shift = torch.arange(len(y), dtype=torch.float64)[:, None] * 7 - 11
    logits = {name: need for name, need in objective.needs().items() if not isinstance(need, Images | Labels)}
    shifted = {**seen, **{name: seen[name] + shift * (1 + needs.index(need)) for name, need in logits.items()}}
    assert torch.allclose(objective.loss(y, seen).total, objective.loss(y, shifted).total)


def test_contract_what_is_asked_for_is_used(objective):
    """By the loss or by an attack; or it is what the log judges."""
    seen, y = seen_for(objective, 5)
    needs = objective.needs()

    def values(seen):
        return [objective.loss(y, seen).total, *(climbed(objective, y, seen, made) for made in objective.inner())]

    for need in dict.fromkeys(needs.values()):
        other = values(changed(objective, seen, need))
        used = any(not torch.allclose(a, b) for a, b in zip(values(seen), other, strict=True))
        assert used or need == needs[objective.judged], need


def test_contract_gradients_reach_whatever_the_loss_uses_but_what_is_taught_by(objective):
    seen, y = seen_for(objective, 5)
    logits_of = {name: need for name, need in objective.needs().items() if not isinstance(need, Labels | Images)}
    points = {need: seen[name].clone().requires_grad_() for name, need in logits_of.items()}
    asked = {**seen, **{name: points[need] for name, need in logits_of.items()}}
    loss = objective.loss(y, asked).total
    loss.backward()
    for need, point in points.items():
        used = not torch.allclose(objective.loss(y, changed(objective, seen, need)).total, loss)
        reached = point.grad is not None and bool(point.grad.any())
        teaches = need.output in (*objective.teachers(), *objective.frozen())
        assert reached == used or teaches, need


def test_contract_what_an_attack_uses_are_needs_and_each_of_them_matters(adversarial):
    seen, y = seen_for(adversarial, 5)
    needs = adversarial.needs()
    known = {"clean", *adversarial.streams(), *adversarial.inner()}
    for made, inner in adversarial.inner().items():
        assert set(inner.uses) <= set(needs)
        assert inner.start in known - {made}
        assert any(needs[name].on == made for name in inner.uses) or made not in searching(adversarial)
        for name in inner.uses:
            other = changed(adversarial, seen, needs[name])
            assert not torch.allclose(climbed(adversarial, y, seen, made), climbed(adversarial, y, other, made)), name


def test_contract_images_of_needs_are_clean_or_made_by_the_objective(objective):
    made = {"clean", *objective.streams(), *objective.inner()}
    images = {name: torch.rand(2, 3, 4, 4) for name in made}
    assert {need.on for need in objective.needs().values()} <= made | set(objective.views(images))
    assert all(need.on in objective.streams() for need in objective.needs().values() if isinstance(need, Labels))


def test_contract_what_is_judged_is_a_need_and_under_attack_if_there_is_one(objective):
    need = objective.needs()[objective.judged]
    assert isinstance(need, Logits)
    assert need.output == objective.judged_output
    assert need.output not in objective.teachers()
    assert need.on == ("attacked" if objective.adversarial else "clean")


def test_contract_a_description_builds_the_same(objective):
    assert objectives.build(objectives.describe(objective)) == objective


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e2, 1e4])
def test_contract_losses_and_gradients_stay_finite_for_large_logits(objective, scale):
    seen, y = seen_for(objective, 6, scale=scale)
    points = moved(seen, lambda t: t.float().requires_grad_() if t.is_floating_point() else t)
    total = objective.loss(y, points).total
    assert total.isfinite()
    total.backward()
    for tensor in points.values():
        assert tensor.grad is None or tensor.grad.isfinite().all()
