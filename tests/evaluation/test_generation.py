"""Samples, counterfactuals, energies and their measures: closed forms, invariances and plain readings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dualhead.data import load_split
from dualhead.errors import UserError
from dualhead.evaluation import generation
from dualhead.threats import ThreatModel
from helpers.training import plain_model


class Linear(nn.Module):
    """Logits W x, so that all gradients are known."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 12, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


def seeds(count, shape=(3, 2, 2), at=0.5):
    generator = torch.Generator().manual_seed(1)
    return at + 0.01 * torch.randn(count, *shape, generator=generator)


def test_a_sample_of_a_linear_model_walks_straight_up_its_class():
    model, x, y = Linear(), seeds(5), torch.tensor([0, 1, 2, 0, 1])
    found = generation.sample(model, y, x, steps=3, step_size=0.1)
    way = model.weight.detach()[y] / model.weight.detach()[y].norm(dim=1, keepdim=True)
    assert torch.allclose(found.flatten(1), x.flatten(1) + 0.3 * way, atol=1e-5)


def test_no_steps_give_the_seeds_and_a_trajectory_begins_with_them():
    model, x, y = Linear(), seeds(3), torch.tensor([0, 1, 2])
    assert torch.equal(generation.sample(model, y, x, steps=0), x)
    path = generation.sample(model, y, x, steps=4, step_size=0.1, trajectory=True)
    assert path.shape == (5, *x.shape)
    assert torch.equal(path[0], x)
    assert torch.equal(path[-1], generation.sample(model, y, x, steps=4, step_size=0.1))


def test_a_picture_is_the_same_whatever_is_drawn_beside_it():
    model, training = plain_model(), load_split("digits", "train")
    numbers = torch.arange(70)
    many = generation.noise_seeds(training, numbers, seed=3)
    alone = generation.noise_seeds(training, numbers[66:67], seed=3)
    assert torch.equal(many[66:67], alone)
    assert not torch.equal(alone, generation.noise_seeds(training, numbers[66:67], seed=4))
    x = seeds(70, (3, 12, 12))
    y = numbers % 10
    whole = generation.sample(model, y, x, steps=2)
    single = generation.sample(model, y[66:67], x[66:67], steps=2)
    assert torch.allclose(whole[66:67], single, atol=1e-4)
    assert model.training == plain_model().training


def test_energies_and_scores_by_hand():
    model, x = Linear(), seeds(4)
    logits, y = model(x).detach(), torch.tensor([0, 1, 2, 1])
    assert torch.allclose(generation.energy(model, x), -logits.exp().sum(1).log())
    assert torch.allclose(generation.energy(model, x, y), -logits[torch.arange(4), y])
    assert torch.equal(generation.ood_score(model, x), generation.energy(model, x))
    assert torch.allclose(generation.ood_score(model, x, "msp"), -logits.softmax(1).max(1).values)
    assert torch.allclose(generation.ood_score(model, x, "max_logit"), -logits.max(1).values)


def test_one_target_stands_for_all_images():
    model, x = Linear(), seeds(3)
    one, each = (generation.counterfactual(model, x, to, steps=2) for to in (1, torch.ones(3, dtype=torch.int64)))
    assert torch.equal(one.image, each.image)


def test_a_counterfactual_stays_in_its_ball_and_reaches_its_class():
    model, x = Linear(), seeds(4)
    target = (model(x).argmin(1)).detach()
    found = generation.counterfactual(model, x, target, ThreatModel("L2", 0.5), steps=10)
    assert found.distance.max() <= 0.5 + 1e-5
    assert torch.allclose(found.distance, (found.image - x).flatten(1).norm(dim=1))
    assert torch.equal(found.path[0], x)
    assert torch.allclose(found.probabilities, model(found.image).softmax(1))
    before = model(x).softmax(1).gather(1, target[:, None])
    assert (found.probabilities.gather(1, target[:, None]) > before).all()


def test_auroc_is_the_share_of_pairs_in_order():
    inside, outside = torch.tensor([0.0, 1.0, 1.0, 2.0]), torch.tensor([1.0, 3.0, -1.0])
    pairs = [1.0 if o > i else 0.5 if o == i else 0.0 for i in inside.tolist() for o in outside.tolist()]
    assert generation.auroc(inside, outside) == pytest.approx(sum(pairs) / len(pairs))
    assert generation.auroc(inside, inside) == 0.5
    with pytest.raises(UserError, match="NaN"):
        generation.auroc(inside, torch.tensor([math.nan]))


def test_the_frechet_distance_of_moved_and_stretched_features():
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert generation.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert generation.frechet_distance(x, x + 2.0) == pytest.approx(4 * 4.0)
    centred = x - x.mean(0)
    assert generation.frechet_distance(centred, 3 * centred) == pytest.approx(4 * float(x.T.cov().trace()))


def test_precision_and_recall_tell_a_part_from_noise():
    generator = torch.Generator().manual_seed(3)
    real = torch.randn(200, 3, generator=generator)
    same = generation.precision_recall(real, real)
    assert same["precision"] == same["recall"] == same["coverage"] == 1.0
    far = generation.precision_recall(real, real + 100.0)
    assert far == {"precision": 0.0, "recall": 0.0, "density": 0.0, "coverage": 0.0}
    narrow = generation.precision_recall(real, 0.05 * torch.randn(200, 3, generator=generator))
    assert narrow["precision"] > 0.95
    assert narrow["coverage"] < 0.5


def test_the_nearest_training_image_of_a_copy_is_itself():
    many = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert generation.nearest_distance(many, many).tolist() == [0.0] * 64
    moved = many.clone()
    moved[:, 0, 0, 0] = (moved[:, 0, 0, 0] + 1 / 255) % 1
    assert torch.allclose(generation.nearest_distance(moved, many), (moved - many).flatten(1).norm(dim=1))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": -1}, "steps must be"),
        ({"step_size": 0.0}, "step_size must be"),
        ({"step_size": math.nan}, "step_size"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        generation.sample(Linear(), torch.tensor([0]), seeds(1), **settings)
    with pytest.raises(UserError, match="one label for each image"):
        generation.sample(Linear(), torch.tensor([0, 1]), seeds(1))


class OneLogit(nn.Module):
    """Dark images and bright ones, by one logit."""

    def forward(self, x):
        return 9 * (x.mean((1, 2, 3)) - 0.5)[:, None]


class TwoLogits(OneLogit):
    """The same as two."""

    def forward(self, x):
        z = super().forward(x)
        return torch.cat((torch.zeros_like(z), z), 1)


def test_one_logit_counts_as_two():
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1] * 3)
    one, two = OneLogit(), TwoLogits()
    for kind in generation.SCORES:
        assert torch.equal(generation.ood_score(one, x, kind), generation.ood_score(two, x, kind))
    assert torch.equal(generation.energy(one, x, y), generation.energy(two, x, y))
    assert torch.equal(generation.sample(one, y, x, steps=2), generation.sample(two, y, x, steps=2))
    moved = [generation.counterfactual(model, x, 1, steps=2).probabilities for model in (one, two)]
    assert torch.equal(*moved)
    assert moved[0].shape == (6, 2)
