"""Common corruptions: against values of the published rendering on fixed images, and what must hold of any."""

import json
from pathlib import Path

import numpy as np
import pytest

from dualhead.data.corruptions import KINDS, SEVERITIES, corrupt
from dualhead.errors import UserError

PUBLISHED = json.loads((Path(__file__).parent / "published_corruptions.json").read_text())
"""By side of the image, kind and severity, what the published code makes of `picture`, with the frost pictures and the
re-implemented motion blur of `imagecorruptions` 1.1.2: without randomness every so many-th pixel; with randomness, of
24 draws, the means of |change| and of change and their deviations, in 1/255."""
EXACT = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")


def picture(side):
    """Waves in colour, [3, side, side]."""
    row, column = np.mgrid[:side, :side] / side
    waves = [
        np.sin(7 * row + 3 * column + k) * np.cos(5 * column - 2 * row * k) + 0.5 * np.sin(23 * row * column + 11 * k)
        for k in range(3)
    ]
    return np.clip(128 + 70 * np.stack(waves), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("side", [32, 64])  # with the constants of CIFAR-10-C, and of ImageNet-C
@pytest.mark.parametrize("kind", EXACT)
def test_what_draws_nothing_has_the_published_pixels(kind, side):
    image = picture(side)
    for severity, expected in enumerate(PUBLISHED[str(side)][kind], 1):
        ours = corrupt(image, kind, severity).reshape(-1)[:: image.size // 48]
        assert np.abs(ours.astype(int) - expected).max() <= 1  # rounding of float32 there


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in EXACT])
def test_what_draws_changes_images_as_much_as_the_published(kind, side):
    image, draws = picture(side), 16 if kind == "fog" else 6
    for severity, (size, shift, size_spread, shift_spread) in enumerate(PUBLISHED[str(side)][kind], 1):
        change = np.stack([corrupt(image, kind, severity, (n,)).astype(int) - image for n in range(draws)])
        error = np.sqrt(1 / draws + 1 / 24)
        assert abs(np.abs(change).mean() - size) <= 4 * size_spread * error + 0.1, severity
        assert abs(change.mean() - shift) <= 4 * shift_spread * error + 0.1, severity


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_key_gives_the_same_image_and_others_another(kind):
    image = picture(32)
    one, again, other = (corrupt(image, kind, 3, key) for key in ((1, 2), (1, 2), (1, 3)))
    assert np.array_equal(one, again)
    assert np.array_equal(one, other) == (kind in EXACT)
    assert one.shape == image.shape
    assert one.dtype == np.uint8
    grey = corrupt(np.full((1, 9, 11), 100, np.uint8), kind, SEVERITIES, (1,))
    assert grey.shape == (1, 9, 11)


@pytest.mark.parametrize(
    ("image", "kind", "severity", "told"),
    [
        (np.zeros((2, 16, 16), np.uint8), "fog", 1, "grey or colour images"),
        (np.zeros((3, 4, 16), np.uint8), "fog", 1, "at least 8x8"),
        (np.zeros((3, 16, 16), np.uint8), "rain", 1, "no corruption 'rain'"),
        (np.zeros((3, 16, 16), np.uint8), "fog", 6, "of severity 6"),
    ],
)
def test_what_cannot_be_corrupted_is_told(image, kind, severity, told):
    with pytest.raises(UserError, match=told):
        corrupt(image, kind, severity)
