"""Base methods: against closed forms by hand, and each registered one against the contract of `Objective`."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualhead.errors import UserError
from dualhead.objectives import Objective, objectives

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
        ("natural", {"clean": CE_CLEAN}, [-LN(0.25), -LN(0.2)]),
        ("sat", {"adversarial": CE_ATTACKED}, [-LN(0.25), -LN(0.2)]),
        ({"name": "trades", "beta": 6}, {"clean": CE_CLEAN, "divergence": 6 * (KL_1 + KL_2) / 2}, [KL_1, KL_2]),
        ({"name": "trades", "beta": 0}, {"clean": CE_CLEAN, "divergence": 0.0}, [KL_1, KL_2]),
        (
            {"name": "mart", "beta": 5},
            {"adversarial": CE_ATTACKED + MARGIN, "divergence": 5 * (KL_1 * (1 - 0.5) + KL_2 * (1 - 0.6)) / 2},
            [-LN(0.25), -LN(0.2)],
        ),
        ({"name": "mart", "beta": 0}, {"adversarial": CE_ATTACKED + MARGIN, "divergence": 0.0}, None),
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
    loss = objective.loss(CLEAN, ATTACKED, Y)
    assert {name: float(term) for name, term in loss.terms.items()} == pytest.approx(terms)
    assert float(loss.total) == pytest.approx(sum(terms.values()))
    if inner is not None:
        assert objective.inner_loss(ATTACKED, CLEAN, Y).tolist() == pytest.approx(inner)


def test_the_gradient_of_the_divergence_by_hand():
    """d KL(p || q) / d log-odds of q is q - p, and TRADES lets it flow into p too."""
    clean, attacked = CLEAN.clone().requires_grad_(), ATTACKED.clone().requires_grad_()
    objectives.build({"name": "trades", "beta": 2}).loss(clean, attacked, Y).terms["divergence"].backward()
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
    found = objectives.build({"name": "mart", "beta": beta}).loss(clean, attacked, y).total
    assert float(found) == pytest.approx(total / len(y), rel=1e-9)


def test_mart_takes_a_mixed_image_for_none_of_its_classes():
    """As CutMix makes them: the wrong classes are those that the image holds nothing of."""
    shares = torch.tensor([[0.7, 0.3, 0.0]], dtype=torch.float64)
    attacked = torch.tensor([[LN(0.5), LN(0.3), LN(0.2)]], dtype=torch.float64)
    terms = objectives.build("mart").loss(attacked, attacked, shares).terms
    assert float(terms["adversarial"]) == pytest.approx(-0.7 * LN(0.5) - 0.3 * LN(0.3) - LN(1.0001 - 0.2))


@settings(max_examples=25)
@given(st.integers(0, 2**31))
def test_trades_without_beta_is_natural_training(seed):
    clean, attacked, y = logits(seed)
    trades = objectives.build({"name": "trades", "beta": 0}).loss(clean, attacked, y)
    assert torch.equal(trades.total, objectives.build("natural").loss(clean, None, y).total)


@pytest.mark.parametrize("spec", ["trades", "mart"])
def test_beta_below_zero_is_refused(spec):
    with pytest.raises(UserError, match="beta must be at least 0, got -1"):
        objectives.build({"name": spec, "beta": -1})


@pytest.mark.parametrize("base", ["trades", "mart"])
def test_logit_pairing_of_weight_0_is_its_base_method(base):
    clean, adv, y = logits(7)
    paired, alone = objectives.build({"name": "logit_pairing", "base": base, "weight": 0}), objectives.build(base)
    assert torch.equal(paired.loss(clean, adv, y).total, alone.loss(clean, adv, y).total)
    assert torch.equal(paired.inner_loss(adv, clean, y), alone.inner_loss(adv, clean, y))
    assert paired.clean_target == alone.clean_target
    assert objectives.build(objectives.describe(paired)) == paired


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": -1}, "weight must be at least 0, got -1"),
        ({"base": "natural"}, "logit_pairing needs an adversarial base method"),
        ({"base": "joint"}, "logit_pairing needs an adversarial base method of one output"),
    ],
)
def test_what_cannot_be_paired_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        objectives.build({"name": "logit_pairing", **change})


@pytest.fixture(params=objectives.names())
def objective(request) -> Objective:
    return objectives.build(request.param)


def several(objective, *tensors, attacked=False):
    """Logits [B, C] as [B, outputs, C] for an objective of several outputs, each output's own."""
    names = objective.attacked if attacked else objective.outputs
    if not names:
        return tensors if len(tensors) > 1 else tensors[0]
    out = tuple(torch.stack([t.roll(n, 1) * (1 + n / 4) for n, _ in enumerate(names)], 1) for t in tensors)
    return out if len(out) > 1 else out[0]


def logits_for(objective, seed, *, attacked=False, **how):
    clean, adv, y = logits(seed, **how)
    return *several(objective, clean, adv, attacked=attacked), y


def as_asked(objective, clean, attacked):
    return clean if objective.clean else None, attacked if objective.adversarial else None


def test_contract_terms_add_up_to_a_finite_scalar(objective):
    clean, attacked, y = logits_for(objective, 0)
    loss = objective.loss(*as_asked(objective, clean, attacked), y)
    assert loss.total.shape == ()
    assert loss.total.isfinite()
    assert loss.terms
    assert all(term.shape == () for term in loss.terms.values())
    assert torch.allclose(sum(loss.terms.values()), loss.total)


def test_contract_loss_is_the_mean_over_the_batch(objective):
    if not objective.apart:
        pytest.skip("depends on the other images of its batch, as it says")
    clean, attacked, y = logits_for(objective, 1)
    each = [
        objective.loss(*as_asked(objective, clean[i : i + 1], attacked[i : i + 1]), y[i : i + 1]).total
        for i in range(len(y))
    ]
    whole = objective.loss(*as_asked(objective, clean, attacked), y).total
    assert torch.allclose(whole, torch.stack(each).mean())


def test_contract_inner_loss_is_one_number_per_image_by_itself(objective):
    clean, attacked, y = logits_for(objective, 2, attacked=True)
    target = clean if objective.clean_target else None
    inner = objective.inner_loss(attacked, target, y)
    assert inner.shape == y.shape
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    moved = objective.inner_loss(attacked[order], None if target is None else target[order], y[order])
    assert torch.allclose(moved, inner[order])
    point = attacked.clone().requires_grad_()
    objective.inner_loss(point, target, y).sum().backward()
    assert point.grad.isfinite().all()
    assert (point.grad.abs().flatten(1).sum(1) > 0).all()


def test_contract_order_of_images_and_names_of_classes_do_not_matter(objective):
    clean, attacked, y = logits_for(objective, 3)
    before = objective.loss(*as_asked(objective, clean, attacked), y).total
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    moved = objective.loss(*as_asked(objective, clean[order], attacked[order]), y[order]).total
    assert torch.allclose(before, moved)
    classes = torch.tensor([4, 2, 0, 3, 1])
    renamed = objective.loss(
        *as_asked(objective, clean[..., classes], attacked[..., classes]), classes.argsort()[y]
    ).total
    assert torch.allclose(before, renamed)


def test_contract_a_shift_of_all_logits_of_an_image_does_not_matter(objective):
    if objective.registered_name == "logit_pairing":
        pytest.skip("pairs logits, not predictions, as published")
    clean, attacked, y = logits_for(objective, 4)
    shift = torch.arange(len(y), dtype=torch.float64).reshape(-1, *[1] * (clean.dim() - 1)) * 7 - 11
    before = objective.loss(*as_asked(objective, clean, attacked), y).total
    assert torch.allclose(before, objective.loss(*as_asked(objective, clean + shift, attacked - shift), y).total)


def test_contract_class_attributes_say_truly_which_logits_are_used(objective):
    """What is not asked for has no effect, be it NaN; what is asked for gets a gradient."""
    clean, attacked, y = logits_for(objective, 5)
    nan = torch.full_like(clean, math.nan)
    asked = [clean.clone().requires_grad_(), attacked.clone().requires_grad_()]
    given_ = [asked[0] if objective.clean else nan, asked[1] if objective.adversarial else nan]
    total = objective.loss(*given_, y).total
    assert total.isfinite()
    assert torch.equal(total, objective.loss(*as_asked(objective, *asked), y).total)
    total.backward()
    for used, tensor in zip((objective.clean, objective.adversarial), asked, strict=True):
        assert (tensor.grad is not None and bool(tensor.grad.abs().sum() > 0)) == used
    clean, attacked, y = logits_for(objective, 5, attacked=True)
    target = clean if objective.clean_target else torch.full_like(clean, math.nan)
    assert objective.inner_loss(attacked, target, y).isfinite().all()
    if objective.clean_target:
        moved = objective.inner_loss(attacked, attacked, y)
        assert not torch.allclose(moved, objective.inner_loss(attacked, clean, y))


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e2, 1e4])
def test_contract_losses_and_gradients_stay_finite_for_large_logits(objective, scale):
    clean, attacked, y = (t.float() if t.is_floating_point() else t for t in logits_for(objective, 6, scale=scale))
    clean.requires_grad_()
    attacked.requires_grad_()
    total = objective.loss(*as_asked(objective, clean, attacked), y).total
    assert total.isfinite()
    total.backward()
    for tensor in (clean, attacked):
        assert tensor.grad is None or tensor.grad.isfinite().all()
