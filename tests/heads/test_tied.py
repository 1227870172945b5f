"""Tied heads: one set of shared tensors, whatever is done to the classifier, and own ones that alone part the heads."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import nn
from torch.func import functional_call

from dualhead.errors import UserError
from dualhead.heads import DualHeadClassifier, Rows, attach_second_head
from dualhead.heads.tied import WORDS, own_names, own_words, tensors_by_name
from dualhead.models import count_parameters
from dualhead.recipe import load_recipe, parse_recipe
from dualhead.system.replicas import twins as lanes_of
from dualhead.training.averaging import EMA, SWA, WeightAverage
from helpers.training import batch, plain_model, stage_of, step_of, streams_of

CLASSES = 4
X = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % CLASSES
AFFINE, STATISTICS = {"weight", "bias"}, {"running_mean", "running_var", "num_batches_tracked"}


class Net(nn.Module):
    """Two convolutions with batch norm, group norm behind, and a linear layer."""

    def __init__(self, branch=False):
        super().__init__()
        self.branch = branch
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.GroupNorm(2, 6))
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        if self.branch and x.sum() > 1e9:
            return x
        return self.fc(self.body(x).mean((2, 3)))


def net(branch=False):
    """One whose statistics and affine parameters are not at their defaults."""
    torch.manual_seed(0)
    made = Net(branch)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.train()
    for _ in range(3):
        made(torch.rand(16, 3, 8, 8))
    return made


def tied(at="input", own=("batch_norm",), branch=False, heads=2):
    return attach_second_head(net(branch), at, example=X, init="tied", own=list(own), heads=heads, aggregator="mean")


def own_of(dual, head="head2"):
    """Names that a head does not share, by identity."""
    first, theirs = tensors_by_name(dual.head1), tensors_by_name(dual.get_submodule(head))
    assert first.keys() == theirs.keys()
    return {name for name in first if theirs[name] is not first[name]}


def tensors_of(dual):
    return {name: tensor.clone() for name, tensor in dual.state_dict().items()}


def is_norm(name, layers):
    return name.rpartition(".")[0] in layers


NORMS = {"stem.1", "body.1"}


@pytest.mark.parametrize("at", ["input", "stem", "stem.0"])
@pytest.mark.parametrize("training", [True, False])
def test_all_heads_are_the_network_to_the_bit_at_first(at, training):
    model = net()
    expected = copy.deepcopy(model).train(training)(X)
    dual = attach_second_head(model, at, example=X, init="tied", heads=3, aggregator="mean").train(training)
    for head in dual.heads:
        assert torch.equal(copy.deepcopy(dual).view(head)(X), expected), head


@pytest.mark.parametrize(
    ("own", "layers", "kinds"),
    [
        (("batch_norm",), NORMS, AFFINE | STATISTICS),
        (("affine",), NORMS | {"body.3"}, AFFINE),
        (("statistics",), NORMS, STATISTICS),
        (("affine", "statistics"), NORMS | {"body.3"}, AFFINE | STATISTICS),
        (("body.1",), {"body.1"}, AFFINE | STATISTICS),
        (("*.1.running_*",), NORMS, {"running_mean", "running_var"}),
        (("fc", "body.3.weight"), {"fc", "body.3"}, AFFINE),
    ],
)
@pytest.mark.parametrize("branch", [False, True])
def test_what_is_a_heads_own(own, layers, kinds, branch):
    found = own_of(tied(own=own, branch=branch))
    if own[0] == "fc":
        assert found == {"fc.weight", "fc.bias", "body.3.weight"}
    else:
        assert {name.rpartition(".")[0] for name in found} == layers
        assert {name.rpartition(".")[2] for name in found} == kinds
    assert len(found) < len(tensors_by_name(tied(own=own).head1))


def test_a_whole_pass_cut_ties_as_a_traced_one_does():
    with pytest.warns(UserWarning, match="paid twice"):
        dual = tied("stem", branch=True)
    assert dual.split_how == "functional"
    assert own_of(dual) == own_of(tied("stem"))
    with torch.no_grad():
        dual.head1.fc.weight.zero_()
        dual.head1.fc.bias.zero_()
    assert dual.eval().view("head2")(X).count_nonzero() == 0


def test_layers_of_others_and_a_tensor_of_two_names():
    class BatchNormOfTheirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(6, 1, 1)), nn.Parameter(torch.zeros(6, 1, 1))
            self.register_buffer("running_mean", torch.zeros(6, 1, 1))

        def forward(self, x):
            return (x - self.running_mean) * self.weight + self.bias

    class NormedLinear(nn.Linear):
        def forward(self, x):
            return F.linear(x, F.normalize(self.weight))

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 6, 3), BatchNormOfTheirs()
            self.again = BatchNormOfTheirs()
            self.again.weight = self.norm.weight
            self.fc = NormedLinear(6, CLASSES, bias=False)

        def forward(self, x):
            return self.fc(self.again(self.norm(self.conv(x))).mean((2, 3)))

    def of(own):
        return attach_second_head(Two(), "input", example=X, init="tied", own=own, aggregator="mean")

    everything = {f"{layer}.{kind}" for layer in ("norm", "again") for kind in ("weight", "bias", "running_mean")}
    assert own_of(of(["batch_norm"])) == everything
    dual = of(["norm.weight"])  # and so is its other name
    assert own_of(dual) == {"norm.weight", "again.weight"}
    assert dual.head2.norm.weight is dual.head2.again.weight


def test_counts_and_names():
    dual = tied(heads=3)
    base = count_parameters(net())
    assert count_parameters(dual) == base + 2 * 24  # two layers of six channels, weight and bias
    assert dual.added_parameters == 48
    assert all(count_parameters(dual.view(head)) == base for head in dual.heads)
    optimised = [p for p in dual.parameters() if p.requires_grad]
    assert len({id(p) for p in optimised}) == len(optimised)
    assert attach_second_head(net(), "stem", example=X, aggregator="mean").added_parameters > 48


def test_a_step_is_that_of_dual_batch_norm_by_hand():
    """Hybrid adversarial training: clean images through head 1, attacked ones through head 2 (Zhang et al. 2024)."""
    model = net().train()
    dual = attach_second_head(model, "input", example=X, init="tied", aggregator="mean").train()
    norms = {name: t.detach().clone() for name, t in tensors_by_name(model).items() if is_norm(name, NORMS)}
    other = {n: t.requires_grad_(t.is_floating_point() and n.rpartition(".")[2] in AFFINE) for n, t in norms.items()}
    attacked = (X + 0.03 * torch.randn(X.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)

    by_hand = F.cross_entropy(model(X), Y) + F.cross_entropy(functional_call(model, other, (attacked,)), Y)
    by_hand.backward()
    ours = F.cross_entropy(dual.view("head1")(X), Y) + F.cross_entropy(dual.view("head2")(attacked), Y)
    ours.backward()

    assert torch.equal(ours, by_hand)
    first, second = tensors_by_name(dual.head1), tensors_by_name(dual.head2)
    for name, tensor in tensors_by_name(model).items():
        pairs = [(first[name], tensor), *([(second[name], other[name])] if name in other else [])]
        assert name in other or second[name] is first[name]
        for mine, theirs in pairs:
            assert torch.equal(mine, theirs), name
            assert (mine.grad is None) == (theirs.grad is None)
            assert mine.grad is None or torch.equal(mine.grad, theirs.grad), name


@pytest.mark.parametrize("own", ["batch_norm", "affine", "statistics"])
def test_a_training_step_parts_the_heads_by_their_own_tensors_alone(own):
    dual = of_training(own)
    objective = {"name": "joint", "head1": "natural", "head2": "sat", "aggregate": None, "attack": "head2"}
    step = step_of(dual, stage_of(objective, ("trunk", "head1", "head2"), deploy="head1"))
    before, own_before = tensors_of(dual), own_of(dual)
    for number in range(2):
        step(batch(number), streams_of(batch(number)))
    assert own_of(dual) == own_before
    after = dual.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.removeprefix("head1.") not in own_of(dual) for name in moved)
    assert any(not torch.equal(after[f"head1.{name}"], after[f"head2.{name}"]) for name in own_of(dual))
    passes = 4 if own == "affine" else 2  # of two steps: statistics that are shared see both passes of each
    assert {int(after[n] - before[n]) for n in after if n.endswith("num_batches_tracked")} == {passes}


def of_training(own="batch_norm", at="input"):
    """A WideResNet for the batches of the helpers."""
    return attach_second_head(
        plain_model(), at, example=torch.rand(2, 3, 12, 12), init="tied", own=[own], aggregator="mean"
    )


# ---- what is frozen


def steps(dual, output, count=3):
    optimiser = torch.optim.SGD([p for p in dual.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    view = dual.view(output)
    for _ in range(count):
        for module in (dual, view, *dual.head2.modules()):
            module.train()
        F.cross_entropy(view(X), Y).backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("own", ["batch_norm", "affine", "statistics", "fc"])
@pytest.mark.parametrize("branch", [False, True])
def test_head_2_alone_trains_what_is_its_own_and_head_1_stays_to_the_bit(own, branch):
    dual = tied(own=(own,), branch=branch)
    dual.set_trainable({"head2"})
    assert {n for n, p in dual.named_parameters() if p.requires_grad} == {
        f"head2.{n}" for n in own_of(dual) if n.rpartition(".")[2] in AFFINE
    }
    before, logits = tensors_of(dual), copy.deepcopy(dual).eval().view("head1")(X)
    if own == "statistics":
        dual.train().view("head2")(X)
    else:
        steps(dual, "head2")
    changed = {name for name, tensor in dual.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"head2.{name}" for name in own_of(dual)}
    assert torch.equal(dual.eval().view("head1")(X), logits)


def test_head_1_alone_takes_shared_tensors_along_and_leaves_head_2_its_own():
    dual = tied()
    dual.set_trainable({"trunk", "head1"})
    before = tensors_of(dual)
    steps(dual, "head1")
    changed = {name for name, tensor in dual.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {n for n in before if not (n.startswith("head2.") and n.removeprefix("head2.") in own_of(dual))}
    assert dual.is_shaped_by("head2", "head1") and not dual.is_shaped_by("head1", "head2")
    untied = attach_second_head(net(), "stem", example=X, aggregator="mean")
    assert not untied.is_shaped_by("head2", "head1")


def test_all_that_learns_is_free_again_after_a_frozen_stage():
    dual = tied(own=("affine",))
    dual.set_trainable({"head2"})
    assert not dual.train().head2.stem[1].training and dual.head2.training
    assert not dual.view("head2").train().head2.stem[1].training
    dual.set_trainable({"trunk", "head1", "head2"})
    dual.train()
    assert all(module.training for module in dual.head2.modules())
    assert all(parameter.requires_grad for parameter in dual.parameters())


# ---- what is done to a classifier


@pytest.mark.parametrize("own", ["batch_norm", "affine", "statistics"])
@pytest.mark.parametrize("what", ["double", "meta", "copy", "lane", "mean view", "head view"])
def test_what_is_tied_stays_tied(own, what):
    dual = tied(own=(own,))
    expected = own_of(dual)
    if what == "double":
        dual.double()
    elif what == "meta":
        dual.to("meta")
    elif what == "copy":
        dual = copy.deepcopy(dual)
    elif what == "lane":
        (lane,) = lanes_of(dual, 1)
        assert all(a is b for a, b in zip(lane.parameters(), dual.parameters(), strict=True))
        dual = lane
    elif what == "mean view":
        dual.view("mean").to(torch.float64)
    else:
        view = dual.view("head2").to(torch.float64)
        assert all(t.dtype == torch.float64 for t in view.state_dict().values() if t.is_floating_point())
    assert own_of(dual) == expected
    assert isinstance(dual, DualHeadClassifier)


def test_a_move_that_makes_new_parameters_keeps_them_tied(monkeypatch):
    monkeypatch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
    dual = tied()
    before = dual.head1.fc.weight
    dual.double()
    assert dual.head1.fc.weight is not before
    assert dual.head2.fc.weight is dual.head1.fc.weight
    assert len(list(dual.parameters())) == len(list(net().parameters())) + 4


def test_a_view_gives_the_original_state_dict():
    dual = tied("stem")
    steps(dual, "mean")
    for head in dual.heads:
        plain = Net()
        plain.load_state_dict(dual.base_state_dict(head), strict=True)
        assert torch.equal(plain.eval()(X), dual.eval().view(head)(X))
    with pytest.raises(UserError, match="no head of this classifier; its heads are head1, head2"):
        dual.base_state_dict("mean")


# ---- averages


@pytest.mark.parametrize("own", ["batch_norm", "affine"])
def test_ema_of_tied_heads_is_the_recursion_by_hand(own):
    dual = tied(own=(own,))
    average = WeightAverage(dual, EMA(decay=0.5))
    live = {
        name: tensor for name, tensor in (*dual.named_parameters(), *dual.named_buffers()) if tensor.is_floating_point()
    }
    by_hand = None
    for number in range(3):
        steps(dual, "mean", count=1)
        average.update()
        share = max(1 - (1 + number) / (10 + number), 0.5)
        now = {name: tensor.detach().clone() for name, tensor in live.items()}
        by_hand = now if by_hand is None else {n: t + share * (now[n] - t) for n, t in by_hand.items()}
    kept = tensors_of(dual)
    with average.in_place():
        for name, tensor in live.items():
            torch.testing.assert_close(tensor, by_hand[name])
        assert own_of(dual) == own_of(tied(own=(own,)))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in dual.state_dict().items())


def test_shared_statistics_are_estimated_over_the_passes_of_all_heads():
    dual = tied(own=("affine",))
    average = WeightAverage(dual, SWA())
    steps(dual, "mean", count=2)
    average.update()
    images = [torch.rand(8, 3, 8, 8) for _ in range(3)]
    average.reestimate(
        [lambda x=x, h=h: dual.view(h)(x) for x, h in zip(images, ("head1", "head2", "head2"), strict=True)]
    )
    means = torch.stack([dual.head1.stem[0](x).detach().mean((0, 2, 3)) for x in images]).mean(0)
    with average.in_place():
        torch.testing.assert_close(dual.head1.stem[1].running_mean, means)
        assert dual.head2.stem[1].running_mean is dual.head1.stem[1].running_mean
    assert dual.head2.stem[1].num_batches_tracked is dual.head1.stem[1].num_batches_tracked


def test_own_statistics_are_estimated_by_each_head_for_itself():
    dual = tied()
    average = WeightAverage(dual, SWA())
    average.update()
    x, z = torch.rand(8, 3, 8, 8), torch.rand(8, 3, 8, 8)
    average.reestimate([lambda: (dual.view("head1")(x), dual.view("head2")(z))])
    with average.in_place():
        for head, images in ((dual.head1, x), (dual.head2, z)):
            torch.testing.assert_close(head.stem[1].running_mean, head.stem[0](images).mean((0, 2, 3)))


# ---- refusals


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (
            ["batchnorm"],
            r"'batchnorm' matches nothing .* it has batch_norm, affine, statistics, and by name .* stem.0,",
        ),
        (["batch_norm", "layer4.*"], r"'layer4.\*' matches nothing"),
        (["*"], "leaves the heads nothing to share; use clone"),
        ([], "must list at least one of batch_norm, affine, statistics"),
        ("batch_norm", "must list at least one"),
    ],
)
def test_own_that_cannot_be_is_one_line(own, words):
    with pytest.raises(UserError, match=words) as caught:
        attach_second_head(net(), "input", example=X, init="tied", own=own)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tied", [True, False])
def test_head_1_learns_by_a_loss_on_head_2_alone_if_they_are_tied(tied):
    content = load_recipe("digits").resolved()
    content["model"] |= {"attach_at": "input", "second_head": "tied" if tied else "clone"}
    content["stages"] = [{**content["stages"][0], "train": ["trunk", "head1", "head2"], "objective": "sat"}]
    if tied:
        assert parse_recipe(content).stages[0].output == "head2"
        return
    with pytest.raises(UserError, match="head1 would learn nothing, since the loss is on head2 alone"):
        parse_recipe(content)


def test_own_without_tied_heads_is_refused():
    for init in ("reset", "clone", nn.Linear(3, 4)):
        with pytest.raises(UserError, match="own says what tied heads do not share"):
            attach_second_head(net(), "stem", example=X, init=init, own=["batch_norm"])
    with pytest.raises(UserError, match="init 'shared' is not known; use reset, clone, tied or a module"):
        attach_second_head(net(), "stem", example=X, init="shared")


def test_a_network_without_batch_norm_is_told_what_it_has():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4 * 36, CLASSES))
    with pytest.raises(UserError, match="'batch_norm' matches nothing in the second head; it has affine, and by name"):
        attach_second_head(plain, "input", example=X, init="tied")
    dual = attach_second_head(plain, "input", example=X, init="tied", own=["affine"], aggregator="mean")
    assert own_of(dual) == {"1.weight", "1.bias"}


def test_a_buffer_that_is_assigned_anew_cannot_be_shared():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("centre", torch.zeros(6))

        def forward(self, x):
            if self.training:
                self.centre = 0.9 * self.centre + 0.1 * x.detach().mean((0, 2, 3))
            return x - self.centre[:, None, None]

    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), Centred(), nn.Flatten(), nn.Linear(216, CLASSES))
    with pytest.raises(
        UserError, match=r"2\.centre cannot be shared, .* assigns it anew and not in place; add it to own"
    ):
        attach_second_head(model, "input", example=X, init="tied")
    dual = attach_second_head(model, "input", example=X, init="tied", own=["batch_norm", "2"], aggregator="mean")
    assert "2.centre" in own_of(dual)


def test_a_layer_called_input_is_taken_at_its_word():
    layers = {"input": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "flat": nn.Flatten(), "fc": nn.Linear(144, 4)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    dual = attach_second_head(model, "input", example=X, init="tied", aggregator="mean")
    assert dual.split_how == "sequential"
    assert set(dual.trunk.state_dict()) == {"input.weight", "input.bias"}


def test_words_within_some_layers_alone():
    assert own_of(tied(own=("batch_norm@body",))) == {f"body.1.{kind}" for kind in AFFINE | STATISTICS}
    assert own_of(tied(own=("affine@body", "statistics@stem"))) == {
        *(f"body.{layer}.{kind}" for layer in (1, 3) for kind in AFFINE),
        *(f"stem.1.{kind}" for kind in STATISTICS),
    }
    with pytest.raises(UserError, match="'batch_norm@nowhere' matches nothing"):
        tied(own=("batch_norm@nowhere",))


@pytest.mark.parametrize("branch", [False, True])
def test_a_joint_pass_runs_each_row_with_its_routes_tensors(branch):
    """In eval mode statistics are constants, so a joint pass gives each row what its own head gives it."""
    dual = tied(own=("affine", "fc"), branch=branch).eval()
    with torch.no_grad():
        for name in dual.own_of_tied:
            tensors_by_name(dual.head2)[name].add_(0.3)
    expected = torch.cat([dual.view("head1")(X[:2]), dual.view("head2")(X[2:])])
    features = dual.features(X)
    found = dual.heads_together(("head1", "head2"), features, Rows((2, 4), (True, True)))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(dual.view("head1")(X), dual.view("head2")(X), atol=1e-2)
    assert not any("forward" in module.__dict__ for module in dual.head1.modules() if isinstance(module, nn.Linear))


def test_a_joint_pass_moves_shared_statistics_once_by_those_of_the_union():
    dual = tied(own=("affine",)).train()
    alone = copy.deepcopy(dual)
    dual.heads_together(("head1", "head2"), dual.features(X), Rows((2, 4), (True, True)))
    alone.head1(X)
    assert torch.equal(dual.head1.stem[1].running_var, alone.head1.stem[1].running_var)
    assert dual.head1.stem[1].num_batches_tracked == alone.head1.stem[1].num_batches_tracked


def test_tensors_beside_layers_of_their_module_cannot_be_told_whose_rows_they_see():
    class Beside(Net):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * super().forward(x)

    dual = attach_second_head(Beside(), "input", example=X, init="tied", own=["scale"], aggregator="mean")
    with pytest.raises(UserError, match="scale lies beside layers of its own module"):
        dual.heads_together(("head1", "head2"), dual.features(X), Rows((2, 4), (True, True)))


def test_a_batch_norm_with_a_forward_of_its_own_cannot_be_told_whose_rows_it_sees():
    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = net()
    model.stem[1] = Odd(6)
    dual = attach_second_head(model, "input", example=X, init="tied", own=["affine"], aggregator="mean")
    with pytest.raises(UserError, match=r"stem.1 is a batch norm whose forward is its own \(Odd\)"):
        dual.heads_together(("head1", "head2"), dual.features(X), Rows((2, 4), (True, True)))


@pytest.mark.parametrize("own", [["batch_norm"], ["affine"], ["statistics"], ["body.*"], ["batch_norm@body"]])
def test_the_words_for_what_is_own_mean_just_that(own):
    model = tied(own=own)
    words = own_words(model.head2, model.own_of_tied)
    assert own_names(model.head2, words) == model.own_of_tied
    assert list(words) == own if own[0] in WORDS else set(words) == model.own_of_tied
