"""The classifier with two heads: what the traps in published code would break, each with a test that they fail."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import nn

from dualhead.errors import UserError
from dualhead.heads import DualHeadClassifier, attach_second_head
from dualhead.heads.aggregators.pairwise_cnn import PairwiseCNNModule

CLASSES = 4
X = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % CLASSES
PARTS = ["trunk", "head1", "head2", "aggregator"]


class Net(nn.Module):
    def __init__(self, branch=False):
        super().__init__()
        self.branch = branch
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.1))
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        if self.branch and x.sum() > 1e9:
            return x
        return self.fc(self.body(x).mean((2, 3)))


def classifier(branch=False, **options) -> DualHeadClassifier:
    torch.manual_seed(0)
    return attach_second_head(Net(branch), "stem", example=X, **options)


def steps(dual, output, count=3):
    """Training steps as anybody might write them: `.train()` on everything, the view and the parts too."""
    optimiser = torch.optim.SGD(
        [p for p in dual.parameters() if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=0.1
    )
    view = dual.view(output)
    for _ in range(count):
        for module in (dual, view, dual.trunk, dual.head1, *dual.trunk.modules(), *dual.head2.modules()):
            module.train()
        F.cross_entropy(view(X), Y).backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.fixture(params=["traced", "functional"])
def dual(request):
    if request.param == "traced":
        return classifier()
    with pytest.warns(UserWarning, match="paid twice"):
        return classifier(branch=True)


@pytest.mark.parametrize(
    ("parts", "output"),
    [({"trunk", "head1"}, "head1"), ({"head2"}, "head2"), ({"aggregator"}, "aggregate"), ({"head1", "head2"}, "mean")],
)
def test_frozen_parts_stay_as_they_are_to_the_bit(dual, parts, output):
    dual.set_trainable(parts)
    before = {name: tensor.clone() for name, tensor in dual.state_dict().items()}
    steps(dual, output)
    after = dual.state_dict()
    for name, tensor in before.items():
        if name.split(".")[0] not in parts:
            assert torch.equal(after[name], tensor), name
    for part in parts:
        trained = dual.get_submodule(part)
        assert all(not torch.equal(after[f"{part}.{n}"], before[f"{part}.{n}"]) for n, _ in trained.named_parameters())
        statistics = [name for name in after if name.startswith(f"{part}.") and name.endswith("num_batches_tracked")]
        assert all(after[name] == 3 for name in statistics)


def test_the_mean_shows_the_heads_that_it_merges(dual):
    dual.eval()
    mean = dual.view("mean")
    assert torch.equal(mean.head_logits(X), dual.head_logits(X))
    assert torch.equal(mean.aggregate(mean.head_logits(X)), mean(X))
    assert not hasattr(dual.view("head1"), "head_logits")


@pytest.mark.parametrize("parts", [{"head2"}, {"aggregator"}])
def test_no_gradient_is_ever_made_for_frozen_parts(dual, parts):
    for parameter in dual.parameters():
        parameter.grad = torch.ones_like(parameter)
    dual.set_trainable(parts)
    F.cross_entropy(dual(X.clone().requires_grad_()), Y).backward()
    for name, parameter in dual.named_parameters():
        assert parameter.requires_grad == (name.split(".")[0] in parts)
        assert (parameter.grad is None) == (name.split(".")[0] not in parts)


def test_attacks_reach_the_input_through_frozen_parts(dual):
    dual.set_trainable(set())
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(dual(x).sum(), x)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    "way", [lambda d: d.train(), lambda d: d.view("aggregate").train(), lambda d: d.view("head2").train()]
)
def test_train_leaves_frozen_parts_in_evaluation_mode(way):
    dual = classifier()
    dual.set_trainable({"head2"})
    way(dual)
    assert not any(module.training for module in (*dual.trunk.modules(), *dual.head1.modules()))
    assert all(module.training for module in dual.head2.modules())
    dual.set_trainable({"trunk", "head1"})
    dual.train()
    assert all(module.training for module in (*dual.trunk.modules(), *dual.head1.modules()))


def test_both_heads_stand_on_one_pass_of_the_deployed_trunk():
    dual = classifier()
    runs, seen = [], []
    dual.trunk.register_forward_hook(lambda module, args, output: runs.append(output))
    for head in (dual.head1, dual.head2):
        head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    dual.eval()(X)
    assert len(runs) == 1
    assert [features is runs[0] for features in seen] == [True, True]
    runs.clear()
    dual.view("head2")(X)
    assert len(runs) == 1 and dual.view("head2").trunk is dual.trunk


@pytest.mark.parametrize(
    ("output", "idle"),
    [
        ("head1", ["head2", "aggregator"]),
        ("head2", ["head1", "aggregator"]),
        ("mean", ["aggregator"]),
        ("aggregate", []),
    ],
)
def test_a_view_runs_and_holds_only_what_it_needs(output, idle):
    dual = classifier().eval()
    ran = []
    for part in PARTS:
        dual.get_submodule(part).register_forward_hook(lambda *_, part=part: ran.append(part))
    view = dual.view(output)
    logits = view(X)
    assert ran == [part for part in PARTS if part not in idle]
    assert {name.split(".")[0] for name, _ in view.named_parameters()} == set(ran)
    z = dual.head_logits(X)
    expected = {"head1": z[:, 0], "head2": z[:, 1], "mean": z.mean(1), "aggregate": dual(X)}[output]
    assert torch.equal(logits, expected) and logits.shape == (6, CLASSES)


def test_the_pieces_make_the_whole(dual):
    dual.eval()
    features = dual.features(X)
    z = torch.stack((dual.head("head1", features), dual.head("head2", features)), 1)
    assert torch.equal(z, dual.head_logits(X)) and z.shape == (6, 2, CLASSES)
    assert torch.equal(dual.aggregate(z), dual(X))
    assert not torch.allclose(z[:, 0], z[:, 1])  # the second head was reset


@pytest.mark.parametrize("aggregator", ["mixed_nuts", "pairwise_cnn", "pairwise_shared", "linear"])
def test_head_logits_are_merged_in_float32_under_autocast(aggregator):
    """In bf16 a sixth of the signs of MixedNUTS's gradient turned, and PGD left 12 points more than there were."""
    dual = classifier(aggregator=aggregator).eval()

    def gradient(z, autocast):
        z = z.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = dual.aggregate(z)
        assert logits.dtype == torch.float32
        return torch.autograd.grad(F.cross_entropy(logits, torch.arange(64) % CLASSES), z)[0].float()

    for scale in (1.0, 3.0, 10.0):
        z = (scale * torch.randn(64, 2, CLASSES, generator=torch.Generator().manual_seed(0))).bfloat16()
        there, expected = gradient(z.clone(), True), gradient(z.float(), False)
        assert torch.equal(there, expected.bfloat16().float())


def test_head_1_on_the_trunk_is_the_model(dual):
    torch.manual_seed(0)
    model = Net(dual.split_how == "functional").eval()
    model.load_state_dict(dual.base_state_dict(), strict=True)
    torch.testing.assert_close(dual.eval().view("head1")(X), model(X))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    dual.load_base_state_dict(model.state_dict())
    torch.testing.assert_close(dual.view("head1")(X), model(X))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("fc.weight"), "missing: fc.weight"),
        (lambda s: s.update({"module.fc.weight": torch.ones(1)}), "unknown: module.fc.weight"),
        (lambda s: s.update({"fc.bias": torch.ones(9)}), "of another shape: fc.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded(change, words):
    dual = classifier()
    before = copy.deepcopy(dual.state_dict())
    state = {key: value + 1 for key, value in dual.base_state_dict().items()}
    change(state)
    with pytest.raises(UserError, match=words):
        dual.load_base_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in dual.state_dict().items())


def test_copies_are_independent_and_stay_frozen(dual):
    dual.set_trainable({"head2"})
    copied = copy.deepcopy(dual)
    steps(copied, "head2")
    assert torch.equal(dual.eval()(X), dual(X))
    assert not torch.equal(copied.eval()(X), dual(X))
    for name, tensor in copied.state_dict().items():
        if not name.startswith("head2."):
            assert torch.equal(tensor, dual.state_dict()[name])
    with torch.no_grad():
        next(copied.trunk.parameters()).zero_()
    assert next(dual.trunk.parameters()).abs().sum() > 0
    copied.load_state_dict(dual.state_dict(), strict=True)
    torch.testing.assert_close(copied.eval()(X), dual.eval()(X))


def test_parameters_that_the_model_fixed_stay_fixed():
    model = Net()
    model.fc.bias.requires_grad_(False)
    dual = attach_second_head(model, "stem", example=X)
    dual.set_trainable({"head1", "head2", "trunk", "aggregator"})
    assert [name for name, p in dual.named_parameters() if not p.requires_grad] == ["head1.fc.bias", "head2.fc.bias"]


def test_a_model_frozen_for_evaluation_trains_after_all():
    dual = attach_second_head(Net().requires_grad_(False), "stem", example=X)
    dual.set_trainable({"head2"})
    steps(dual, "head2")
    assert all(p.requires_grad for p in dual.head2.parameters())


@pytest.mark.parametrize("aggregator", ["pairwise_cnn", "pairwise_shared", "linear", "mean"])
def test_a_model_in_double_precision_gets_an_aggregator_in_double_precision(aggregator):
    dual = attach_second_head(Net().double(), "stem", example=X.double(), aggregator=aggregator).eval()
    assert dual(X.double()).dtype == torch.float64


def test_unknown_names_are_refused():
    dual = classifier()
    with pytest.raises(UserError, match=r"'head3' is no part.*trunk, head1, head2, aggregator"):
        dual.set_trainable({"head3"})
    with pytest.raises(UserError, match=r"'both' is no output.*head1, head2, mean, aggregate"):
        dual.view("both")
    with pytest.raises(UserError, match="init 'fresh' is not known"):
        classifier(init="fresh")


class TestAttach:
    def test_reset_makes_fresh_weights_and_leaves_the_model(self):
        model = Net()
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.copy_(torch.full_like(tensor, 3))
        dual = attach_second_head(model, "stem", example=X)
        assert all((p == 3).all() for p in (*model.parameters(), *dual.head1.parameters(), *dual.trunk.parameters()))
        for name, parameter in dual.head2.named_parameters():
            assert (parameter != 3).all(), name
        assert (dual.head2.body[1].running_mean == 0).all() and (dual.head2.body[1].weight == 1).all()
        assert dual.head2.fc.weight.abs().max() <= 6**-0.5  # nn.Linear's own bound

    def test_resets_differ_by_seed_alone(self):
        weights = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            weights.append(attach_second_head(MODEL, "stem", example=X).head2.fc.weight)
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])

    def test_clone_starts_at_the_first_head_with_weights_of_its_own(self):
        dual = classifier(init="clone").eval()
        z = dual.head_logits(X)
        assert torch.equal(z[:, 0], z[:, 1])
        assert not {id(p) for p in dual.head1.parameters()} & {id(p) for p in dual.head2.parameters()}

    def test_a_parameter_that_nothing_initialises_is_refused(self):
        with pytest.raises(UserError, match=r"Scaled does not say how to initialise body\.scale"):
            attach_second_head(scaled(Scaled), "stem", example=X)

    def test_ways_to_say_how_to_initialise(self):
        class ByLayer(Scaled):
            def reset_parameters(self):
                nn.init.constant_(self.scale, 5.0)

        assert (attach_second_head(scaled(ByLayer), "stem", example=X).head2.body.scale == 5).all()

        class ByModel(Net):
            def _init_weights(self, layer):
                if isinstance(layer, Scaled):
                    nn.init.constant_(layer.scale, 6.0)
                if isinstance(layer, nn.Linear):
                    nn.init.constant_(layer.weight, 0.25)

        head = attach_second_head(scaled(Scaled, ByModel), "stem", example=X).head2
        assert (head.body.scale == 6).all() and (head.fc.weight == 0.25).all()

        class ByHead(Net):
            def reset_head_parameters(self, head):
                nn.init.constant_(head.body.scale, 7.0)

        assert (attach_second_head(scaled(Scaled, ByHead), "stem", example=X).head2.body.scale == 7).all()

    def test_a_module_as_second_head(self):
        head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 36, CLASSES))
        dual = classifier(init=head)
        assert dual.head2 is head and dual(X).shape == (6, CLASSES)
        with pytest.raises(UserError, match="gives 9 logits; the model gives 4"):
            classifier(init=nn.Sequential(nn.Flatten(), nn.Linear(6 * 36, 9)))

    def test_number_of_classes_is_checked(self):
        assert classifier(num_classes=CLASSES).num_classes == CLASSES
        with pytest.raises(UserError, match="num_classes is 10, but the model gives 4 logits"):
            classifier(num_classes=10)

    def test_aggregators(self):
        assert isinstance(classifier().aggregator, PairwiseCNNModule)
        given = nn.Flatten()
        assert classifier(aggregator=given).aggregator is given
        dual = classifier(aggregator="mean").eval()
        assert torch.equal(dual(X), dual.head_logits(X).mean(1))
        with pytest.raises(UserError, match="unknown aggregator"):
            classifier(aggregator="pairwise_cn")

    @pytest.mark.parametrize("training", [True, False])
    def test_it_is_in_the_models_mode(self, training):
        dual = attach_second_head(Net().train(training), "stem", example=X)
        assert {module.training for module in dual.modules()} == {training}


MODEL = Net()


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((6, 1, 1), 2.0))

    def forward(self, x):
        return x * self.scale


def scaled(layer, model=Net):
    made = model()
    made.body = layer()
    return made


class TestThreeHeads:
    """A third head is as the second."""

    @pytest.fixture
    def three(self):
        return classifier(heads=3, aggregator="mean").eval()

    def test_all_stand_on_one_pass_of_the_trunk(self, three):
        assert three.heads == ("head1", "head2", "head3")
        assert three.outputs == ("head1", "head2", "head3", "mean", "aggregate")
        runs = []
        three.trunk.register_forward_hook(lambda *_: runs.append(1))
        z = three.head_logits(X)
        assert z.shape == (6, 3, CLASSES) and len(runs) == 1
        for number, head in enumerate(three.heads):
            torch.testing.assert_close(three.view(head)(X), z[:, number])
        torch.testing.assert_close(three.view("mean")(X), z.mean(1))
        torch.testing.assert_close(three(X), z.mean(1))
        assert not any(torch.allclose(z[:, a], z[:, b]) for a, b in ((0, 1), (0, 2), (1, 2)))

    def test_the_third_is_trained_alone(self, three):
        three.set_trainable({"head3"})
        before = {name: tensor.clone() for name, tensor in three.state_dict().items()}
        steps(three, "head3")
        changed = {
            name.split(".")[0] for name, tensor in three.state_dict().items() if not torch.equal(tensor, before[name])
        }
        assert changed == {"head3"}

    def test_two_heads_are_those_of_before(self):
        """The weights of a run of two heads are the same whether or not there could have been more."""
        two, three = classifier(aggregator="mean").state_dict(), classifier(heads=3, aggregator="mean").state_dict()
        assert all(torch.equal(tensor, three[name]) for name, tensor in two.items())
        assert {name.split(".")[0] for name in three.keys() - two.keys()} == {"head3"}

    @pytest.mark.parametrize("aggregator", ["pairwise_cnn", "pairwise_shared", "linear", "mean"])
    def test_all_are_merged(self, aggregator):
        three = classifier(heads=3, aggregator=aggregator).eval()
        three.set_trainable({"trunk", *three.heads, "aggregator"})
        z = three.head_logits(X).detach().requires_grad_()
        if aggregator == "pairwise_shared":
            nn.init.normal_(three.aggregator.readout)
        (gradient,) = torch.autograd.grad(three.aggregate(z)[:, 0].sum(), z)
        assert three.aggregate(z).shape == (6, CLASSES)
        assert (gradient.abs().sum((0, 2)) > 0).all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"heads": 1}, "heads must be at least 2, the model's own included; got 1"),
            (
                {"heads": 3, "aggregator": "mixed_nuts"},
                "mixed_nuts mixes a robust head and an accurate one, 2 heads; got 3",
            ),
            ({"heads": 3, "init": nn.Identity()}, "a module as init is the second head of two, and heads is 3"),
        ],
    )
    def test_what_cannot_be_is_refused(self, options, message):
        with pytest.raises(UserError, match=message):
            classifier(**options)


def chain(last, *others):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), *others, last)


IMAGES_OF_EIGHT = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_layer_whose_reset_needs_arguments_is_left_to_its_own_layers():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(144, 10)

        def reset_parameters(self, std):
            raise AssertionError

        def forward(self, x):
            return self.fc(x)

    dual = attach_second_head(chain(Head()), "0", example=IMAGES_OF_EIGHT)
    first, second = (next(dual.get_submodule(head).parameters()) for head in ("head1", "head2"))
    assert not torch.equal(first, second)


def test_a_head_given_as_a_module_must_fit_what_crosses():
    with pytest.raises(UserError, match=r"must take what crosses the cut, of shape \[2, 4, 6, 6\]: mat1"):
        attach_second_head(chain(nn.Linear(144, 10)), "0", example=IMAGES_OF_EIGHT, init=nn.Linear(3, 10))
    normed = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(144), nn.Linear(144, 10))
    dual = attach_second_head(chain(nn.Linear(144, 10)), "0", example=IMAGES_OF_EIGHT[:1], init=normed)
    assert dual(IMAGES_OF_EIGHT).shape == (2, 10)


def test_logits_of_another_type_are_merged_in_the_aggregators():
    class Wide(nn.Module):
        def forward(self, x):
            return x.double()

    dual = attach_second_head(chain(Wide(), nn.Linear(144, 10)), "0", example=IMAGES_OF_EIGHT)
    assert dual(IMAGES_OF_EIGHT).dtype == torch.float32
