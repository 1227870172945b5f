from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualhead.data import augmentations
from dualhead.errors import UserError
from dualhead.noise import Streams

SHAPES = [(3, 32, 32), (1, 8, 8), (3, 5, 9)]


def images_of(count, shape, seed=0):
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def streams_of(count, seed=0):
    return Streams.of(seed, torch.arange(count))


@pytest.fixture(params=augmentations.names())
def augmentation(request):
    return augmentations.build(request.param)


@pytest.mark.parametrize("shape", SHAPES)
def test_keeps_type_shape_and_input(augmentation, shape):
    images = images_of(7, shape)
    before = images.clone()
    result = augmentation(images, streams_of(7))
    assert result.dtype == torch.uint8
    assert result.shape == images.shape
    assert torch.equal(images, before)


@pytest.mark.parametrize("shape", SHAPES)
def test_does_not_depend_on_the_batch_around_a_sample(augmentation, shape):
    images, streams = images_of(16, shape), streams_of(16)
    whole = augmentation(images, streams)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(augmentation(images[order], streams[order]), whole[order])
    alone = torch.cat([augmentation(images[i : i + 1], streams[torch.tensor([i])]) for i in range(16)])
    assert torch.equal(alone, whole)


def test_is_found_by_name_and_described(augmentation):
    assert augmentations.build(augmentations.describe(augmentation)) == augmentation


@given(st.integers(1, 9), st.sampled_from(SHAPES), st.integers(0, 2**31))
@settings(max_examples=40)
def test_pad_crop_is_a_window_of_the_padded_image(padding, shape, seed):
    images = images_of(4, shape, seed)
    result = augmentations.build(f"pad_crop-{padding}")(images, streams_of(4, seed))
    _, height, width = shape
    for image, cropped in zip(images, result, strict=True):
        padded = torch.zeros(shape[0], height + 2 * padding, width + 2 * padding, dtype=torch.uint8)
        padded[:, padding : padding + height, padding : padding + width] = image
        windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # [C, rows, columns, H, W]
        same = (windows == cropped[:, None, None]).flatten(3).all(3).all(0)
        assert same.any()


def test_pad_crop_draws_every_offset_equally_often():
    padding, count = 2, 5000
    image = torch.arange(1, 26, dtype=torch.uint8).reshape(1, 1, 5, 5).expand(count, 1, 5, 5)
    centre = augmentations.build("pad_crop-2")(image, streams_of(count))[:, 0, 2, 2]
    counts = torch.bincount(centre.long(), minlength=26)[1:]
    assert (counts > 0).all()
    expected = count / (2 * padding + 1) ** 2
    assert float(((counts - expected) ** 2 / expected).sum()) < 52.0  # chi-square, 24 degrees of freedom, p = 0.001


def test_flip_mirrors_or_leaves():
    images = images_of(4000, (1, 2, 3))
    result = augmentations.build("flip")(images, streams_of(4000))
    mirrored = (result == images.flip(3)).flatten(1).all(1)
    assert (mirrored | (result == images).flatten(1).all(1)).all()
    assert 0.45 < float(mirrored.float().mean()) < 0.55


def test_flip_at_its_extremes():
    images = images_of(9, (3, 4, 5))
    assert torch.equal(augmentations.build({"name": "flip", "p": 1.0})(images, streams_of(9)), images.flip(3))
    assert torch.equal(augmentations.build({"name": "flip", "p": 0.0})(images, streams_of(9)), images)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"name": "pad_crop", "padding": 0}, "padding must be at least 1, got 0"),
        ({"name": "flip", "p": 1.5}, "p must lie in"),
        ({"name": "jpeg", "p": -1}, "p must lie in"),
        ({"name": "jpeg", "quality": 0}, "quality must lie in 1 to 100, got 0"),
        ("flop", "did you mean 'flip'"),
    ],
)
def test_impossible_values_are_refused(spec, words):
    with pytest.raises(UserError, match=words):
        augmentations.build(spec, "data.augment")


# ---- random_resized_crop


def test_a_resized_crop_of_all_is_the_image():
    images = images_of(5, (3, 12, 16))
    whole = augmentations.build({"name": "random_resized_crop", "area": [1, 1], "ratio": [16 / 12, 16 / 12]})
    assert torch.equal(whole(images, streams_of(5)), images)


@pytest.mark.parametrize("size", [(7, 7), (12, 5)])
def test_a_resized_crop_keeps_to_area_and_proportions(size):
    # The images tell where a pixel comes from: rows in channel 0, columns in channel 1.
    across = torch.arange(64, dtype=torch.uint8) * 2
    images = torch.stack((across[:, None].expand(64, 64), across.expand(64, 64)))[None].expand(500, -1, -1, -1)
    crop = augmentations.build({"name": "random_resized_crop", "size": list(size), "area": [0.25, 0.5]})
    cut = crop(images, streams_of(500)).float() / 2
    assert cut.shape == (500, 2, *size)
    height = (cut[:, 0, -1, 0] - cut[:, 0, 0, 0]) * size[0] / (size[0] - 1)
    width = (cut[:, 1, 0, -1] - cut[:, 1, 0, 0]) * size[1] / (size[1] - 1)
    area, ratio = height * width / 64**2, width / height
    for found, low, high in ((area, 0.25, 0.5), (ratio, 0.75, 4 / 3)):
        assert float(found.min()) == pytest.approx(low, rel=0.1)
        assert float(found.max()) == pytest.approx(high, rel=0.1)
    assert len(cut[:, 0, 0, 0].unique()) > 20  # everywhere


def test_proportions_that_do_not_fit_give_the_largest_that_does():
    image = torch.arange(40, dtype=torch.uint8).expand(1, 1, 10, 40)
    wide = augmentations.build({"name": "random_resized_crop", "size": [10, 10], "area": [1, 1], "ratio": [1, 1]})
    found = wide(image, streams_of(1))[0, 0, 0]
    assert int(found[-1]) - int(found[0]) == 9  # a square as high as the image


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"size": [0, 8]}, "size must be"),
        ({"area": [0, 1]}, "area must be"),
        ({"area": [0.5, 0.4]}, "area must be"),
        ({"ratio": [2, 1]}, "ratio must be"),
    ],
)
def test_impossible_resized_crops_are_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        augmentations.build({"name": "random_resized_crop", **wrong})


# ---- jpeg


def smooth(count, channels, side):
    """Pictures such as JPEG is made for: sums of a few slow waves."""
    draw = torch.Generator().manual_seed(3)
    place = torch.arange(side) / side
    waves = torch.stack([torch.cos(2 * torch.pi * k * place) for k in range(4)])
    mixed = torch.randn(count, channels, 4, 4, generator=draw)
    values = torch.einsum("bckl,ki,lj->bcij", mixed, waves, waves)
    return (128 + 40 * values).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("quality", [10, 50, 75, 95])
@pytest.mark.parametrize(("channels", "side"), [(1, 16), (3, 32), (3, 20)])
def test_jpeg_is_what_libjpeg_makes_of_it(quality, channels, side):
    import io

    import numpy as np
    from PIL import Image

    images, apart = smooth(6, channels, side), []
    ours = augmentations.build({"name": "jpeg", "quality": quality})(images, streams_of(6))
    for image, made in zip(images, ours, strict=True):
        pixels, held = image.permute(1, 2, 0).numpy().squeeze(), io.BytesIO()
        Image.fromarray(pixels).save(held, "JPEG", quality=quality, subsampling=0)
        theirs = torch.as_tensor(np.asarray(Image.open(held)).astype(np.int16))
        apart.append((made.permute(1, 2, 0).squeeze().to(torch.int16) - theirs).abs().float().mean())
    # libjpeg transforms in whole numbers, so that a coefficient near half a step is rounded the other way now and then.
    assert float(torch.stack(apart).mean()) < 1.0


def test_jpeg_of_one_grey_is_the_grey_to_half_a_step():
    for level in (0, 100, 128, 255):
        images = torch.full((1, 1, 8, 8), level, dtype=torch.uint8)
        made = augmentations.build({"name": "jpeg", "quality": 50})(images, streams_of(1)).float()
        assert (made == made[0, 0, 0, 0]).all()
        assert abs(float(made[0, 0, 0, 0]) - level) <= 1.5  # DC: 8 levels of 16 / 8, so steps of 2 grey levels


def test_jpeg_takes_small_noise_away():
    images = torch.full((8, 3, 32, 32), 128, dtype=torch.uint8)
    sign = torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noisy = (images.int() + 8 * sign).to(torch.uint8)  # each coefficient of it is far below half a step
    pressed = augmentations.build("jpeg")(noisy, streams_of(8))
    assert int((pressed.int() - 128).abs().max()) <= 1


def test_jpeg_presses_a_share_of_the_images():
    images = images_of(400, (1, 8, 8))
    press = augmentations.build({"name": "jpeg", "p": 0.25})
    same = (press(images, streams_of(400)) == images).flatten(1).all(1)
    assert 0.65 < float(same.float().mean()) < 0.85
    with pytest.raises(UserError, match="1 or 3 channels, got 2"):
        press(images_of(1, (2, 8, 8)), streams_of(1))
