"""Auto-PGD against the published code, step by step, and against linear models whose answer is known."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from pyautoattack import autopgd_base
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

from dualhead.attacks import Query, attacks
from dualhead.attacks.apgd import APGDCE, APGDDLR, APGDT
from dualhead.errors import UserError
from dualhead.threats.lp import ThreatModel
from helpers.attacks import Recorder, drawn, images, linear_problem, network, run, run_staggered, streams

BATCH = 6
LINF, L2 = ThreatModel("Linf", 0.2), ThreatModel("L2", 0.25)


def reference(kind, model, threat, steps=100, eot=1):
    common = {"norm": threat.norm, "eps": threat.eps, "n_iter": steps, "eot_iter": eot, "device": "cpu"}
    if kind == "dlr-targeted":
        return APGDAttack_targeted(model, **common)
    return APGDAttack(model, loss=kind, **common)


def noise(draws, job=0):
    """What the reference draws, from our streams."""
    draws = draws.fork(torch.full((BATCH,), job))
    return {
        "rand": lambda shape, **_: draws.uniform(*shape[1:]).to(torch.get_default_dtype()),
        "randn": lambda shape, **_: draws.normal(*shape[1:]).to(torch.get_default_dtype()),
    }


@pytest.fixture
def precision(request):
    """The default dtype for a test: L2 is compared in float64, in which rounding does not decide comparisons."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


# On these problems the samples' step sizes come to differ. With DLR those are compared that are not fooled: where the
# true class has fallen to third place the loss is constant, and its gradient is rounding. They are few, and whether
# their step sizes differ depends on the processor's rounding.
PROBLEMS = [
    ("ce", APGDCE(), 0, 0.2, 0.25, 3.0, 0),
    ("ce", APGDCE(eot=3), 0, 0.2, 0.25, 3.0, 0),
    ("dlr", APGDDLR(), 0, 0.008, 0.25, 4.0, 1),
    ("dlr-targeted", APGDT(), 3, 0.2, 0.25, 3.0, 1),
]


@pytest.mark.parametrize(
    ("norm", "precision"), [("Linf", torch.float32), ("L2", torch.float64)], indirect=["precision"], ids=["Linf", "L2"]
)
@pytest.mark.parametrize(("kind", "search", "job", "linf", "l2", "gain", "seed"), PROBLEMS)
def test_follows_the_reference_step_by_step(norm, precision, kind, search, job, linf, l2, gain, seed, monkeypatch):
    threat = ThreatModel(norm, linf if norm == "Linf" else l2)
    model = network(gain=gain, seed=seed).to(precision)
    x = images(BATCH).to(precision)
    y = model(x).argmax(1)
    draws = streams(BATCH)
    theirs, ours = Recorder(model), Recorder(model)
    theirs.watched = ("step_size",)

    attack = reference(kind, theirs, threat, eot=search.eot)
    attack.init_hyperparam(x)
    attack.y_target = model(x).sort(1)[1][:, -2 - job]
    with drawn(monkeypatch, **noise(draws, job)):
        best, robust, best_loss, adversarial = attack.attack_single_run(x, y)
    step_sizes = []
    state, query = run(
        search, ours, x, y, threat, draws, job=job, watch=lambda state: step_sizes.append(state["step_size"])
    )

    rows = robust if kind == "dlr" else torch.ones_like(robust)
    close = {"rtol": 0, "atol": 2e-6}
    assert len(theirs.with_gradient) == len(ours.with_gradient) == 101 * search.eot
    for k, (a, b) in enumerate(zip(theirs.with_gradient, ours.with_gradient, strict=True)):
        torch.testing.assert_close(b[rows], a[rows], **close, msg=f"iterate {k}")
    for k in range(1, 101):  # the step size that led to query k
        expected = theirs.local[k * search.eot]["step_size"].flatten()
        torch.testing.assert_close(step_sizes[k][rows], expected[rows], msg=f"step size {k}")
    assert (step_sizes[-1][rows] < step_sizes[0][rows]).any(), "no step size is ever halved: too weak a test"
    if kind != "dlr":
        assert len(set(step_sizes[-1][rows].tolist())) > 1, "all samples have the same step sizes: too weak a test"
    assert torch.equal(state["found"], ~robust)
    torch.testing.assert_close(state["best_loss"][rows], best_loss[rows], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state["best"][rows], best[rows], **close)
    found = state["found"] & rows
    torch.testing.assert_close(state["adversarial"][found], adversarial[found], **close)
    assert query.forward_passes == query.backward_passes == 101 * BATCH * search.eot


@pytest.mark.parametrize("precision", [torch.float64], indirect=True)
@pytest.mark.parametrize("steps", [100, 7, 170])
@pytest.mark.parametrize(
    ("kind", "search", "job"), [("ce", APGDCE(), 0), ("dlr", APGDDLR(), 0), ("dlr-targeted", APGDT(), 1)]
)
def test_l1_follows_the_reference_through_its_three_radii(precision, kind, search, job, steps, monkeypatch):
    """In float64, which the reference's casts to float32 are made to leave alone; see `_Sparse` for what is counted."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.to(torch.float64))
    monkeypatch.setattr(autopgd_base, "L0_norm", lambda z: (z.abs() > 1e-12).flatten(1).sum(1))
    model, threat = network(gain=3.0).double(), ThreatModel("L1", 3.0)
    x = images(BATCH).double()
    y = model(x).argmax(1)
    draws, theirs, ours = streams(BATCH), Recorder(model), Recorder(model)
    attack = reference(kind, theirs, threat, steps)
    attack.init_hyperparam(x)
    attack.y_target = model(x).sort(1)[1][:, -2 - job]
    start = noise(draws, job)["randn"](x.shape)
    monkeypatch.setattr(torch, "randn_like", lambda _: start.clone())
    lengths = [-(-3 * steps // 10)] * 2
    radii, lengths = [9.0, 6.0, 3.0], [*lengths, steps - sum(lengths)]
    best, robust, best_loss, adversarial = attack.decr_eps_pgd(x, y, radii, lengths)
    (sparse,) = dataclasses.replace(search, steps=steps).parts(10, threat)
    seen = []
    state, _ = run(sparse, ours, x, y, threat, draws, job=job, watch=lambda s: seen.append(s["step_size"]))
    assert len(theirs.with_gradient) == len(ours.with_gradient) == steps + 3
    rows = robust if kind == "dlr" else torch.ones_like(robust)  # see PROBLEMS
    for k, (a, b) in enumerate(zip(theirs.with_gradient, ours.with_gradient, strict=True)):
        torch.testing.assert_close(b[rows], a[rows], rtol=0, atol=2e-6, msg=f"iterate {k}")
    assert torch.equal(state["found"], ~robust)
    torch.testing.assert_close(state["best"][rows], best[rows], rtol=0, atol=2e-6)
    torch.testing.assert_close(state["best_loss"][rows], best_loss[rows], rtol=1e-5, atol=1e-5)
    found = state["found"] & rows
    torch.testing.assert_close(state["adversarial"][found], adversarial[found], rtol=0, atol=2e-6)
    if steps > 7:
        assert (torch.stack(seen)[-lengths[-1] :].amin(0) < 3.0).any(), "no step is ever shortened: too weak a test"


def test_l2_in_float32_follows_the_reference_up_to_the_first_checkpoint(monkeypatch):
    model, x = network(), images(BATCH)
    y = model(x).argmax(1)
    draws, theirs, ours = streams(BATCH), Recorder(model), Recorder(model)
    attack = reference("ce", theirs, L2)
    attack.init_hyperparam(x)
    with drawn(monkeypatch, **noise(draws)):
        attack.attack_single_run(x, y)
    run(APGDCE(), ours, x, y, L2, draws)
    for a, b in zip(theirs.with_gradient[:23], ours.with_gradient[:23], strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=2e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 33, 150])
def test_follows_the_reference_for_other_numbers_of_steps(steps, monkeypatch):
    model, x = network(seed=1, gain=3.0), images(BATCH, seed=4)
    y = model(x).argmax(1)
    draws, theirs, ours = streams(BATCH), Recorder(model), Recorder(model)
    attack = reference("ce", theirs, LINF, steps)
    attack.init_hyperparam(x)
    with drawn(monkeypatch, **noise(draws)):
        attack.attack_single_run(x, y)
    run(APGDCE(steps=steps), ours, x, y, LINF, draws)
    for a, b in zip(theirs.with_gradient, ours.with_gradient, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=2e-6)


def test_the_gradient_is_the_mean_over_all_passes():
    weights = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(0))
    asked = []

    def model(z):  # answers otherwise at each pass
        asked.append(z.detach().clone())
        return z.flatten(1) @ weights[(len(asked) - 1) % 3].T

    x, y = images(5, 1, 3, 4), torch.arange(5) % 4
    search = APGDCE(steps=3, eot=3)
    state = search.begin(x, y, torch.zeros(5, 4), torch.zeros_like(y), L2, streams(5))
    state = search.step(state, Query(model), L2)
    z = asked[0].requires_grad_()
    total = sum(torch.nn.functional.cross_entropy(z.flatten(1) @ w.T, y, reduction="sum") for w in weights)
    (gradient,) = torch.autograd.grad(total, z)
    assert len(asked) == 3
    torch.testing.assert_close(state["best_gradient"], gradient / 3)


class Scripted(torch.nn.Module):
    """A model whose k-th answer is given, so that every course that losses can take is seen; class 0 is the truth."""

    def __init__(self, script):
        super().__init__()
        self.script, self.asked = script, 0

    def forward(self, x):
        lead = self.script[self.asked] + 1e-4 * (x - 0.5).sum((1, 2, 3))
        self.asked += 1
        return torch.stack((torch.zeros_like(lead), lead, lead - 5.0), 1)


def courses():
    """Losses [101, B] that rise with different frequency, stay, or start high and never come back there."""
    generator = torch.Generator().manual_seed(0)
    rises = torch.rand(101, 96, generator=generator) < torch.linspace(0.5, 1.0, 96)
    course = torch.where(rises, 0.02, -0.03).cumsum(0)
    course[0] += torch.tensor([0.0, 3.0, -3.0]).repeat(32)
    course[30:, ::7] = course[30, ::7]  # a plateau
    return course


@pytest.mark.parametrize(("kind", "search"), [("ce", APGDCE()), ("dlr", APGDDLR())])
def test_step_sizes_are_the_references_whatever_the_losses_do(kind, search, monkeypatch):
    script, x = courses(), images(96, 1, 3, 3)
    y, draws = torch.zeros(96, dtype=torch.long), streams(96)
    theirs = Recorder(Scripted(script))
    theirs.watched = ("step_size",)
    attack = reference(kind, theirs, LINF)
    attack.init_hyperparam(x)
    noise = draws.fork(y)
    with drawn(monkeypatch, rand=lambda shape, **_: noise.uniform(*shape[1:])):
        attack.attack_single_run(x, y)
    step_sizes = []
    query = Query(Scripted(script))
    state = search.begin(x, y, torch.zeros(96, 3), y, LINF, draws)
    for _ in range(101):
        step_sizes.append(state["step_size"])
        state = search.step(state, query, LINF)
    for k in range(1, 101):
        torch.testing.assert_close(step_sizes[k], theirs.local[k]["step_size"].flatten(), msg=f"step size {k}")
    assert len(set(step_sizes[-1].tolist())) > 4


def test_checkpoints_are_the_published_ones():
    model, x = network(), images(2)
    ends = []

    def watch(state):
        if state["iteration"][0] > 1 and state["window_left"][0] == state["window"][0]:
            ends.append(int(state["iteration"][0]) - 1)

    run(APGDCE(), model, x, model(x).argmax(1), LINF, streams(2), watch=watch)
    assert ends == [22, 41, 57, 70, 80, 87, 93, 99]


def test_targets_are_the_runners_up_of_the_clean_output():
    model, x = network(), images(BATCH)
    clean = model(x)
    y = clean.argmax(1)
    order = clean.argsort(1, descending=True)
    search = APGDT(restarts=2)
    assert search.jobs(10) == 18
    for job in range(18):
        state = search.begin(x, y, clean, torch.full_like(y, job), LINF, streams(BATCH))
        assert torch.equal(state["target"], order[:, 1 + job // 2])


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
def test_few_classes_have_fewer_targets_and_a_note_where_the_loss_differs(classes):
    assert APGDT().jobs(classes) == classes - 1
    assert bool(APGDT().notes(classes)) == (classes < 4)
    assert bool(APGDDLR().notes(classes)) == (classes < 3)
    assert APGDCE().notes(classes) == []
    model, x = network(classes), images(BATCH)
    clean = model(x)
    y = clean.argmax(1)
    for search in (APGDT(steps=3), APGDDLR(steps=3)):
        for job in range(search.jobs(classes)):
            state, _ = run(search, model, x, y, LINF, streams(BATCH), job=job)
            assert state["best_loss"].isfinite().all()
            assert (state["target"] == y).all() or (state["target"] != y).all()


@pytest.mark.parametrize("threat", [LINF, L2], ids=["Linf", "L2"])
@pytest.mark.parametrize("search", [APGDCE(steps=12), APGDT(steps=12)])
def test_a_samples_result_does_not_depend_on_when_it_starts_or_on_its_neighbours(search, threat):
    model, x = network(gain=3.0), images(7)
    y = model(x).argmax(1)
    job = torch.arange(7) % search.jobs(10)
    together = run_staggered(search, model, x, y, threat, streams(7), job=job, slots=3)
    for row in range(7):
        one = slice(row, row + 1)
        state, _ = run(search, model, x[one], y[one], threat, streams(7)[torch.tensor([row])], job=job[one])
        torch.testing.assert_close(together["adversarial"][one], state["adversarial"], rtol=0, atol=2e-6)
        assert together["found"][row] == state["found"]


def test_passes_are_those_of_the_published_cost_where_no_sample_is_fooled():
    def firm(x):  # the gradient is not zero, and no class ever changes
        return (
            x.flatten(1)[:, :10] * 1e-3 + torch.nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), 10) * 9.0
        )

    x, y = images(4), torch.zeros(4, dtype=torch.long)
    for name, forward, backward in (("apgd-ce", 103, 101), ("apgd-t", 1 + 909 + 9, 909)):
        query = Query(firm)
        attacks.build(name).search(query, x, y, LINF, streams(4))
        assert (query.forward_passes, query.backward_passes) == (4 * forward, 4 * backward)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t"])
def test_on_linear_models_fools_just_outside_the_margin_and_not_inside(name, norm, classes):
    # An untargeted loss need not climb to the nearest of several boundaries: give it one that is near.
    model, x, y, margin = linear_problem(norm, classes, near=classes if name == "apgd-t" else 2)
    for factor, fooled in ((0.98, False), (1.02, True)):
        for row in range(2):
            one, threat = slice(row, row + 1), ThreatModel(norm, factor * margin[row].item())
            x_adv = attacks.build(f"{name}-30")(model, x[one], y[one], threat, generator=streams(1))
            assert (threat.distance(x_adv, x[one]) <= threat.eps).all()
            assert (model(x_adv).argmax(1) != y[one]).item() == fooled


@pytest.mark.parametrize("field", ["steps", "restarts", "eot"])
def test_impossible_values_are_refused(field):
    with pytest.raises(UserError, match=f"{field} must be at least 1"):
        attacks.build({"name": "apgd-ce", field: 0})
    with pytest.raises(UserError, match="rho"):
        attacks.build({"name": "apgd-t", "rho": 1.5})
