"""Methods that the contract of objectives is made for, each against a loop written by hand: equal to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch.linalg import vector_norm

from dualhead.attacks import attacks
from dualhead.attacks.base import slope
from dualhead.data import StreamImages
from dualhead.errors import UserError
from dualhead.heads import attach_second_head
from dualhead.objectives import Features, Logits
from dualhead.objectives.base import kl_divergence
from dualhead.system.arithmetic import FLOAT32
from dualhead.system.modes import in_eval_mode
from dualhead.threats import ThreatModel
from dualhead.training import Passes
from dualhead.training.step import TrainingStep
from helpers.new_methods import Predictor
from helpers.training import THREAT, batch, dual_model, plain_model, stage_of, streams_of

EVERY = ("trunk", "head1", "head2")
LINF, L2 = ThreatModel("Linf", 8 / 255), ThreatModel("L2", 0.5)


class Hand:
    """A loop by hand on a copy of a model: attacks in eval mode, each pass in train mode, one step of SGD."""

    def __init__(self, model, stage):
        self.model, self.stage = copy.deepcopy(model), stage

    def attack(self, climb, x, attack=None, threat=THREAT, streams=None, modules=()):
        attack = attack or self.stage.attack
        modes = [(m, m.training) for root in (self.model, *modules) for m in root.modules()]
        for root in (self.model, *modules):
            root.eval()
        x_adv = attack.start_point(x, threat, streams)
        for _ in range(attack.steps):
            x_adv = threat.project(threat.ascend(x_adv, slope(climb, x_adv), attack.step_length(threat)), x)
        for module, mode in modes:
            module.training = mode
        return x_adv

    def descend(self, loss, *others):
        parameters = [p for root in (self.model, *others) for p in root.parameters() if p.requires_grad]
        optimiser = self.stage.optimiser.create(parameters)
        optimiser.zero_grad()
        loss.backward()
        gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
        optimiser.step()
        return gradients


def ours(model, stage, data, *, teachers=None, further=None):
    """A step of ours on a copy of a model; the copy, its own heads, and the gradients."""
    model = copy.deepcopy(model)
    passes = Passes.of(model, stage, teachers=teachers, example=data.x[:1], seed=3)
    step = TrainingStep(passes, stage, THREAT, stage.optimiser.create(passes.parameters()), FLOAT32)
    step.begin(0, stage.objective.begin())
    outcome = step(data, streams_of(data), further)
    return model, passes, [p.grad for p in passes.parameters()], outcome


def assert_same(model, gradients, hand, by_hand):
    for one, other in zip(gradients, by_hand, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    for (name, one), other in zip(model.state_dict().items(), hand.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def cross_entropies(z, y):
    return F.cross_entropy(z, y, reduction="none")


@pytest.mark.parametrize("layer", [None, "block1"])
def test_alignment_of_features_with_a_predictor_and_stopped_gradient(layer):
    model, data = dual_model(), batch(0)
    stage = stage_of({"name": "test_align", "layer": layer}, EVERY)
    found, passes, gradients, _ = ours(model, stage, data)
    hand = Hand(model, stage)
    net = hand.model.train()
    net.set_trainable(set(EVERY))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        predictor = Predictor(16)
    taps = {}
    if layer:
        net.trunk.get_submodule(layer).register_forward_hook(lambda m, a, out: taps.update(last=out))
    x_adv = hand.attack(
        lambda x: cross_entropies(net.head("head2", net.features(x)), data.y), data.x, streams=streams_of(data)
    )
    clean = net.features(data.x)
    u = taps["last"] if layer else clean
    p = net.head("head1", clean)
    attacked = net.features(x_adv)
    v = taps["last"] if layer else attacked
    q = net.head("head2", attacked)
    loss = 0.5 * F.cross_entropy(p, data.y) + 0.5 * F.cross_entropy(q, data.y)
    loss = loss + 3.0 * (1.0 - F.cosine_similarity(predictor(v), u.mean((2, 3)).detach()).mean())
    by_hand = hand.descend(loss, predictor)
    assert_same(found, gradients, net, by_hand)
    assert all(
        torch.equal(a, b)
        for a, b in zip(passes.heads.state_dict().values(), predictor.state_dict().values(), strict=True)
    )


LWF = {"name": "lwf", "weight": 0.5}
ALR = {"name": "alr", "weight": 0.5, "attack": "pgd-3"}
AVG = {"name": "avg", "among": ["Linf:8/255", {"norm": "L2", "eps": 0.5, "attack": "pgd-4"}]}
ENERGY = {"name": "test_energy"}


def test_learning_without_forgetting():
    model, data, old = plain_model(), batch(0), plain_model(seed=5).eval()
    stage = stage_of(LWF, ("model",))
    found, _, gradients, _ = ours(model, stage, data, teachers={"before": copy.deepcopy(old)})
    hand = Hand(model, stage)
    net = hand.model.train()
    x_adv = hand.attack(lambda x: cross_entropies(net(x), data.y), data.x, streams=streams_of(data))
    q, p = net(x_adv), net(data.x)
    with torch.no_grad():
        before = old(data.x), old(x_adv)
    kept = [kl_divergence(was / 2, now / 2).mean() for was, now in zip(before, (p, q), strict=True)]
    by_hand = hand.descend(F.cross_entropy(q, data.y) + 0.5 * 2 * 2 * torch.stack(kept).mean())
    assert_same(found, gradients, net, by_hand)


def test_a_second_inner_maximisation():
    model, data = plain_model(), batch(0)
    stage = stage_of(ALR, ("model",))
    found, _, gradients, _ = ours(model, stage, data)
    hand = Hand(model, stage)
    net, noise = hand.model.train(), streams_of(data)
    x_adv = hand.attack(lambda x: cross_entropies(net(x), data.y), data.x, streams=noise)
    with torch.no_grad(), in_eval_mode(net):
        target = net(data.x)
    far = hand.attack(
        lambda x: vector_norm(net(x) - target, dim=1), data.x, attacks.build("pgd-3"), streams=noise.fork("far")
    )
    z, moved, q = net(data.x), net(far), net(x_adv)
    loss = F.cross_entropy(q, data.y) + 0.5 * vector_norm(moved - z, dim=1).mean()
    assert_same(found, gradients, net, hand.descend(loss))


def test_the_mean_over_two_threats():
    model, data = plain_model(), batch(0)
    stage = stage_of(AVG, ("model",))
    found, _, gradients, _ = ours(model, stage, data)
    hand = Hand(model, stage)
    net, noise = hand.model.train(), streams_of(data)

    def attacked(attack, threat, streams):
        return hand.attack(lambda x: cross_entropies(net(x), data.y), data.x, attack, threat, streams)

    first = attacked(stage.attack, LINF, noise)
    second = attacked(attacks.build("pgd-4"), L2, noise.fork("attacked2"))
    loss = (F.cross_entropy(net(first), data.y) + F.cross_entropy(net(second), data.y)) / 2
    assert_same(found, gradients, net, hand.descend(loss))


def test_an_energy_on_streams_of_real_images_and_seeds():
    model, data, real = plain_model(), batch(0), batch(1)
    seeds = 0.5 + 0.1 * streams_of(data).fork("seeds").normal(3, 12, 12)
    stage = stage_of({"name": "test_energy", "steps": 2}, ("model",))
    further = {"real": StreamImages(real.x, real.y), "seeds": StreamImages(seeds)}
    found, _, gradients, outcome = ours(model, stage, data, further=further)
    hand = Hand(model, stage)
    net, noise = hand.model.train(), streams_of(data)
    x_adv = hand.attack(lambda x: cross_entropies(net(x), data.y), data.x, streams=noise)
    ascent = attacks.build({"name": "pgd", "steps": 2, "step_size": 0.1, "start": "clean"})
    made = hand.attack(
        lambda x: net(x).gather(1, data.y[:, None])[:, 0], seeds, ascent, ThreatModel("L2", 1e3),
        streams=noise.fork("contrast"),
    )  # fmt: skip
    assert not torch.equal(made, seeds)
    q, up, down = net(x_adv), net(real.x).logsumexp(1), net(made).logsumexp(1)
    loss = F.cross_entropy(q, data.y) + 0.5 * (F.softplus(-up).mean() + F.softplus(down).mean())
    assert_same(found, gradients, net, hand.descend(loss))
    assert torch.equal(outcome.terms["gap"], (up - down).detach().mean())
    assert outcome.terms["loss"] == outcome.terms["adversarial"] + outcome.terms["energy"]


class TwoNorms(torch.nn.Module):
    """Batch norm of two routes by hand: whoever asks says which."""

    def __init__(self, norm):
        super().__init__()
        self.norms = torch.nn.ModuleList([norm, copy.deepcopy(norm)])
        self.route = 0

    def forward(self, x):
        return self.norms[self.route](x)


def with_two_norms(model):
    """A copy of a network in which each batch norm is two, and what sets the route of all of them."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, TwoNorms(module))

    def through(route, x):
        for module in model.modules():
            if isinstance(module, TwoNorms):
                module.route = route
        return model(x)

    return model, through


def routed(state, route, head):
    """The state of a route by hand under the names that ours has."""
    own = {key: value for key, value in state.items() if f"norms.{1 - route}." not in key}
    return {f"{head}.{key.replace(f'norms.{route}.', '')}": value for key, value in own.items()}


DUAL_NORM = {
    "trades": {"name": "trades", "beta": 6, "clean": "head1", "robust": "head2"},
    "hybrid": {"name": "hybrid", "alpha": 0.5, "clean": "head1", "robust": "head2"},
    "mart": {"name": "mart", "beta": 5, "clean": "head1", "robust": "head2"},
}


def loss_by_hand(method, p, q, y):
    """The loss of a method from logits of clean and of attacked images."""
    if method == "trades":
        return F.cross_entropy(p, y) + 6.0 * kl_divergence(p, q).mean()
    if method == "hybrid":
        return 0.5 * F.cross_entropy(p, y) + 0.5 * F.cross_entropy(q, y)
    right = F.one_hot(y, q.shape[1]).bool()
    wrong = q.softmax(1).masked_fill(right, 0.0).amax(1)
    boosted = F.cross_entropy(q, y) - torch.log(1.0001 - wrong).mean()
    doubt = 1.0 - (p.softmax(1) * right).sum(1)
    return boosted + 5.0 * (kl_divergence(p, q) * doubt).mean()


@pytest.mark.parametrize("method", ["trades", "hybrid", "mart"])
def test_tied_heads_are_training_with_dual_batch_norm(method):
    base, data = plain_model(), batch(0)
    tied = attach_second_head(base, "input", example=data.x[:2], init="tied", own=["batch_norm"])
    stage = stage_of(DUAL_NORM[method], ("trunk", "head1", "head2"))
    found, _, _, _ = ours(tied, stage, data)
    net, through = with_two_norms(base)
    hand = Hand(net, stage)
    hand.model = net.train()
    if method == "trades":
        with in_eval_mode(net), torch.no_grad():
            target = through(0, data.x)

    def climb(x):
        if method == "trades":
            return kl_divergence(target, through(1, x))
        return cross_entropies(through(1, x), data.y)

    x_adv = hand.attack(climb, data.x, streams=streams_of(data))
    hand.descend(loss_by_hand(method, through(0, data.x), through(1, x_adv), data.y))
    state = found.state_dict()
    expected = {**routed(net.state_dict(), 0, "head1"), **routed(net.state_dict(), 1, "head2")}
    assert {key for key in state if not key.startswith("aggregator.")} == set(expected)
    for key, value in expected.items():
        assert torch.equal(state[key], value), key
    apart = [key for key in state if key.startswith("head2.") and not torch.equal(state[key], state["head1" + key[5:]])]
    assert {key.rpartition(".")[2] for key in apart} >= {"weight", "bias", "running_mean", "running_var"}


class UnionNorm(torch.nn.Module):
    """Batch norm by hand whose statistics are of all rows, or of the clean ones, and whose affine map is the route's.

    In training the first half of the rows is clean and of route 0, the rest attacked and of route 1; in eval mode
    `route` says which.
    """

    def __init__(self, norm, clean_only, own_affine):
        super().__init__()
        self.norm, self.clean_only, self.route = copy.deepcopy(norm), clean_only, 0
        self.weight = torch.nn.ParameterList([norm.weight.detach().clone() for _ in range(1 + own_affine)])
        self.bias = torch.nn.ParameterList([norm.bias.detach().clone() for _ in range(1 + own_affine)])
        self.norm.weight = self.norm.bias = None

    def affine(self, x, route):
        route = min(route, len(self.weight) - 1)
        return x * self.weight[route].view(1, -1, 1, 1) + self.bias[route].view(1, -1, 1, 1)

    def forward(self, x):
        if not self.training:
            return self.affine(self.norm(x), self.route)
        clean, attacked = x.chunk(2)
        if self.clean_only:
            variance, mean = torch.var_mean(clean, (0, 2, 3), correction=0, keepdim=True)
            done = self.norm(clean), (attacked - mean) * torch.rsqrt(variance + self.norm.eps)
        else:
            done = self.norm(x).chunk(2)
        return torch.cat([self.affine(part, route) for route, part in enumerate(done)])


def with_union_norms(model, clean_only, own_affine):
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, UnionNorm(module, clean_only, own_affine))
    return model


@pytest.mark.parametrize("forward", ["joint", "joint_clean"])
@pytest.mark.parametrize("method", ["trades", "hybrid", "mart"])
@pytest.mark.parametrize("own_affine", [True, False])
def test_statistics_of_the_union_and_of_the_clean_images_for_all_rows(method, forward, own_affine):
    """Setup 2 of dual batch norm, and a single batch norm that sees the clean rows alone, in one forward."""
    base, data = plain_model(), batch(0)
    objective = DUAL_NORM[method]
    if own_affine:
        model = attach_second_head(base, "input", example=data.x[:2], init="tied", own=["affine"])
        stage = stage_of(objective, ("trunk", "head1", "head2"), forward=forward)
    else:
        model = copy.deepcopy(base)
        objective = {key: value for key, value in objective.items() if key not in ("clean", "robust")}
        stage = stage_of(objective, ("model",), forward=forward)
    found, _, _, _ = ours(model, stage, data)
    net = with_union_norms(base, forward == "joint_clean", own_affine)
    norms = [module for module in net.modules() if isinstance(module, UnionNorm)]
    hand = Hand(net, stage)
    hand.model = net.train()

    def through(route, x):
        for norm in norms:
            norm.route = route
        return net(x)

    if method == "trades":
        with in_eval_mode(net), torch.no_grad():
            target = through(0, data.x)

    def climb(x):
        if method == "trades":
            return kl_divergence(target, through(1, x))
        return cross_entropies(through(1, x), data.y)

    x_adv = hand.attack(climb, data.x, streams=streams_of(data))
    p, q = net(torch.cat([data.x, x_adv])).chunk(2)
    hand.descend(loss_by_hand(method, p, q, data.y))
    for route, part in enumerate(("head1.", "head2.") if own_affine else ("",)):
        state = {key.removeprefix(part): value for key, value in found.state_dict().items() if key.startswith(part)}
        for name, module in net.named_modules():
            if isinstance(module, UnionNorm):
                same = own_affine or forward == "joint_clean"
                expected = {"weight": module.weight[route], "bias": module.bias[route], **module.norm.state_dict()}
                for key, value in expected.items():
                    if same:
                        assert torch.equal(state[f"{name}.{key}"], value), (name, key)
                    else:  # torch applies the affine map in the same kernel
                        assert torch.allclose(state[f"{name}.{key}"], value, atol=1e-5), (name, key)


def test_own_statistics_and_heads_without_clean_images_are_refused_with_clean_statistics():
    base, data = plain_model(), batch(0)
    tied = attach_second_head(base, "input", example=data.x[:2], init="tied", own=["batch_norm"])
    stage = stage_of(DUAL_NORM["hybrid"], EVERY, forward="joint_clean")
    with pytest.raises(UserError, match="head2 sees no clean image and has statistics of its own"):
        ours(tied, stage, data)


def test_layers_that_are_told_whose_rows_they_see_are_not_computed_again():
    base, data = plain_model(), batch(0)
    tied = attach_second_head(base, "input", example=data.x[:2], init="tied", own=["affine"])
    stage = stage_of(DUAL_NORM["hybrid"], EVERY, forward="joint", checkpoint_activations=True)
    with pytest.raises(UserError, match="checkpoint_activations: not with forward: joint"):
        ours(tied, stage, data)


def test_equal_needs_are_one_and_no_part_runs_twice_on_the_same_images():
    model = dual_model()
    passes = Passes(model, EVERY)
    calls = dict.fromkeys(model.parts, 0)
    for part in model.parts:
        model.get_submodule(part).register_forward_hook(lambda *_, part=part: calls.update({part: calls[part] + 1}))
    needs = {
        "a": Logits("head1"), "b": Logits("head1"), "c": Logits("mean"), "d": Logits("aggregate"),
        "e": Features(), "f": Logits("aggregate", on="attacked"),
    }  # fmt: skip
    data = batch(0)
    seen = passes.look(needs)({"clean": data.x, "attacked": data.x})
    assert calls == {"trunk": 2, "head1": 2, "head2": 2, "aggregator": 2}
    assert torch.equal(seen["a"], seen["b"])
    calls.update(dict.fromkeys(calls, 0))
    passes.look(needs, together=("clean", "attacked"))({"clean": data.x, "attacked": data.x})
    assert calls == {"trunk": 1, "head1": 1, "head2": 1, "aggregator": 1}


@pytest.mark.parametrize(
    ("need", "told"),
    [
        (Logits("head3"), "needs the output head3; this model has head1, head2, mean, aggregate"),
        (Features("head3"), "needs features of head3"),
        (Features("head1"), "name a layer of head1"),
        (Features("head1", layer="nothing"), "head1 has no layer 'nothing'"),
        (Features(through="nobody"), "has no head 'nobody'"),
    ],
)
def test_what_a_model_does_not_have_is_told(need, told):
    with pytest.raises(UserError, match=told):
        Passes(dual_model(), EVERY).look({"need": need})


def test_layers_of_a_frozen_trunk_are_refused():
    with pytest.raises(UserError, match="the trunk is frozen"):
        Passes(dual_model(), ("head2",)).look({"need": Features(layer="block1")})


def test_own_heads_learn_are_not_saved_and_leave_torch_s_generator_alone():
    stage, data = stage_of("test_align", EVERY), batch(0)
    model = dual_model()
    keys = set(model.state_dict())
    before = torch.get_rng_state()
    passes = Passes.of(model, stage, example=data.x[:1], seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert set(model.state_dict()) == keys
    assert {id(p) for p in passes.heads.parameters()} <= {id(p) for p in passes.parameters()}


def test_ikl_is_refused_with_micro_batches():
    with pytest.raises(Exception, match="micro_batch: the loss of 'ikl' is another one for pieces of a batch"):
        stage_of("ikl", ("model",), micro_batch=8)
    stage_of("ikl", ("model",), micro_batch=128)


@pytest.mark.parametrize("objective", [LWF, ALR, AVG, ENERGY], ids=lambda objective: objective["name"])
def test_pieces_and_lanes_train_what_the_whole_batch_does(objective):
    """In eval mode all that an image needs is its own; so all but batch norm's statistics are those of the batch."""
    model = plain_model().double().float()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval().requires_grad_(requires_grad=False)
            module.train = lambda mode=True, module=module: module  # statistics are constants
    data, real = batch(0, 32), batch(1, 32)
    seeds = streams_of(data).fork("seeds").uniform(3, 12, 12)
    further = {"real": StreamImages(real.x, real.y), "seeds": StreamImages(seeds)} if objective is ENERGY else {}
    weights = []
    for micro, count in ((None, 1), (16, 1), (None, 2)):
        copied = copy.deepcopy(model)
        stage = stage_of(objective, ("model",), micro_batch=micro, attack="pgd-2")
        teachers = {"before": plain_model(seed=5).eval()} if objective is LWF else {}
        passes = Passes.of(copied, stage, teachers=teachers)
        arithmetic = type(FLOAT32)(bf16=False, lanes=count)
        step = TrainingStep(passes, stage, THREAT, stage.optimiser.create(passes.parameters()), arithmetic)
        step.begin(0, stage.objective.begin())
        step(data, streams_of(data), further)
        weights.append(torch.cat([p.detach().flatten() for p in copied.parameters()]))
    for other in weights[1:]:
        assert torch.allclose(weights[0], other, atol=2e-5)
