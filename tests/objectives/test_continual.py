"""Methods for threats one after another, against loops written by hand."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from dualhead.attacks.pgd import PGD
from dualhead.data import Batch, Loader, Memory, Split, StreamImages, StreamSetting, augmentations, streams
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.objectives import Before, objectives
from dualhead.objectives.base import cross_entropies
from dualhead.system.arithmetic import FLOAT32
from dualhead.system.modes import in_eval_mode
from dualhead.threats import ThreatModel
from dualhead.training import Passes
from dualhead.training.step import TrainingStep
from helpers.objectives import climbed, see
from helpers.training import THREAT, batch, plain_model, stage_of, streams_of

Y = torch.tensor([0, 1, 2, 3, 0, 1])
PARTS = ("model",)


def build(name, **fields):
    return objectives.build({"name": name, **fields})


def logits(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 4, generator=generator, requires_grad=True) for _ in range(count)]


def kl(p, q):
    """KL(softmax(p) || softmax(q)), summed class by class."""
    p, q = p.softmax(1), q.softmax(1)
    return torch.stack(
        [sum(a * (a.log() - b.log()) for a, b in zip(r, s, strict=True)) for r, s in zip(p, q, strict=True)]
    )


def of_both(clean, attacked, clean_before, attacked_before):
    """Return what LwF around SAT sees, by the names of its needs."""
    return {"q": attacked, "lwf_clean": clean, "lwf_attacked": attacked,
            "lwf_clean_before": clean_before, "lwf_attacked_before": attacked_before}  # fmt: skip


def test_lwf_by_hand():
    clean, attacked, old_clean, old_attacked = logits(4)
    found = build("lwf", weight=0.5, temperature=2).loss(Y, of_both(clean, attacked, old_clean, old_attacked))
    held = [kl(old_clean / 2, clean / 2).mean(), kl(old_attacked / 2, attacked / 2).mean()]
    torch.testing.assert_close(found.total, F.cross_entropy(attacked, Y) + 0.5 * 4 * sum(held) / 2)
    same = build("lwf").loss(Y, of_both(clean, attacked, clean, attacked))
    assert float(same.terms["before"].detach()) == pytest.approx(0.0, abs=1e-6)  # a network that has not moved
    only = build("lwf", on="clean", temperature=1)
    assert set(only.needs()) == {"q", "lwf_clean", "lwf_clean_before"}
    assert only.threats() == (None,)  # no attack but the stage's


@pytest.mark.parametrize("kind", ["adversarial", "variation"])
def test_alr_by_hand(kind):
    objective = build("alr", weight=0.5, kind=kind)
    still, far, farther, q = logits(4)
    seen = {"still": still, "far": far, "farther": farther, "q": q}
    one, other = (far, still) if kind == "adversarial" else (farther, far)
    distances = torch.stack([(a - b).square().sum().sqrt() for a, b in zip(one, other, strict=True)])
    torch.testing.assert_close(objective.loss(Y, seen).total, F.cross_entropy(q, Y) + 0.5 * distances.mean())
    last = "far" if kind == "adversarial" else "farther"
    torch.testing.assert_close(climbed(objective, Y, seen, last), distances)
    made = list(objective.inner())
    assert (made[0], made[-1]) == ("attacked", last)
    with pytest.raises(UserError, match="random start"):
        build("alr", attack={"name": "pgd", "steps": 1, "start": "clean"})


def test_air_by_hand():
    objective = build("air", isotropic=0.5, anisotropic=0.25, alignment=0.1)
    q, noisy, mixed, old_noisy, old_mixed = logits(5)
    seen = {"q": q, "aligned": q, "noisy": noisy, "mixed": mixed, "noisy_before": old_noisy, "mixed_before": old_mixed}
    expected = F.cross_entropy(q, Y) + 0.5 * kl(old_noisy, noisy).mean() + 0.25 * kl(old_mixed, mixed).mean()
    expected = expected + 0.1 * torch.stack([(a - b).norm() for a, b in zip(noisy, q, strict=True)]).mean()
    torch.testing.assert_close(objective.loss(Y, seen).total, expected)
    assert not objective.per_image


def test_air_makes_normal_noise_and_mixtures_inside_the_box():
    objective = build("air", sigma=0.1)
    attacked = torch.full((40, 3, 16, 16), 0.5)
    attacked[::2] = 0.4
    noise = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    views = objective.views({"attacked": attacked, "noise": noise})
    drawn = (views["noisy"] - attacked) / 0.1
    assert abs(float(drawn.mean())) < 0.02
    assert float(drawn.std()) == pytest.approx(1.0, abs=0.02)
    share = noise[:, 0, 0, 0].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(
        views["mixed"], share * attacked + (1 - share) * torch.cat([attacked[-1:], attacked[:-1]])
    )


def before_of(model, attack, earlier=None, count=6):
    """The network as it is, asked about a few images."""
    passes = Passes(model, PARTS)
    data = batch(0, count)

    def images(most):
        for row in range(min(most, count)):
            yield data.x[row : row + 1], data.y[row : row + 1], Streams.of(3, data.index[row : row + 1])

    weights = {name: p.detach() for name, p in model.named_parameters()}
    return Before(weights, passes.functional, images, attack, lambda tensors: None, earlier or {}), data


def test_the_fisher_matrix_is_the_mean_square_of_gradients_on_attacked_images():
    model, attack = plain_model("cnn-4"), PGD(2)
    objective = build("ewc", old="L2:0.5", weight=3.0, images=4)
    with in_eval_mode(model):
        before, data = before_of(model, attack)
        memory = objective.recall(before)
        expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for row in range(4):  # one image after another
            x, y = data.x[row : row + 1], data.y[row : row + 1]
            streams = Streams.of(3, data.index[row : row + 1])
            threat = ThreatModel("L2", 0.5)
            attacked = attack.maximise(lambda p, y=y: cross_entropies(model(p), y), x, threat, streams)
            gradients = torch.autograd.grad(F.cross_entropy(model(attacked), y), list(model.parameters()))
            for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
                expected[name] += gradient.square() / 4
    for name, fisher in expected.items():
        torch.testing.assert_close(memory[f"ewc.fisher.{name}"], fisher, rtol=1e-3, atol=1e-7)
    moved = {name: (p + 0.1).detach().requires_grad_() for name, p in model.named_parameters()}
    penalty = objective.penalty(moved, memory)["ewc"]
    torch.testing.assert_close(penalty, 1.5 * sum((f * 0.01).sum() for f in expected.values()), rtol=1e-3, atol=1e-6)
    still = {name: p.detach() for name, p in model.named_parameters()}
    assert float(objective.penalty(still, memory)["ewc"]) == 0.0
    half = build("ewc", old="L2:0.5", decay=0.5, images=4)
    with in_eval_mode(model):
        again = half.recall(before_of(model, attack, memory)[0])
    for name, fisher in expected.items():
        torch.testing.assert_close(again[f"ewc.fisher.{name}"], 1.5 * fisher, rtol=1e-3, atol=1e-7)


def test_the_fisher_matrix_of_weights_that_rest_in_a_stage_is_remembered_for_a_later_one():
    model, attack = plain_model("cnn-4"), PGD(1)
    objective = build("ewc", old="L2:0.5", decay=0.5, images=4)
    with in_eval_mode(model):
        first = objective.recall(before_of(model, attack)[0])
        before, _ = before_of(model, attack, first)
        resting, *learning = before.weights
        fewer = dataclasses.replace(before, weights={name: before.weights[name] for name in learning})
        second = objective.recall(fewer)
        third = objective.recall(before_of(model, attack, second)[0])
    key = f"ewc.fisher.{resting}"
    torch.testing.assert_close(second[key], 0.5 * first[key])
    torch.testing.assert_close(third[key], 1.25 * first[key])
    assert f"ewc.anchor.{resting}" not in second
    assert torch.isfinite(objective.penalty(fewer.weights, second)["ewc"])


def one_class():
    """Images that all have label 0, so that those with another label pull the other way."""
    data = batch(0)
    return Batch(data.index, data.x, torch.zeros_like(data.y))


def trained(objective, memory=None, further=None, seed=0):
    """A network after one step."""
    model = plain_model("cnn-4", seed=seed)
    stage = stage_of(objective, PARTS, start="uniform")
    stage = stage.model_copy(update={"attack": PGD(2)})
    passes = Passes.of(model, stage)
    step = TrainingStep(passes, stage, THREAT, torch.optim.SGD(passes.parameters(), lr=0.1), FLOAT32, memory=memory)
    data = one_class()
    outcome = step(data, streams_of(data), further)
    return model, outcome


def test_a_penalty_on_weights_enters_the_step_once_whatever_the_pieces():
    start = plain_model("cnn-4")
    anchors = {f"ewc.anchor.{n}": p.detach() + 1.0 for n, p in start.named_parameters()}
    fisher = {f"ewc.fisher.{n}": torch.full_like(p, 0.5) for n, p in start.named_parameters()}
    plain, _ = trained(build("sat"))
    held, outcome = trained(build("ewc", old="L2:0.5", weight=0.2), {**anchors, **fisher})
    for (name, one), other in zip(plain.named_parameters(), held.parameters(), strict=True):
        torch.testing.assert_close(other, one + 0.1 * 0.2 * 0.5 * 1.0, msg=name)
    count = sum(p.numel() for p in start.parameters())
    assert float(outcome.terms["ewc"]) == pytest.approx(0.5 * 0.2 * 0.5 * count, rel=1e-4)


@pytest.mark.parametrize("opposed", [True, False])
def test_agem_takes_away_what_would_raise_the_old_loss(opposed):
    objective = build("agem", among=["L2:0.5"])
    data = one_class()
    further = {"memory": StreamImages(data.x, data.y + opposed)}
    start = plain_model("cnn-4")
    plain, _ = trained(build("sat"))
    held, outcome = trained(objective, further=further)
    old = torch.cat([p.detach().flatten() for p in start.parameters()])
    g = (old - torch.cat([p.detach().flatten() for p in plain.parameters()])) / 0.1
    made = (old - torch.cat([p.detach().flatten() for p in held.parameters()])) / 0.1
    # The rehearsed gradient itself: a step on the replay term alone.
    alone, _ = trained(build("replay", among=["L2:0.5"], weight=1.0), further=further)
    r = (old - torch.cat([p.detach().flatten() for p in alone.parameters()])) / 0.1 - g
    along = float(g @ r)
    assert (along < 0) == opposed, "the case that is meant"
    expected = g - min(along, 0.0) / float(r @ r) * r
    torch.testing.assert_close(made, expected, rtol=2e-2, atol=2e-4)
    assert math.isfinite(float(outcome.terms["rehearsed"]))
    assert float(made @ r) >= -1e-3 * float(r @ r)


def test_agem_inside_another_method_still_takes_it_away():
    further = {"memory": StreamImages(one_class().x, one_class().y + 1)}
    plain, _ = trained(build("sat"))
    alone, _ = trained(build("agem", among=["L2:0.5"]), further=further)
    inside, _ = trained(build("alr", weight=0, base={"name": "agem", "among": ["L2:0.5"]}), further=further)
    moved = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (plain, alone, inside)]
    assert not torch.allclose(moved[0], moved[1], atol=1e-4)
    torch.testing.assert_close(moved[2], moved[1])


def test_replay_by_hand():
    objective = build("replay", among=["Linf:8/255"], weight=0.5, logits=0.25)
    q, replayed, dark, old = logits(4)
    labels = torch.tensor([3, 2, 1, 0, 1, 2])
    seen = {"q": q, "rehearsed": replayed, "labels": labels, "dark": dark, "dark_before": old}
    expected = F.cross_entropy(q, Y) + 0.5 * F.cross_entropy(replayed, labels) + 0.25 * (dark - old).square().mean()
    torch.testing.assert_close(objective.loss(Y, seen).total, expected)
    assert objective.threats() == (None, ThreatModel("Linf", 8 / 255))
    inner = objective.inner()["rehearsed"]
    assert (inner.start, inner.threat) == ("memory", ThreatModel("Linf", 8 / 255))
    torch.testing.assert_close(climbed(objective, Y, seen, "rehearsed"), cross_entropies(replayed, labels))
    plain = build("replay", among=["Linf:8/255"])
    assert "dark" not in plain.needs()
    assert not plain.teachers()
    assert see(plain, attacked=q).keys() == {"q"}


def test_of_several_old_threats_each_step_takes_one_evenly():
    objective = build("replay", among=["Linf:8/255", "L2:0.5"])
    state, counts = objective.begin(), [0, 0]
    for _ in range(400):
        now = objective.at(0, state)
        assert now.inner()["rehearsed"].threat == objective.among[now.chosen].threat
        counts[now.chosen] += 1
        state = objective.advance(state, {})
    assert abs(counts[0] - 200) < 50
    assert objective.at(0, {"choice": 1.0}) != objective.at(0, {"choice": 0.0})


def test_a_memory_holds_each_class_evenly_and_is_a_function_of_its_seed():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 3)
    chosen = Memory(20, seed=1).chosen(labels)
    assert sorted(labels[chosen].bincount().tolist()) == [3, 8, 9]
    assert torch.equal(chosen, Memory(20, seed=1).chosen(labels))
    assert not torch.equal(chosen, Memory(20, seed=2).chosen(labels))
    assert len(Memory(1000).chosen(labels)) == len(labels)


def test_what_is_rehearsed_is_augmented_as_the_stages_own_images_are():
    labels = torch.arange(24) % 3
    images = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8)
    setting = StreamSetting(Split(images, labels, ("a", "b", "c")), 2, 12, seed=0, device=torch.device("cpu"))
    beside = next(iter(Loader(setting.training, 12, seed=0, device=setting.device).epoch(0)))

    def rehearsed(setting):
        return next(iter(Memory(12).open(setting).epoch(0, 0)))(beside)

    plain, flipped = rehearsed(setting), rehearsed(replace(setting, augment=(augmentations.build("flip"),)))
    assert torch.equal(plain.y, flipped.y)
    turned = [not torch.equal(a, b) for a, b in zip(plain.x, flipped.x, strict=True)]
    assert 0 < sum(turned) < 12
    assert all(torch.equal(a.flip(2), b) for a, b, each in zip(plain.x, flipped.x, turned, strict=True) if each)


def test_noise_is_fitted_to_all_classes_where_images_are_in_their_order():
    images = torch.cat([torch.full((5000, 1, 2, 2), value, dtype=torch.uint8) for value in (0, 200)])
    labels = torch.arange(2).repeat_interleave(5000)
    setting = StreamSetting(Split(images, labels, ("a", "b")), 1, 8, seed=0, device=torch.device("cpu"))
    beside = next(iter(Loader(setting.training, 8, seed=0, device=setting.device).epoch(0)))
    for covariance in ("channel", "full"):
        found = next(iter(streams.build({"name": "gaussian", "covariance": covariance}).open(setting).epoch(0, 0)))(
            beside
        )
        assert found.x.unique().numel() > 8  # of the first class alone all pixels would be black


def test_what_cannot_be_is_refused():
    for wrong, told in [
        ({"name": "lwf", "base": "natural"}, "adversarial base method"),
        ({"name": "lwf", "temperature": 0}, "temperature"),
        ({"name": "air", "sigma": 0}, "sigma"),
        ({"name": "ewc", "old": "L2:0.5", "decay": 2}, "decay"),
        ({"name": "replay", "images": 0}, "images"),
        ({"name": "agem", "base": {"name": "any_of"}}, "one attack"),
        ({"name": "replay", "base": {"name": "replay"}}, "one attack"),
    ]:
        with pytest.raises(UserError, match=told):
            objectives.build(copy.deepcopy(wrong))


def test_old_threats_are_written_as_they_are_read():
    for name, fields in [
        ("ewc", {"old": {"norm": "L2", "eps": 0.5, "attack": "pgd-3"}}),
        ("ewc", {"old": "L1:12", "base": {"name": "replay", "among": ["L2:0.5"], "images": 7}}),
    ]:
        made = build(name, **fields)
        assert objectives.build(objectives.describe(made)) == made
