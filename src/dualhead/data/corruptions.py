"""Common corruptions after Hendrycks and Dietterich 2019, ICLR (arXiv 1903.12261): 15 kinds in 5 severities.

The constants are those of the published CIFAR-10-C and ImageNet-C; the rendering is this project's own, checked against
the published one. One kind cannot be the same: frost is laid on from photographs there, and from a computed pattern of
the same brightness and contrast here. Numbers compare with one another, and not to the last digit with published ones.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from dualhead.errors import UserError

TITLE: Final = "corruptions after Hendrycks and Dietterich, own rendering"
SEVERITIES: Final = 5
SMALL_SIDE: Final = 64
"""Images whose longer side is shorter than this take the constants of CIFAR-10-C, others those of ImageNet-C."""

Picture = NDArray[np.float64]
"""[H, W, 3], in [0, 1]."""

_LUMA = np.array([0.299, 0.587, 0.114])
_IMAGENET_SIDE = 244.0  # as published; 224 was meant there

# Constants of each kind by severity: for small images, and for large ones.
_CONSTANTS: Final[dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]] = {
    "gaussian_noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": ((500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": ((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": (
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": (
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": (
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": (
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": (
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    "fog": (
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (
        tuple(tuple(32 * c for c in row) for row in (
            (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03),
        )),
        tuple(tuple(_IMAGENET_SIDE * c for c in row) for row in (
            (2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02),
        )),
    ),
    "pixelate": ((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}  # fmt: skip

KINDS: Final = tuple(_CONSTANTS)
"""The kinds, in the published order: noise, blur, weather, digital."""


def is_small(height: int, width: int) -> bool:
    """Whether images of this size take the constants of CIFAR-10-C."""
    return max(height, width) < SMALL_SIDE


def check_corruptible(channels: int, height: int, width: int) -> None:
    """Refuse images that have no colours, or are too small for a kernel.

    Raises:
        UserError: saying what they are.
    """
    if channels not in (1, 3) or min(height, width) < 8:
        raise UserError(
            f"corruptions need grey or colour images of at least 8x8 pixels, got {channels}x{height}x{width}"
        )


def corrupt(image: NDArray[np.uint8], kind: str, severity: int, key: tuple[int, ...] = (0,)) -> NDArray[np.uint8]:
    """Corrupt an image.

    Args:
        image: [C, H, W], grey or colour.
        kind: one of `KINDS`.
        severity: 1 to 5.
        key: names the randomness: a seed and the sample's number, say. Equal keys give equal images.

    Returns:
        An image of the same shape.

    Raises:
        UserError: for a kind, a severity or a shape that there is not.
    """
    channels, height, width = image.shape
    check_corruptible(channels, height, width)
    if kind not in KINDS or not 1 <= severity <= SEVERITIES:
        raise UserError(f"no corruption {kind!r} of severity {severity}; there are {', '.join(KINDS)} of 1 to 5")
    constants = _CONSTANTS[kind][0 if is_small(height, width) else 1][severity - 1]
    draw = np.random.default_rng([*key, KINDS.index(kind), severity])
    colours = np.ascontiguousarray(np.broadcast_to(image, (3, height, width)).transpose(1, 2, 0))
    made = _RENDER[kind](colours / 255.0, constants, draw)
    eight_bit = (np.clip(made, 0.0, 1.0) * 255.0 + 1e-6).astype(np.uint8)  # cut off, as published
    if channels == 1:
        return np.asarray((eight_bit @ _LUMA + 0.5).astype(np.uint8)[None])
    return eight_bit.transpose(2, 0, 1)


# ---- noise


def _gaussian_noise(x: Picture, scale: float, draw: Generator) -> Picture:
    return x + draw.normal(scale=scale, size=x.shape)


def _shot_noise(x: Picture, photons: float, draw: Generator) -> Picture:
    return draw.poisson(x * photons) / photons


def _impulse_noise(x: Picture, share: float, draw: Generator) -> Picture:
    hit, white = draw.random(x.shape) < share, draw.random(x.shape) < 0.5
    return np.where(hit, white.astype(np.float64), x)


# ---- blur


def _gaussian(x: Picture, sigma: float) -> Picture:
    return np.asarray(ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest"))


def _disk(radius: float, alias_blur: float) -> NDArray[np.float64]:
    """A disk of weights, its edge softened by a Gaussian of few taps."""
    reach, taps = (8, 1) if radius <= 8 else (int(radius), 2)
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (rows**2 + columns**2 <= radius**2).astype(np.float64)
    soft = np.exp(-0.5 * (np.arange(-taps, taps + 1) / alias_blur) ** 2)
    soft /= soft.sum()
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, soft, axis, mode="mirror")
    return np.asarray(disk / ((rows**2 + columns**2) <= radius**2).sum())


def _defocus_blur(x: Picture, constants: tuple[float, float], draw: Generator) -> Picture:
    del draw
    kernel = _disk(*constants)
    return np.stack([ndimage.correlate(x[..., c], kernel, mode="mirror") for c in range(3)], -1)


def _glass_blur(x: Picture, constants: tuple[float, int, int], draw: Generator) -> Picture:
    sigma, reach, rounds = constants
    pixels = (_gaussian(x, sigma) * 255.0).astype(np.uint8)
    height, width, _ = x.shape
    rows, columns = range(height - reach, reach, -1), range(width - reach, reach, -1)
    for _ in range(rounds):
        moves = draw.integers(-reach, reach, (len(rows), len(columns), 2))
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                there = row + moves[i, j, 1], column + moves[i, j, 0]
                # The published swap goes through views, so that the pixel is copied and not exchanged.
                pixels[row, column] = pixels[there]
    return _gaussian(pixels / 255.0, sigma)


def _along_a_line(x: Picture, radius: int, sigma: float, angle: float) -> Picture:
    """Motion blur as ImageMagick's: a one-sided Gaussian of 2 radius + 1 taps along an angle in degrees."""
    weights = np.exp(-0.5 * (np.arange(2 * radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    height, width = x.shape[:2]
    blurred = np.zeros_like(x)
    for tap, weight in enumerate(weights):
        down = int(np.ceil(tap * np.sin(np.deg2rad(angle)) - 0.5))
        right = int(np.ceil(tap * np.cos(np.deg2rad(angle)) - 0.5))
        rows = np.clip(np.arange(height) + down, 0, height - 1)
        columns = np.clip(np.arange(width) + right, 0, width - 1)
        blurred += weight * x[rows][:, columns]
    return blurred


def _motion_blur(x: Picture, constants: tuple[int, float], draw: Generator) -> Picture:
    return _along_a_line(x, *constants, draw.uniform(-45, 45))


def _zoomed(x: Picture, factor: float) -> Picture:
    """The middle of a picture, enlarged linearly to its size."""
    sides = x.shape[:2]
    cut = [int(np.ceil(side / factor)) for side in sides]
    first = [(side - part) // 2 for side, part in zip(sides, cut, strict=True)]
    middle = x[first[0] : first[0] + cut[0], first[1] : first[1] + cut[1]]
    large = ndimage.zoom(middle, (factor, factor, *(1 for _ in x.shape[2:])), order=1)
    over = [(now - side) // 2 for now, side in zip(large.shape, sides, strict=False)]
    return np.asarray(large[over[0] : over[0] + sides[0], over[1] : over[1] + sides[1]])


def _zoom_blur(x: Picture, constants: tuple[float, float], draw: Generator) -> Picture:
    del draw
    end, step = constants
    factors = np.arange(1, end, step)
    return (x + sum((_zoomed(x, factor) for factor in factors), np.zeros_like(x))) / (len(factors) + 1)


# ---- weather


def _snow(x: Picture, constants: tuple[float, float, float, float, int, float, float], draw: Generator) -> Picture:
    mean, scale, zoom, threshold, radius, sigma, mixed = constants
    flakes = _zoomed(draw.normal(mean, scale, x.shape[:2]), zoom)
    flakes = np.clip(np.where(flakes < threshold, 0.0, flakes), 0.0, 1.0)
    flakes = _along_a_line(flakes, radius, sigma, draw.uniform(-135, -45))[..., None]
    pale = np.maximum(x, (x @ _LUMA)[..., None] * 1.5 + 0.5)
    return np.asarray(mixed * x + (1 - mixed) * pale + flakes + flakes[::-1, ::-1])


def _plasma(side: int, decay: float, draw: Generator) -> NDArray[np.float64]:
    """A height map [side, side] in [0, 1] by diamonds and squares; the side is a power of two, and wraps around."""
    heights = np.zeros((side, side))
    step, roughness = side, 100.0

    def middle(of: NDArray[np.float64]) -> NDArray[np.float64]:
        return of / 4 + roughness * draw.uniform(-roughness, roughness, of.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        heights[half::step, half::step] = middle(pairs + np.roll(pairs, -1, 1))
        centres = heights[half::step, half::step]
        beside = centres + np.roll(centres, 1, 0) + corners + np.roll(corners, -1, 1)
        heights[::step, half::step] = middle(beside)
        above = centres + np.roll(centres, 1, 1) + corners + np.roll(corners, -1, 0)
        heights[half::step, ::step] = middle(above)
        step, roughness = half, roughness / decay
    heights -= heights.min()
    return np.asarray(heights / heights.max())


def _plasma_over(x: Picture, decay: float, draw: Generator) -> NDArray[np.float64]:
    height, width, _ = x.shape
    side = 1 << (max(height, width) - 1).bit_length()
    return _plasma(side, decay, draw)[:height, :width, None]


def _fog(x: Picture, constants: tuple[float, float], draw: Generator) -> Picture:
    amount, decay = constants
    highest = x.max()
    return np.asarray((x + amount * _plasma_over(x, decay, draw)) * highest / (highest + amount))


_FROST: Final = (
    ((0.31, 0.59, 0.65), 0.06),
    ((0.79, 0.81, 0.84), 0.06),
    ((0.79, 0.81, 0.84), 0.06),
    ((0.54, 0.60, 0.65), 0.10),
    ((0.44, 0.48, 0.53), 0.14),
)
"""Mean of red, green and blue, and contrast, of the five published photographs, two of which are one."""


def _frost(x: Picture, constants: tuple[float, float], draw: Generator) -> Picture:
    kept, laid = constants
    mean, scale = _FROST[int(draw.integers(len(_FROST)))]
    ridges = 1.0 - np.abs(2.0 * _plasma_over(x, 1.6, draw) - 1.0)  # thin bright lines, as of crystals
    pattern = (ridges - ridges.mean()) / max(float(ridges.std()), 1e-6)
    return np.asarray(kept * x + laid * np.clip(np.array(mean) + scale * pattern, 0.0, 1.0))


# ---- digital


def _brightness(x: Picture, added: float, draw: Generator) -> Picture:
    """Raise the value of hue, saturation and value, which are the other two's."""
    del draw
    value = x.max(2, keepdims=True)
    raised = np.clip(value + added, 0.0, 1.0)
    return np.asarray(np.where(value > 0, x * raised / np.where(value > 0, value, 1.0), raised))


def _contrast(x: Picture, factor: float, draw: Generator) -> Picture:
    del draw
    mean = x.mean((0, 1), keepdims=True)
    return np.asarray((x - mean) * factor + mean)


def _elastic_transform(x: Picture, constants: tuple[float, float, float], draw: Generator) -> Picture:
    strength, sigma, shift = constants
    height, width, _ = x.shape
    middle, reach = np.array([height // 2, width // 2], np.float64), min(height, width) // 3
    before = np.stack([middle + reach, [middle[0] + reach, middle[1] - reach], middle - reach])
    after = before + draw.uniform(-shift, shift, before.shape)
    # From where in the picture each place of the new one comes: the affine map of three points onto three, back.
    back = np.linalg.solve(np.column_stack([after, np.ones(3)]), before)
    rows, columns = np.mgrid[:height, :width].astype(np.float64)
    # Points are (x, y), as published: columns before rows.
    from_columns = columns * back[0, 0] + rows * back[1, 0] + back[2, 0]
    from_rows = columns * back[0, 1] + rows * back[1, 1] + back[2, 1]
    warped = [ndimage.map_coordinates(x[..., c], [from_rows, from_columns], order=1, mode="mirror") for c in range(3)]
    moves = [
        strength * ndimage.gaussian_filter(draw.uniform(-1, 1, (height, width)), sigma, mode="reflect", truncate=3)
        for _ in range(2)
    ]
    places = [rows + moves[0], columns + moves[1]]
    return np.stack([ndimage.map_coordinates(each, places, order=1, mode="reflect") for each in warped], -1)


def _pixelate(x: Picture, factor: float, draw: Generator) -> Picture:
    del draw
    height, width, _ = x.shape
    small = _image(x).resize((int(width * factor), int(height * factor)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX)) / 255.0


def _jpeg_compression(x: Picture, quality: int, draw: Generator) -> Picture:
    del draw
    held = io.BytesIO()
    _image(x).save(held, "JPEG", quality=quality)
    return np.asarray(Image.open(held)) / 255.0


def _image(x: Picture) -> Image.Image:
    return Image.fromarray((x * 255.0 + 0.5).astype(np.uint8))


_RENDER: Final[dict[str, Callable[[Picture, Any, Generator], Picture]]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
