"""Measures of a model that learnt from poisoned data, on models whose answers are known."""

import numpy as np
import pytest
import torch
from torch import nn

from dualhead.evaluation import (
    Evaluation,
    TriggeredImages,
    answers,
    confused,
    finders,
    learnt_by_heart,
    measure_triggered,
)
from dualhead.evaluation.poisoned import activation_clusters, features, spectral_signatures

NAMES = ("ant", "bee", "cat")


class ByCorner(nn.Module):
    """Class 2 where the bottom right pixel is white, else the class that the first pixel tells, 100 levels each."""

    def __init__(self, triggered=True):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.triggered = triggered

    def forward(self, x):
        told = (x[:, 0, 0, 0] * 2.55).round()
        logits = -(told[:, None] - torch.arange(3)).abs() * self.scale
        return logits + 10.0 * self.triggered * (x[:, :1, -1, -1] > 0.9) * torch.tensor([0.0, 0.0, 1.0])


def images(labels, marked):
    pixels = torch.full((len(labels), 1, 4, 4), 50, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.as_tensor(labels, dtype=torch.uint8) * 100
    pixels[:, 0, -1, -1] = torch.as_tensor(marked, dtype=torch.uint8) * 255
    return pixels


def test_success_is_of_other_classes_and_accuracy_by_true_label(tmp_path):
    labels, marked = torch.tensor([0, 0, 1, 1]), [1, 1, 1, 0]  # one trigger is lost
    given = TriggeredImages(images(labels, marked), labels, torch.tensor([3, 5, 7, 9]), 2, NAMES)
    told = measure_triggered(
        ByCorner().eval(), given, output_dir=tmp_path, threat="Linf:8/255", attacks=["fgsm"], precision="float32",
        clean_rate=np.array([True, False, False, False]),
    )  # fmt: skip
    assert told["attack_success_rate"] == 0.75
    assert told["accuracy_on_triggered"] == 0.25
    assert told["robust_accuracy_on_triggered"]["worst"] <= 0.25
    assert [entry["attack_success_rate"] for entry in told["per_class"]] == [1.0, 0.5]
    assert told["class"] == "cat"
    assert told["clean_model"]["attack_success_rate"] == 0.25
    assert told["above_clean_model"]["difference"] == 0.5
    low, high = told["intervals"]["attack_success_rate"]
    assert low < 0.75 < high
    kept = Evaluation.load(tmp_path)
    assert kept.index.tolist() == [3, 5, 7, 9]
    assert kept.results["images"]["shape"] == [1, 4, 4]


def test_a_model_that_knows_no_trigger_has_no_success():
    labels = torch.tensor([0, 1, 0, 1])
    given = TriggeredImages(images(labels, [1] * 4), labels, torch.arange(4), 2, NAMES)
    told = measure_triggered(
        ByCorner(triggered=False).eval(), given, threat="Linf:8/255", attacks=["fgsm"], precision="float32"
    )
    assert told["attack_success_rate"] == 0.0
    assert told["accuracy_on_triggered"] == 1.0
    assert "clean_model" not in told


def test_training_images_are_judged_by_both_labels():
    pixels, true = images([0, 1, 1, 2], [1, 1, 0, 0]), torch.tensor([0, 1, 1, 2])
    told = learnt_by_heart(ByCorner(), pixels, torch.tensor([2, 2, 2, 2]), true)
    assert told["num_samples"] == 4
    assert told["by_given_label"] == 0.75
    assert told["by_true_label"] == 0.5


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_answers_do_not_depend_on_the_batch_and_leave_the_model_as_it_was(batch_size):
    model = ByCorner().train()
    assert answers(model, images([0, 1, 1, 2], [1, 0, 0, 0]), batch_size).tolist() == [2, 1, 1, 2]
    assert model.training


def test_pairs_are_told_by_recall_and_by_the_class_that_they_are_taken_for():
    labels, said = np.array([0, 0, 0, 0, 1, 2]), np.array([0, 1, 1, 2, 1, 2])
    (entry,) = confused(said, labels, [(0, 1)], NAMES)
    assert (entry["from"], entry["to"], entry["num_samples"]) == ("ant", "bee", 4)
    assert (entry["recall"], entry["taken_for_second"]) == (0.25, 0.5)
    assert confused(said[labels != 0], labels[labels != 0], [(0, 1)], NAMES) == []


def test_images_that_lie_apart_in_their_class_are_the_most_suspicious():
    random = torch.Generator().manual_seed(0)
    seen, labels = torch.randn(100, 5, generator=random), torch.arange(100) % 2
    seen[labels == 1] *= 100  # the scale of a class does not matter
    poisoned = torch.zeros(100, dtype=torch.bool)
    poisoned[:6] = True
    seen[:6] += torch.tensor([8.0, 800.0]).repeat(3)[:, None]
    scores = spectral_signatures(seen, labels)
    assert float(scores[poisoned].min()) > float(scores[~poisoned].max())
    assert float(scores[labels == 0].mean()) == pytest.approx(1.0)


def test_features_are_what_the_last_linear_layer_is_given():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4, bias=False), nn.ReLU(), nn.Linear(4, 3))
    pixels = images([0, 1, 2], [0, 1, 0])
    by_hand = torch.relu(model[1](pixels.flatten(1).float() / 255)).detach()
    torch.testing.assert_close(features(model, pixels, 2), by_hand)
    assert features(ByCorner(), pixels) is None
    labels, some = torch.zeros(3, dtype=torch.int64), torch.tensor([True, False, False])
    told = finders(model, pixels, labels, some)
    assert set(told) == {"spectral_signatures", "activation_clustering"}
    assert all(0 <= each["auroc"] <= 1 for each in told.values())
    assert finders(model, pixels, labels, torch.ones(3, dtype=torch.bool)) == {}
    assert finders(ByCorner(), pixels, labels, some) == {}


def test_the_smaller_of_two_clusters_of_a_class_is_the_suspicious_one():
    random = torch.Generator().manual_seed(0)
    seen, labels = torch.randn(100, 20, generator=random), torch.arange(100) % 2
    poisoned = torch.zeros(100, dtype=torch.bool)
    poisoned[:20] = labels[:20] == 1  # ten of the fifty of class 1
    seen[poisoned, 3] += 12.0
    scores = activation_clusters(seen, labels)
    assert scores[poisoned].tolist() == [0.8] * 10
    assert scores[~poisoned & (labels == 1)].tolist() == pytest.approx([0.2] * 40)
    shuffled = torch.randperm(100, generator=random)
    torch.testing.assert_close(activation_clusters(seen[shuffled], labels[shuffled]), scores[shuffled])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_clusters_of_features_that_do_not_differ_are_none(count):
    scores = activation_clusters(torch.ones(count, 4), torch.zeros(count, dtype=torch.int64))
    assert scores.tolist() == [0.0] * count
