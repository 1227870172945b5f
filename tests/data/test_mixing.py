"""CutMix, and batches from two sources."""

from __future__ import annotations

import pytest
import torch

from dualhead.data import CutMix, Loader, Split
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.objectives import objectives
from dualhead.recipe.yaml import load_recipe
from dualhead.runs.prepare import prepare
from dualhead.system.processes import Group
from helpers.objectives import climbed, see
from helpers.training import batch, plain_model, stage_of, step_of, streams_of


def split(count, value=0, size=8):
    images = torch.full((count, 3, size, size), value, dtype=torch.uint8)
    return Split(images, torch.arange(count) % 10, tuple("abcdefghij"))


def mixed(count=400, size=8, **settings):
    black, white = split(count, 0, size).images, split(count, 255, size).images
    y, other = torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.int64)
    return CutMix(**settings)(black, white, y, other, Streams.of(3, torch.arange(count)), 10)


def test_labels_are_the_shares_of_the_areas_and_boxes_are_boxes():
    images, labels = mixed()
    white = (images == 255).all(1)
    assert torch.allclose(labels[:, 1], white.flatten(1).float().mean(1))
    assert torch.allclose(labels.sum(1), torch.ones(400))
    rows, columns = white.any(2), white.any(1)
    assert torch.equal(white, rows[:, :, None] & columns[:, None, :])  # a product of two sets ...
    for line in (rows, columns):
        assert int((line[:, 1:] != line[:, :-1]).sum(1).max()) <= 2  # ... that are intervals


def test_areas_before_cutting_follow_the_published_share():
    """Boxes that lie inside have sides of sqrt(1 - lambda); the mean area of all, cut at the faces, is known."""
    _, labels = mixed(4000, size=32)
    side, at = torch.rand(200_000).sqrt(), torch.rand(2, 200_000)
    clipped = (at + side / 2).clamp(max=1) - (at - side / 2).clamp(min=0)
    assert float(labels[:, 1].mean()) == pytest.approx(float(clipped.prod(0).mean()), abs=0.025)


def test_what_is_mixed_is_a_matter_of_the_sample_alone():
    count = 20
    images, labels = mixed(count)
    black, white = split(count).images, split(count, 255).images
    rows = torch.tensor([7, 3])
    y = torch.zeros(2, dtype=torch.int64)
    again, shares = CutMix()(black[rows], white[rows], y, y + 1, Streams.of(3, rows), 10)
    assert torch.equal(again, images[rows])
    assert torch.equal(shares, labels[rows])


def test_a_share_of_the_images_stays_whole():
    _, labels = mixed(2000, p=0.25)
    assert float((labels[:, 1] == 0).float().mean()) == pytest.approx(0.75, abs=0.05)


def test_the_loader_gives_each_box_the_label_of_the_image_it_is_from():
    labels = torch.arange(40) % 10
    pixels = (25 * labels).to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8).clone()
    made = Loader(Split(pixels, labels, tuple("abcdefghij")), 20, seed=1, cutmix=CutMix(), device="cpu")
    for data in made.epoch(0):
        shown = (data.x[:, 0] * 255 / 25).round().to(torch.int64)
        torch.testing.assert_close(data.y, torch.nn.functional.one_hot(shown, 10).float().mean((1, 2)))


@pytest.mark.parametrize("name", ["natural", "sat", "trades", "mart", "hybrid", "ikl"])
def test_shares_that_are_one_hot_are_labels(name):
    objective, (clean, adv) = objectives.build(name), torch.randn(2, 6, 5, dtype=torch.float64)
    y = torch.arange(6) % 5
    shares = torch.nn.functional.one_hot(y, 5).double()
    seen = see(objective, clean=clean, attacked=adv)
    assert torch.allclose(objective.loss(y, seen).total, objective.loss(shares, seen).total)
    for made in objective.inner():
        assert torch.allclose(*(climbed(objective, labels, seen, made) for labels in (y, shares)))


@pytest.mark.parametrize("name", ["sat", "trades", "mart", "hybrid"])
def test_a_step_takes_shares(name):
    model, data = plain_model(), batch(0, 8)
    shares = torch.full((8, 10), 0.05).scatter(1, data.y[:, None], 0.55)
    result = step_of(model, stage_of(name, ("model",)))(type(data)(data.index, data.x, shares), streams_of(data))
    assert bool(result.taken)
    assert 0 <= int(result.correct) <= 8


# ---- two sources


def loader(fraction=0.7, own=100, extra=30, batch_size=20, **settings):
    return Loader(split(own), batch_size, seed=1, extra=split(extra, 255), fraction=fraction, device="cpu", **settings)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.7])
def test_the_fraction_of_each_batch_comes_from_the_second_source(fraction):
    both = loader(fraction)
    assert len(both) == 5
    for data in both.epoch(0):
        generated = data.x.flatten(1).mean(1) == 1
        assert int(generated.sum()) == int(20 * fraction + 1e-9)
        assert torch.equal(generated, data.index >= 100)
        assert len(data.index.unique()) == 20


def test_own_images_are_not_shown_twice_an_epoch_and_others_come_in_the_next():
    shown = [torch.cat([d.index[d.index < 100] for d in loader().epoch(epoch)]) for epoch in range(2)]
    assert len(shown[0].unique()) == len(shown[0]) == 5 * 6
    assert set(shown[0].tolist()) != set(shown[1].tolist())


def test_a_second_source_that_is_too_small_begins_again():
    counts = torch.cat([d.index[d.index >= 100] for d in loader(0.5, extra=7).epoch(0)]).bincount()[100:]
    assert counts.sum() == 50
    assert counts.max() - counts.min() <= 1


def test_processes_share_the_batch_and_each_gets_its_part_of_the_second_source():
    whole = [data.index for data in loader(0.5).epoch(0)]
    parts = [[data.index for data in loader(0.5, group=Group(rank, 2)).epoch(0)] for rank in (0, 1)]
    for step, index in enumerate(whole):
        assert torch.equal(torch.cat([part[step] for part in parts]), index)
        assert [int((part[step] >= 100).sum()) for part in parts] == [5, 5]


def test_an_epoch_goes_on_at_any_step():
    whole = list(loader(cutmix=CutMix()).epoch(1))
    rest = list(loader(cutmix=CutMix()).epoch(1, 3))
    for a, b in zip(whole[3:], rest, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.y, b.y)


def test_a_second_source_of_other_classes_is_refused(tmp_path):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("L", (8, 8)).save(tmp_path / "train" / name / f"{number}.png")
    recipe = load_recipe("digits", [f"data.extra.source={tmp_path}"])
    with pytest.raises(
        UserError, match=r"data.extra.source .*: its images have other classes than those of data.source"
    ):
        prepare(recipe, tmp_path / "run")
