"""What every registered attack keeps to, with its defaults; a new one is covered by being registered."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dualhead.attacks import Attack, Maximiser, Query, Search, attacks
from dualhead.errors import UserError
from dualhead.threats import Threat, build_threat, threats
from dualhead.threats.lp import ThreatModel
from helpers.attacks import images, network, streams

NAMES = attacks.names()
THREATS = {"Linf": ThreatModel("Linf", 8 / 255), "L2": ThreatModel("L2", 0.3), "L1": ThreatModel("L1", 2.0)}
SHORT = {
    "steps": 2, "queries": 4, "searches": 2, "targets": 2, "candidates": 2, "angles": 3, "shifts": 2, "eot": 1,
}  # fmt: skip
"""Numbers that make attacks quick where their length does not matter."""
SUITES = {
    "autoattack": ["apgd-ce-100", "apgd-t-100", "fab-t-100", "square-5000"],
    "autoattack-plus": [
        {"name": "apgd-ce", "restarts": 5}, {"name": "apgd-dlr", "restarts": 5}, {"name": "fab", "restarts": 5},
        "square", "apgd-t", "fab-t",
    ],
    "autoattack-rand": [{"name": "apgd-ce", "eot": 20}, {"name": "apgd-dlr", "eot": 20}],
    "autoattack-fast": ["apgd-ce", "apgd-t"],
    "autoattack-quick": ["apgd-ce", {"name": "apgd-malt", "targets": 3, "candidates": 9}, "apgd-pm"],
}  # fmt: skip


def quick(name: str) -> Attack:
    fields = {f.name for f in dataclasses.fields(attacks.get(name))}
    return attacks.build({"name": name, **{k: v for k, v in SHORT.items() if k in fields}})


def quick_part(part: Search) -> Search:
    """A member of a suite, shortened likewise; suites have nothing to set."""
    fields = {f.name for f in dataclasses.fields(part)}
    return dataclasses.replace(part, **{k: v for k, v in SHORT.items() if k in fields}).labelled(part.label)


def quick_parts(name: str, classes: int, threat: ThreatModel, heads: int = 2) -> list[Search]:
    return [part if part == quick(name) else quick_part(part) for part in quick(name).parts(classes, threat, heads)]


class TwoHeads(nn.Module):
    """Two networks and their mean."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(network(classes, channels, seed=seed) for seed in range(2))
        self.eval()

    def outputs(self, x):
        z = torch.stack([head(x) for head in self.heads], 1)
        return torch.cat((z, z.mean(1, keepdim=True)), 1)

    def forward(self, x):
        return self.outputs(x)[:, -1]


def home(name: str) -> Threat:
    """Linf, or for an attack that is not defined there the first threat that it is defined for."""
    norms = attacks.build(name).norms
    if norms is None or "Linf" in norms:
        return THREATS["Linf"]
    return build_threat({"name": norms[0], "eps": threats.get(norms[0]).typical_eps}).for_images((3, 8, 8))


def attack_once(name, model, x, y, threat, draws, *, query=None):
    """The attack with shortened members, in the way of `Attack.search`."""

    class Shortened(Attack):
        def parts(self, num_classes, threat, num_heads=1):
            return quick_parts(name, num_classes, threat, num_heads)

    query = query or Query(model, model.outputs)
    return Shortened().search(query, x, y, threat, draws)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("classes", "channels"), [(2, 1), (3, 3), (10, 3)])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_attacks_small_networks_within_the_budget(name, classes, channels, norm):
    model, x, threat = TwoHeads(classes, channels), images(4, channels), THREATS[norm]
    if refuse(name, threat):
        return
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.requires_grad_(True)
    y, kept = model(x).argmax(1), x.clone()
    x_adv = attack_once(name, model, x, y, threat, streams(4))
    assert x_adv.shape == x.shape
    assert x_adv.dtype == torch.float32
    assert not x_adv.requires_grad
    assert torch.equal(x, kept)
    assert (threat.distance(x_adv, x) <= threat.eps).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bits_and_other_samples_do_not_matter(name):
    model, x, threat = TwoHeads(5, 3), images(4), home(name)
    y = model(x).argmax(1)
    first = attack_once(name, model, x, y, threat, streams(4, seed=3))
    assert torch.equal(first, attack_once(name, model, x, y, threat, streams(4, seed=3)))
    order = torch.tensor([2, 0])
    some = attack_once(name, model, x[order], y[order], threat, streams(4, seed=3)[order])
    torch.testing.assert_close(some, first[order], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_samples_that_are_wrong_already_are_left_alone(name):
    model, x = TwoHeads(5, 3), images(3)
    y = (model(x).argmax(1) + 1) % 5
    query = Query(model, model.outputs)
    assert torch.equal(attack_once(name, model, x, y, home(name), streams(3), query=query), x)
    assert query.backward_passes == 0


def refuse(name: str, threat: ThreatModel) -> bool:
    """Whether the attack is not defined for a norm, which it then says."""
    attack = attacks.build(name)
    if attack.norms is None or threat.kind in attack.norms:
        return False
    with pytest.raises(UserError, match=f"not for threat {threat.kind}"):
        attack.check(threat)
    return True


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_a_search_is_a_program_over_rows(name, norm):
    """One row per slot in every tensor, no shared memory, no state outside, and the keys that a scheduler uses."""
    model, x, threat = TwoHeads(5, 3), images(3), THREATS[norm]
    if refuse(name, threat):
        if norm != "Linf":
            return
        threat = home(name)
    clean, origin = model(x), threat.lift(x)
    y = clean.argmax(1)
    for part in quick_parts(name, 5, threat):
        assert part.parts(5, threat, 2)[0].label == part.label
        query = Query(model, model.outputs).through(threat.render)
        state = part.begin(origin, y, clean, torch.full_like(y, part.jobs(5) - 1), threat, streams(3))
        assert query.forward_passes == 0
        kinds = {key: (value.shape, value.dtype) for key, value in state.items()}
        for step in range(part.max_steps()):
            assert {"x", "y", "adversarial", "found", "iteration"} <= state.keys()
            assert all(len(value) == 3 and not value.requires_grad for value in state.values())
            assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state), "shared memory"
            assert {key: (value.shape, value.dtype) for key, value in state.items()} == kinds
            assert (state["iteration"] == step).all()
            old = {key: value.clone() for key, value in state.items()}
            new = part.step(state, query, threat)
            assert all(torch.equal(old[key], state[key]) for key in old), "a step changed the state that it was given"
            state = new
            confined = threat.confine(state["adversarial"], origin)
            wrong = query.logits(confined).argmax(1) != y
            assert (wrong | ~state["found"]).all(), "found something that is none"
        assert bool(query.backward_passes) == part.uses_gradients
        before = query.forward_passes
        part.step(state, query, threat)  # a slot that waits for the others steps on
        assert query.forward_passes > before


@pytest.mark.parametrize("name", NAMES)
def test_labels_differ_and_describe(name):
    attack = attacks.build(name)
    labels = [part.label for part in attack.parts(10, home(name), 2)]
    assert len(set(labels)) == len(labels) > 0
    assert attacks.build(attack.label.partition("(")[0]) == attack
    assert all(note.partition(":")[0] in [attack.label, *labels] for note in attack.notes(2))
    assert attacks.build(attacks.describe(attack)) == attack


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_suites_are_the_published_ones(name, norm):
    parts = attacks.build(name).parts(10, THREATS[norm])
    assert list(parts) == [attacks.build(member) for member in SUITES[name]]


def test_under_l1_the_standard_suite_is_the_one_published_for_it():
    """5 restarts of APGD-CE and 5 targets of APGD-T, each through three radii; 9 targets of FAB-T; 5,000 squares."""
    ce, targeted, fab, square = attacks.build("autoattack").parts(10, THREATS["L1"])
    assert [part.label for part in (ce, targeted, fab, square)] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert (ce.jobs(10), targeted.jobs(10), fab.jobs(10), square.max_steps()) == (5, 5, 9, 5001)
    assert ce.max_steps() == targeted.max_steps() == 103
    assert list(attacks.build("autoattack-fast").parts(10, THREATS["L1"])) == [ce, targeted]


@pytest.mark.parametrize("name", NAMES)
def test_one_class_is_refused(name):
    with pytest.raises(UserError, match="2 classes"):
        attacks.build(name).parts(1, home(name), 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_gradients_is_searched_all_the_same(name):
    model, x = TwoHeads(4, 1), images(2, 1)

    class Blocked(Query):
        pass

    query = Blocked(lambda z: model(z.detach()), lambda z: model.outputs(z.detach()))
    x_adv = attack_once(name, model, x, model(x).argmax(1), home(name), streams(2), query=query)
    assert x_adv.isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if issubclass(attacks.get(name), Maximiser)])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_what_trains_climbs_any_loss_within_the_budget(name, norm):
    model, x, threat = network(), images(6), THREATS[norm]

    def loss(logits):
        return -logits[:, 0]

    attack = attacks.build(name)
    x_adv = attack.maximise(lambda z: loss(model(z)), x, threat, streams(6))
    radius = attack.reach(threat) if name == "n_fgsm" else threat.eps  # which leaves the ball on purpose
    assert (threat.distance(x_adv, x) <= radius + 1e-6).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert (loss(model(x_adv)) > loss(model(x))).float().mean() > 0.5


@settings(max_examples=40)
@given(
    name=st.sampled_from(NAMES),
    norm=st.sampled_from(["Linf", "L2", "L1"]),
    eps=st.floats(1e-4, 1.0),
    shape=st.tuples(st.sampled_from([1, 2, 3]), st.integers(2, 9), st.integers(2, 9)),
    classes=st.integers(2, 6),
    seed=st.integers(0, 1000),
)
def test_every_example_lies_in_ball_and_box_whatever_eps_shape_and_classes(name, norm, eps, shape, classes, seed):
    threat, x = ThreatModel(norm, eps), images(3, *shape, seed=seed)
    if refuse(name, threat):
        return
    weight = torch.randn(3, classes, x[0].numel(), generator=torch.Generator().manual_seed(seed))

    class Linear(nn.Module):
        def outputs(self, z):
            return torch.einsum("hcn,bn->bhc", weight, z.flatten(1)).tanh()

        def forward(self, z):
            return self.outputs(z)[:, -1]

    model = Linear()
    x_adv = attack_once(name, model, x, model(x).argmax(1), threat, streams(3, seed))
    assert (threat.distance(x_adv, x) <= eps).all()
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
