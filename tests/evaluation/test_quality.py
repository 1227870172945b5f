"""Measures of samples and of images out of distribution: closed forms, and what each check is there to find."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dualhead.data import Split, load_split
from dualhead.errors import UserError
from dualhead.evaluation import (
    Judge,
    Sampling,
    Sets,
    auroc,
    auroc_interval,
    check_compression,
    kernel_distance,
    measure_generation,
    measure_ood,
    ood_score,
    sample,
    sample_at,
)
from dualhead.statistics import wilson
from dualhead.threats import ThreatModel


class Net(nn.Module):
    """A linear classifier of digits behind a layer of features."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.last = nn.Linear(64, 12), nn.Linear(12, 10)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5

    def forward(self, x):
        return self.last(self.first(x.flatten(1)).relu())


@pytest.fixture(scope="module")
def digits():
    train, test = load_split("digits", "train"), load_split("digits", "test")
    return train.take(range(300)), train.take(range(300, 400)), test.first(100)


def measured(digits, seeds, steps=(0,)):
    training, held_out, test = digits
    judge = Judge.of(Net(7), training, {"backbone": "net"})
    sampling = Sampling(len(seeds), steps, 0.2, lambda labels, places: seeds, "given")
    found = measure_generation(
        Net(), Sets(training, held_out, test, "held-out images"), judge, sampling, lambda _: np.ones(100, bool)
    )
    return found.results


def pixels(split):
    return torch.as_tensor(split.images[:]).float() / 255


def test_samples_that_are_the_test_images_are_at_no_distance_from_them(digits):
    told = measured(digits, pixels(digits[2]))
    assert told["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert told["precision"] == told["recall"] == told["coverage"] == 1
    assert told["nearest"]["samples"] == pytest.approx(told["nearest"]["test"])
    assert told["classification_accuracy_score"] == 1
    assert told["passes"] == {"forward": 0, "backward": 0}
    assert told["judge"]["digest"] == measured(digits, pixels(digits[2]))["judge"]["digest"]
    assert told["floor"]["frechet_distance"] > told["frechet_distance"]


def test_as_many_training_images_show_every_class_however_few_there_are(digits):
    training, held_out, test = digits
    trained_on = []

    def score(split):
        trained_on.append(split.labels)
        return np.ones(100, bool)

    sampling = Sampling(20, (0,), 0.2, lambda labels, places: pixels(test.first(20)), "given")
    judge = Judge.of(Net(7), training, {"backbone": "net"})
    found = measure_generation(Net(), Sets(training, held_out, test, "held-out images"), judge, sampling, score)
    assert found.results["floor"]["images"] == 20
    assert [sorted(set(labels.tolist())) for labels in trained_on] == [list(range(10))] * 2


def test_the_floor_shows_every_class_of_training_images_that_are_sorted_by_class(digits):
    training, held_out, test = digits
    by_class = training.take(training.labels.argsort(stable=True))
    few = test.first(60)
    sampling = Sampling(200, (0,), 0.2, lambda labels, places: pixels(test)[places % len(test)], "given")
    judge = Judge.of(Net(7), training, {"backbone": "net"})
    floors = []
    for images in (training, by_class):
        sets = Sets(images, held_out, few, "held-out images")
        found = measure_generation(Net(), sets, judge, sampling, lambda _: np.ones(1, bool))
        floors.append(found.results["floor"])
    assert floors[1]["coverage"] > 0.8 * floors[0]["coverage"]


def test_diversity_needs_two_test_images_of_a_class_and_a_judge_that_tells_them_apart(digits):
    training, held_out, test = digits
    one_each = test.take([int((test.labels == label).nonzero()[0, 0]) for label in range(10)])
    sampling = Sampling(20, (0,), 0.2, lambda labels, places: pixels(test.first(20)), "given")
    judge, dead = (Judge.of(Net(7), training, {"backbone": "net"}) for _ in range(2))
    dead.network.first.weight.data.zero_()
    for images, by, told in ((one_each, judge, "no class has two of the 10"), (test, dead, "choose another --judge")):
        with pytest.raises(UserError, match=told):
            measure_generation(Net(), Sets(training, held_out, images, "h"), by, sampling, lambda _: np.ones(1, bool))


@pytest.mark.parametrize(("classes", "count"), [(10, 19), (2, 9)])
def test_too_few_samples_are_refused_before_any_is_drawn(digits, classes, count):
    names = digits[0].class_names[:classes]
    sets = Sets(*(Split(part.images, part.labels % classes, names) for part in digits), "held-out images")
    sampling = Sampling(count, (0,), 0.2, lambda labels, places: pytest.fail("drew seeds"), "given")
    with pytest.raises(UserError, match=rf"samples: {count} of {classes} classes .* two of each class, and 10 of each"):
        measure_generation(Net(), sets, Judge.of(Net(7), digits[0], {}), sampling, lambda split: np.ones(1, bool))


def test_copies_of_training_images_are_told(digits):
    told = measured(digits, pixels(digits[0])[:100])
    assert told["nearest"]["copies"] == 1
    assert "memorised_samples" in {check["name"] for check in told["checks"] if check["status"] == "warning"}
    assert told["frechet_distance"] == pytest.approx(told["floor"]["frechet_distance"], rel=1)


def test_samples_that_are_all_alike_are_told(digits):
    told = measured(digits, pixels(digits[0])[:1].expand(100, -1, -1, -1) + 0.01 * torch.rand(100, 1, 8, 8))
    assert told["coverage"] < 0.3
    assert told["diversity"] < 0.1
    assert "narrow_samples" in {check["name"] for check in told["checks"] if check["status"] == "warning"}


def test_held_out_images_choose_the_steps(digits):
    seeds = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    told = measured(digits, seeds, (0, 2, 5))
    best = min(told["curve"], key=lambda point: point["held_out"])
    assert told["steps"] == best["steps"]
    assert told["frechet_distance"] == best["test"]


def test_samples_after_some_steps_are_those_of_as_many_steps():
    model, y = Net(), torch.arange(70) % 10
    x = torch.rand(70, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    path = sample_at(model, y, x, (0, 1, 3), step_size=0.1)
    for steps, found in zip((0, 1, 3), path, strict=True):
        assert torch.equal(found, sample(model, y, x, steps=steps, step_size=0.1))
    for steps in ((), (3, 1), (-1, 2)):
        with pytest.raises(UserError, match="steps must be"):
            sample_at(model, y, x, steps)


def test_the_kernel_distance_is_that_of_the_definition_and_knows_no_order_of_classes():
    a, b = (torch.randn(12, 3, generator=torch.Generator().manual_seed(n)).double() for n in range(2))

    def kernel(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    n = len(a)
    within = [sum(kernel(s[i], s[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1)) for s in (a, b)]
    across = sum(kernel(x, y) for x in a for y in b) / n**2
    value, ends = kernel_distance(a, b)
    assert value == pytest.approx(sum(within) - 2 * across)
    assert ends is None

    chance = torch.Generator().manual_seed(2)  # one draw in twenty lies beside the interval
    classes = 3 * torch.arange(10.0).repeat(40)[:, None] + torch.randn(400, 4, generator=chance)  # in turn
    _, (low, high) = kernel_distance(classes, classes[torch.randperm(400, generator=chance)])
    assert low < 0 < high


def test_the_interval_of_an_auroc_is_delongs():
    inside, outside = torch.zeros(50), torch.cat((torch.zeros(20), torch.ones(20)))
    middle = auroc(inside, outside)
    reach = 1.959964 * math.sqrt(0.0625 * 40 / 39 / 40)
    assert auroc_interval(inside, outside) == pytest.approx([middle - reach, middle + reach], abs=1e-6)
    assert auroc_interval(inside, torch.ones(9)) == list(wilson(9, 9))  # wholly apart, by nine images alone
    assert auroc_interval(torch.ones(8), torch.zeros(60)) == list(wilson(0, 8))


def test_images_of_the_same_kind_are_not_told_apart_and_attacked_ones_less_than_others(digits):
    test, noise = digits[2], Split(torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8), torch.arange(40) % 10,
                                   digits[2].class_names)  # fmt: skip
    model = Net()
    told, energies = measure_ood(model, test, {"same": test, "noise": noise}, ThreatModel("L2", 0.5))
    for each in told["sources"]["same"]["scores"].values():
        assert each["auroc"] == pytest.approx(0.5)
        assert each["auroc_attacked"] < 0.5
    for each in told["sources"]["noise"]["scores"].values():
        assert each["auroc_attacked"] < each["auroc"]
        assert each["interval"][0] <= each["auroc"] <= each["interval"][1]
    assert torch.allclose(energies["noise"], ood_score(model, pixels(noise)))
    with pytest.raises(UserError, match="3x4x4"):
        measure_ood(model, test, {"other": Split(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.arange(3),
                                                 ("a", "b", "c"))}, ThreatModel("L2", 0.5))  # fmt: skip


def as_jpeg(image):
    stored = io.BytesIO()
    Image.fromarray(image).save(stored, "JPEG", quality=50)
    return np.asarray(Image.open(stored))


def test_compression_tells_seeds_from_training_images_and_nothing_tells_equal_kinds():
    noise = torch.rand(160, 1, 34, 34, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.avg_pool2d(noise, 3, 1).mul(255).to(torch.uint8)
    pressed = torch.from_numpy(np.stack([as_jpeg(image[0].numpy()) for image in smooth[80:]]))[:, None]
    assert check_compression(smooth[:80], pressed).status == "warning"
    assert check_compression(smooth[:80], smooth[80:]).status == "ok"
