"""Models and images as people hand them over: in place, from inference mode, one logit, loaders, rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset

from dualhead.errors import UserError
from dualhead.evaluation import evaluate, make_gallery
from dualhead.models import backbones
from dualhead.threats import ThreatModel

X = torch.rand(40, 3, 6, 6, generator=torch.Generator().manual_seed(0))
THREAT = ThreatModel("Linf", 0.02)


def body(classes=4):
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 16), nn.ReLU(), nn.Linear(16, classes))


class First(nn.Module):
    """Changes its images, or a copy of them, before the network sees them."""

    def __init__(self, how, copies):
        super().__init__()
        self.how, self.copies, self.net = how, copies, body()

    def forward(self, x):
        if self.copies:
            x = x.clone()
        if self.how == "sub_":
            x = x.sub_(0.4).div_(0.3)
        elif self.how == "iadd":
            x *= 2.0
        elif self.how == "index":
            x[:, 0] = x[:, 0] - 0.5
        elif self.how == "data":
            x.data.sub_(0.4)
        return self.net(x)


LABELS = First("sub_", True)(X).argmax(1)


def measured(model, images=X, labels=LABELS, **more):
    return evaluate(model, images, labels, threat=THREAT, attacks=["pgd-5"], diagnostics=False, **more)


def same(first, second):
    assert np.array_equal(first.verdicts["pgd-5"].robust, second.verdicts["pgd-5"].robust)
    assert first.clean_accuracy == second.clean_accuracy


@pytest.mark.parametrize("how", ["sub_", "iadd", "index", "data"])
def test_a_model_that_changes_its_images_is_judged_as_one_that_copies_them(how):
    before = X.clone()
    same(measured(First(how, False)), measured(First(how, True)))
    assert torch.equal(X, before)
    make_gallery(First(how, False), X[:4], LABELS[:4], threat=THREAT)
    assert torch.equal(X, before)


@pytest.mark.parametrize("how", ["sub_", "iadd"])
def test_a_factory_that_normalises_in_place_trains_behind_a_wrapper(how, monkeypatch):
    monkeypatch.setattr("dualhead.models.factory.function_at", lambda path: lambda: First(how, False))
    model = backbones.build("mine:make").create(4, (3, 6, 6), _identity())
    images = X.clone().requires_grad_()
    model(images).sum().backward()
    assert torch.allclose(model(X), First(how, True)(X))
    assert images.grad.abs().sum() > 0


def _identity():
    from dualhead.models import Normalize

    return Normalize.identity(3)


def test_a_model_and_images_from_inference_mode_are_judged_as_any_others(monkeypatch):
    with torch.inference_mode():
        made, images = First("sub_", True), X.clone()
        normed = nn.Sequential(nn.BatchNorm2d(3), body())
    same(measured(made, images), measured(First("sub_", True)))
    measured(normed)
    assert all(parameter.is_inference() for parameter in made.parameters())  # left as it was
    monkeypatch.setattr("dualhead.models.factory.function_at", lambda path: lambda: made)
    model = backbones.build("mine:make").create(4, (3, 6, 6), _identity())
    model(X).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class One(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.net, self.shape = body(1), shape

    def forward(self, x):
        z = self.net(x)
        if self.shape == "two":
            return torch.cat((torch.zeros_like(z), z), 1)
        return {"squeezed": z[:, 0], "one": z, "dict": {"logits": z}, "image": z[:, :, None, None]}[self.shape]


@pytest.mark.parametrize("shape", ["squeezed", "one", "dict", "image"])
def test_one_logit_is_read_as_zero_and_z(shape, monkeypatch):
    two = One("two")
    labels = two(X).argmax(1)
    labels[:5] = 1 - labels[:5]
    expected = measured(two, X, labels)
    for given in (labels, labels.bool(), labels.float()[:, None]):
        same(measured(One(shape), X, given), expected)
    if shape != "image":
        monkeypatch.setattr("dualhead.models.factory.function_at", lambda path: lambda: One(shape))
        model = backbones.build("mine:make").create(2, (3, 6, 6), _identity())
        assert torch.equal(model(X), two(X))
        assert torch.equal(model(X[:1]), two(X[:1]))


# ---- images as they come


class Map(Dataset):
    def __init__(self, entry):
        self.entry = entry

    def __len__(self):
        return len(X)

    def __getitem__(self, place):
        if place >= len(X):
            raise KeyError(place)  # as sets do that were never meant to be iterated
        return self.entry(place)


def sources():
    pairs = TensorDataset(X, LABELS)
    return {
        "loader": DataLoader(pairs, batch_size=7),
        "shuffled": DataLoader(pairs, batch_size=7, shuffle=True),
        "list": list(zip(X.split(9), LABELS.split(9), strict=True)),
        "generator": ((x, y) for x, y in zip(X, LABELS.tolist(), strict=True)),
        "map": Map(lambda i: (X[i], int(LABELS[i]), {"meta": i})),
        "dicts": Map(lambda i: {"pixel_values": X[i].numpy(), "label": LABELS[i]}),
        "channels last": Map(lambda i: (X[i].permute(1, 2, 0).numpy(), LABELS[i])),
    }


@pytest.mark.parametrize("kind", list(sources()))
def test_whatever_gives_labelled_images_is_measured_as_the_tensor_of_them(kind):
    same(measured(First("sub_", True), sources()[kind], None), measured(First("sub_", True)))


def test_a_data_set_of_pictures_is_measured_as_their_bytes():
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    pixels = (X * 255).round().to(torch.uint8)
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    held = datasets.Dataset.from_dict({"image": pictures, "label": LABELS.tolist()}).cast_column(
        "image", datasets.Image()
    )
    expected = measured(First("sub_", True), pixels)
    same(measured(First("sub_", True), held, None), expected)
    same(measured(First("sub_", True), held.with_format("torch"), None), expected)


def test_a_loader_of_a_part_gives_that_part():
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=4, sampler=SubsetRandomSampler(range(10)))
    assert len(measured(First("sub_", True), loader, None).labels) == 10


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (iter(()), "no images"),
        ([X[:3]], "not \\(images, labels\\)"),
        ([(X[0], 1), (X[0, :, :4], 1)], "entry 1: its images are"),
        ([(X[0], "cat")], "labels must be integers"),
        ([{"picture": X[0], "label": 1}], "has the keys picture, label"),
        (3, "gives no labelled images"),
        (X, "labels are needed"),
    ],
)
def test_what_gives_no_labelled_images_is_refused_in_one_line_and_leaves_nothing(source, words, tmp_path):
    with pytest.raises(UserError, match=words):
        measured(body(), source, None, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (((X - 0.4465) / 0.2010) * 0.2010 + 0.4465 - 3e-8, None),
        (X + 1e-7 * (X.max() == X), None),
        (X.half() * 1.001, None),
        (nn.functional.interpolate(X, size=(12, 12), mode="bicubic").clamp(-0.1, 1.1), "clamp"),
        (torch.where(X > 0.9, torch.nan, X), "not finite"),
        (torch.where(X > 0.9, torch.inf, X), "not finite"),
        (X * 255, "divide by 255"),
        (X * 65535, "divide by 65535"),
        (X * 2 - 1, r"\(images \+ 1\) / 2"),
        ((X - 0.45) / 0.2, "as if normalised"),
        ((X * 255).long(), r"images.to\(torch.uint8\)"),
        (X.permute(0, 2, 3, 1), r"permute\(0, 3, 1, 2\)"),
    ],
)
def test_rounding_is_clamped_and_each_other_cause_has_its_own_word(images, said):
    if said is None:
        measured(body(), images)
        return
    with pytest.raises(UserError, match=said):
        measured(body(), images)
