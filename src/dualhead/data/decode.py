"""Encoded images to one uint8 array."""

from __future__ import annotations

import functools
import io
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from dualhead.errors import UserError

Pixels = NDArray[np.uint8]

_FORMATS: Final = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
"""What is opened. PIL knows more, and some of it runs other programs (EPS)."""
EXTENSIONS: Final = frozenset(
    ".png .jpg .jpeg .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .jp2".split()  # noqa: SIM905  # one line reads better
)
_GREY: Final = frozenset({"1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N"})
_ORIENTATION: Final = 0x0112
_LUMA: Final = np.array([0.299, 0.587, 0.114])
_BATCH: Final = 512
_WORTH_A_THREAD: Final = 8192  # bytes an image: below, threads lose more by waiting for each other than they win


class Encoded(NamedTuple):
    """An encoded image (its bytes, or the file that holds them) and where it comes from, for messages."""

    data: bytes | Path
    file: str
    row: int | None

    def __str__(self) -> str:
        return self.file if self.row is None else f"row {self.row} of {self.file}"


@dataclass(frozen=True)
class Framing:
    """How images come to one size.

    Args:
        size: height and width; None to demand equal sizes.
        crop: None: each image is stretched to that size. A fraction in (0, 1]: the middle of the image is taken, in the
            proportions of the size and as large as fits into this part of it.
    """

    size: tuple[int, int] | None = None
    crop: float | None = None

    def apply(self, image: Image.Image) -> Image.Image:
        """The image, resized with a bicubic filter and antialiasing where that is needed."""
        if self.size is None:
            return image
        (height, width), box = self.size, None
        if self.crop is not None:
            unit = self.crop * min(image.height / height, image.width / width)
            across, down = unit * width, unit * height
            left, top = (image.width - across) / 2, (image.height - down) / 2
            box = (left, top, left + across, top + down)
        if (image.height, image.width) == self.size and box in (None, (0, 0, width, height)):
            return image
        return image.resize((width, height), Image.Resampling.BICUBIC, box)


def decode(images: Iterable[Encoded], framing: Framing = Framing()) -> Pixels:
    """Decode images into one array.

    The set is grey (C = 1) if every image is: modes 1, L, LA and 16-bit grey. Otherwise it is RGB (C = 3), whatever
    single images are. 16 bits are scaled to 8; transparency is dropped, as PIL's `convert` does; the orientation that
    a camera noted is applied; of an animation the first frame is taken.

    Args:
        images: at least one.
        framing: how they come to one size.

    Returns:
        uint8 [N, C, H, W].

    Raises:
        UserError: if there are none; or naming the image that is not readable, too large, or unlike the first in size.
    """
    chunks: list[Pixels] = []
    first: Encoded | None = None
    source = iter(images)
    with _bombs_refused(), ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(islice(source, _BATCH)):
            first = first or batch[0]
            decoded = list(_decoded(batch, framing, pool))
            expected = chunks[0].shape[1:3] if chunks else decoded[0].shape[:2]
            for encoded, pixels in zip(batch, decoded, strict=True):
                if pixels.shape[:2] != expected:
                    raise UserError(_sizes_differ(first, expected, encoded, pixels))
            grey = all(pixels.ndim == 2 for pixels in decoded)
            chunks.append(np.stack([pixels[..., None] if grey else _as_rgb(pixels) for pixels in decoded]))
    if not chunks:
        raise UserError("holds no images")
    grey = all(chunk.shape[3] == 1 for chunk in chunks)
    total, (height, width) = sum(map(len, chunks)), chunks[0].shape[1:3]
    result = np.empty((total, 1 if grey else 3, height, width), np.uint8)
    filled = 0
    for chunk in chunks:
        result[filled : filled + len(chunk)] = chunk.transpose(0, 3, 1, 2)  # a grey chunk is repeated in an RGB set
        filled += len(chunk)
    return result


def decode_single(content: bytes, shape: tuple[int, int, int], crop: float | None = None) -> Pixels:
    """Decode an image of one's own as `decode` does those of a set, for a model of images of a shape.

    Args:
        content: the encoded image.
        shape: channels (1 or 3), height and width; colours are weighed into grey as PIL does (ITU-R BT.601).
        crop: as in `Framing`.

    Returns:
        uint8 [*shape].

    Raises:
        UserError: if it is not readable, or too large.
    """
    channels, *size = shape
    pixels = decode([Encoded(content, "the file", None)], Framing((size[0], size[1]), crop))[0]
    if len(pixels) == 3 and channels == 1:
        pixels = np.tensordot(_LUMA, pixels, 1).round().astype(np.uint8)[None]
    return np.ascontiguousarray(np.broadcast_to(pixels, shape))


def decode_as(
    images: Sequence[Encoded], framing: Framing, shape: tuple[int, int, int], pool: Executor | None = None
) -> Pixels:
    """Decode some images of a set whose shape is known, as `decode` would with the whole set.

    Args:
        images: any number.
        framing: how they come to one size.
        shape: channels (1 if the set is grey), height and width of the set.
        pool: threads for large images; None: this one alone.

    Returns:
        uint8 [N, *shape].

    Raises:
        UserError: naming the image that is not readable, too large, of another size, or coloured in a grey set.
    """
    result = np.empty((len(images), *shape), np.uint8)
    with _bombs_refused():
        for row, pixels in enumerate(_decoded(images, framing, pool)):
            if pixels.shape[:2] != shape[1:]:
                raise UserError(_sizes_differ("the first image", shape[1:], images[row], pixels))
            if shape[0] == 1 and pixels.ndim == 3:
                raise UserError(
                    f"{images[row]} is coloured, but the set was taken for grey by a sample of its images; "
                    "set data.stream=false, or store all images as RGB"
                )
            result[row] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return result


@contextmanager
def _bombs_refused() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _decoded(batch: Sequence[Encoded], framing: Framing, pool: Executor | None) -> Iterator[Pixels]:
    one = functools.partial(_decode_one, framing=framing)
    large = pool is not None and sum(map(_num_bytes, batch)) >= _WORTH_A_THREAD * len(batch)
    return pool.map(one, batch) if pool is not None and large else map(one, batch)


def _num_bytes(encoded: Encoded) -> int:
    if isinstance(encoded.data, bytes):
        return len(encoded.data)
    return encoded.data.stat().st_size if encoded.data.exists() else 0


def _sizes_differ(first: Encoded | str, expected: tuple[int, ...], other: Encoded, pixels: Pixels) -> str:
    (h1, w1), (h2, w2) = expected, pixels.shape[:2]
    sizes = f"{first} is {h1}x{w1}, {other} is {h2}x{w2} (height x width)"
    resize = f"set data.image_size, for example [{h1}, {w1}], to resize them (evaluate, gallery, play: --image-size)"
    return f"images differ in size: {sizes}; {resize}"


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _decode_one(encoded: Encoded, framing: Framing) -> Pixels:
    """uint8 [H, W] if grey, else [H, W, 3]."""
    stream = io.BytesIO(encoded.data) if isinstance(encoded.data, bytes) else encoded.data
    try:
        with Image.open(stream, formats=_formats()) as image:
            if image.getexif().get(_ORIENTATION, 1) != 1:
                return _pixels(ImageOps.exif_transpose(image), framing)
            return _pixels(image, framing)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = f"{Image.MAX_IMAGE_PIXELS:,} pixels"
        raise UserError(f"{encoded} is larger than {limit}, possibly a decompression bomb; shrink it first") from None
    except UnidentifiedImageError:
        raise UserError(f"{encoded} is not a readable image (known: {', '.join(_formats())})") from None
    except Exception as error:  # decoders fail on hostile bytes in more ways than they document
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{encoded} is not a readable image: {reason}") from None


def _pixels(image: Image.Image, framing: Framing) -> Pixels:
    if image.mode in _GREY:
        image = _eight_bit(image)
    elif image.mode == "F":
        raise ValueError("its pixels are floats of unknown range; store it with 8 or 16 bits")
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return np.asarray(framing.apply(image))


def _eight_bit(image: Image.Image) -> Image.Image:
    """Mode L from any grey mode; 65535 becomes 255."""
    if not image.mode.startswith("I"):
        return image if image.mode == "L" else image.convert("L")
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels exceed 16 bits; store it with 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _as_rgb(pixels: Pixels) -> Pixels:
    return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels
