"""Routers over heads and a sentinel over routers: closed forms, gradients, parts, views and files."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Size, nn

from dualhead.errors import UserError
from dualhead.evaluation.model import outputs_of
from dualhead.heads import attach_second_head
from dualhead.heads.aggregators import SeesFeatures, aggregators
from dualhead.heads.aggregators.after_dder import pooled

X = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


def classifier(trained=(1, 2, 3), heads=3, **fields):
    """A classifier in evaluation mode; these routers count as trained."""
    torch.manual_seed(0)
    aggregator = aggregators.build({"name": "after_dder", **fields})
    dual = attach_second_head(Net(), "stem", example=X, heads=heads, aggregator=aggregator).eval()
    for name in dual.routers:
        router = dual.part(name)
        router.trained.fill_(int(int(name[-1]) in trained))
        nn.init.normal_(router.score.weight, std=3.0)
    return dual


def by_hand(dual, x, top=2, temperature=1.0, trained=(1, 2, 3)):
    """The whole's logits from the formulas of the card, image by image; and the sentinel's weights."""
    features, z = dual.features(x), dual.head_logits(x)
    rows, weights = [], []
    for h, logits in zip(features.mean((2, 3)), z, strict=True):
        mixed, scores = [], []
        for number in trained:
            router = dual.part(f"router{number}")
            given = router.gate.linear.weight @ h + router.gate.linear.bias
            chosen = sorted(range(len(given)), key=lambda k: -float(given[k].detach()))[:top]
            total = sum(given[k].exp() for k in chosen)
            mixed.append(sum(given[k].exp() / total * logits[k] for k in chosen))
            scores.append(router.score.weight[0] @ h + router.score.bias[0])
        v = torch.softmax(torch.stack(scores) / temperature, 0)
        weights.append(v)
        rows.append(sum(a * y for a, y in zip(v, mixed, strict=True)))
    return torch.stack(rows), torch.stack(weights)


@pytest.mark.parametrize("top", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_it_is_what_its_card_says(top, temperature):
    dual = classifier(top=top, temperature=temperature)
    with torch.no_grad():
        expected, _ = by_hand(dual, X, top, temperature)
        torch.testing.assert_close(dual(X).log_softmax(1), expected.log_softmax(1))


def test_a_router_that_was_never_trained_has_no_share():
    dual = classifier(trained=(1, 3))
    with torch.no_grad():
        expected, _ = by_hand(dual, X, trained=(1, 3))
        torch.testing.assert_close(dual(X).log_softmax(1), expected.log_softmax(1))
    alone = classifier(trained=(2,))
    assert torch.equal(alone(X), alone.view("router2")(X))  # forced to one router it is that router, to the bit


def test_before_anything_is_trained_routers_weigh_the_same():
    dual = classifier(trained=())
    each = torch.stack([dual.view(name)(X) for name in dual.routers], 1)
    torch.testing.assert_close(dual(X), each.mean(1))


def test_it_counts_as_trained_once_it_ran_in_training_mode():
    dual = classifier(trained=())
    dual.set_trainable({"router2"})
    dual.train()
    dual(X)
    assert [int(dual.part(name).trained) for name in dual.routers] == [0, 1, 0]


def test_hard_routing_takes_the_best_router_with_the_gradient_of_the_soft_weights():
    hard = classifier(routing="hard")
    _, weights = by_hand(hard, X)
    each = torch.stack([hard.view(name)(X) for name in hard.routers], 1)
    best = weights.argmax(1)
    assert torch.equal(hard(X), each[torch.arange(len(X)), best])
    through = F.one_hot(best, 3) + weights - weights.detach()
    expected = (through[:, :, None] * each).sum(1)
    bias = hard.part("router1").score.bias
    found = [torch.autograd.grad(logits.log_softmax(1)[:, 0].sum(), bias)[0] for logits in (hard(X), expected)]
    torch.testing.assert_close(*found)
    assert float(found[0].abs().sum()) > 0


def test_uniform_routing_ignores_the_scores():
    dual = classifier(routing="uniform")
    each = torch.stack([dual.view(name)(X) for name in dual.routers], 1)
    torch.testing.assert_close(dual(X), each.mean(1))


def test_gradients_reach_images_heads_gates_and_scores_through_the_soft_gates():
    dual, x = classifier(), X.clone().requires_grad_()
    F.cross_entropy(dual(x), Y).backward()
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()
    for name in dual.routers:
        router = dual.part(name)
        assert router.gate.linear.weight.grad.abs().sum() > 0
        assert router.score.weight.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in dual.parameters())


def test_grown_experts_are_known_to_later_routers_alone():
    dual = classifier(experts="grown")
    assert [dual.part(name).gate.linear.out_features for name in dual.routers] == [1, 2, 3]
    before = [dual.view(name)(X) for name in dual.routers]
    torch.testing.assert_close(before[0].log_softmax(1), dual.view("head1")(X).log_softmax(1))
    with torch.no_grad():
        for parameter in dual.get_submodule("head2").parameters():
            parameter.add_(1.0)
    after = [dual.view(name)(X) for name in dual.routers]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, False]
    few = classifier(heads=2, experts="grown", top=1)
    assert [few.part(name).gate.linear.out_features for name in few.routers] == [1, 2, 2]


def test_what_it_shows_to_attacks_tells_outputs_and_shares():
    dual = classifier()
    assert dual.shown_outputs == ("head1", "head2", "head3", "router1", "router2", "router3", "aggregate")
    with torch.no_grad():
        shown, (_, weights) = dual.all_logits(X), by_hand(dual, X)
        shares = shown.logsumexp(2).exp()
        torch.testing.assert_close(shares[:, 3:6], weights)
        torch.testing.assert_close(shares[:, :3].sum(1), torch.ones(len(X)))
        assert torch.equal(shown[:, -1], dual(X))
        for number, name in enumerate(dual.shown_outputs[:-1]):
            expected = dual.view(name)(X).log_softmax(1)
            torch.testing.assert_close(shown[:, number].log_softmax(1), expected, rtol=1e-4, atol=1e-5)


def test_a_router_alone_shows_the_heads_and_itself():
    router = classifier().view("router2")
    with torch.no_grad():
        shown = outputs_of(router, None)(X)
        assert shown.shape == (6, 4, 4)
        assert torch.equal(shown[:, -1], router(X))
        torch.testing.assert_close(shown[:, :3].logsumexp(2).exp().sum(1), torch.ones(6))
    names = {name.partition(".")[0] for name in router.state_dict()}
    assert names == {"trunk", "head1", "head2", "head3", "router2"}


def test_one_pass_of_trunk_and_heads_gives_all():
    dual, calls = classifier(), []
    for part in ("trunk", *dual.heads):
        dual.part(part).register_forward_hook(lambda *_, part=part: calls.append(part))
    dual.all_logits(X)
    assert calls == ["trunk", "head1", "head2", "head3"]


@pytest.mark.parametrize(
    ("parts", "moves"),
    [
        ({"router2"}, {"router2"}),
        ({"head2", "router2"}, {"head2", "router2"}),
        ({"aggregator"}, {"router1", "router2", "router3"}),
        ({"trunk", "head1", "router1"}, {"trunk", "head1", "router1"}),
    ],
)
def test_what_does_not_train_keeps_every_bit(parts, moves):
    dual = classifier(trained=())
    before = copy.deepcopy(dual)
    dual.set_trainable(parts)
    optimiser = torch.optim.SGD([p for p in dual.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        for module in dual.modules():
            module.train()
        F.cross_entropy(dual(X), Y).backward()
        optimiser.step()
        optimiser.zero_grad()
    for name in ("trunk", *dual.heads, *dual.routers):
        now, then = dual.part(name).state_dict(), before.part(name).state_dict()
        assert any(not torch.equal(now[key], then[key]) for key in now) == (name in moves), name
    assert not dual.part("router3").training or "router3" in moves


def test_a_part_that_begins_afresh_takes_its_routers_along():
    dual, other = classifier(), classifier(trained=())
    with torch.no_grad():
        for parameter in other.aggregator.parameters():
            parameter.add_(1.0)
    dual.load_part("router1", other)
    assert torch.equal(dual.part("router1").score.bias, other.part("router1").score.bias)
    assert not torch.equal(dual.part("router2").score.bias, other.part("router2").score.bias)
    dual.load_part("aggregator", other)
    assert all(
        torch.equal(value, other.aggregator.state_dict()[key]) for key, value in dual.aggregator.state_dict().items()
    )


def test_a_copy_is_apart_and_freezes_its_own():
    dual = classifier(trained=())
    copied = copy.deepcopy(dual)
    copied.set_trainable({"router1"})
    copied.train()
    copied(X)
    assert int(copied.part("router1").trained) == 1
    assert int(dual.part("router1").trained) == 0


def test_images_do_not_meet():
    dual = classifier()
    with torch.no_grad():
        torch.testing.assert_close(dual(X), torch.cat([dual(row[None]) for row in X]))


def test_it_works_in_double_precision_and_under_autocast():
    torch.manual_seed(0)
    aggregator = aggregators.build("after_dder")
    dual = attach_second_head(Net().double(), "stem", example=X.double(), heads=3, aggregator=aggregator).eval()
    assert dual(X.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert classifier()(X).dtype == torch.float32


@pytest.mark.parametrize("at", ["input", "stem", "body"])
def test_it_can_be_attached_at_any_cut(at):
    torch.manual_seed(0)
    dual = attach_second_head(Net(), at, example=X, heads=2, aggregator="after_dder-2").eval()
    assert dual(X).shape == (6, 4)


def test_pooling():
    maps, tokens, flat = torch.rand(2, 3, 4, 5), torch.rand(2, 7, 3), torch.rand(2, 4)
    torch.testing.assert_close(pooled(maps), maps.mean((2, 3)))
    torch.testing.assert_close(pooled(tokens), tokens.mean(1))
    assert pooled((maps, tokens, flat)).shape == (2, 10)
    module = aggregators.build("after_dder").create_over([Size((3, 4, 5)), Size((7, 3)), Size((4,))], 10, 2)
    assert isinstance(module, SeesFeatures)
    assert module(torch.randn(2, 2, 10), (maps, tokens, flat)).shape == (2, 10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"routers": 0}, "routers must lie in 1 to 99"),
        ({"top": 0}, "top must be at least 1"),
        ({"temperature": 0}, "temperature must be greater than 0"),
        ({"routing": "random"}, "routing"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        aggregators.build({"name": "after_dder", **fields})


def test_what_does_not_fit_a_model_is_refused():
    with pytest.raises(UserError, match="top is 2, and the model has 1 heads"):
        aggregators.build("after_dder").create_over([Size((3, 4, 4))], 10, 1)
    with pytest.raises(UserError, match="create_over"):
        aggregators.build("after_dder").create(10)
    with pytest.raises(UserError, match="'router4' is no output"):
        classifier().view("router4")
