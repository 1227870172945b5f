"""Encoded images to one uint8 array."""

from __future__ import annotations

import functools
import io
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from dualhead.errors import UserError

Pixels = NDArray[np.uint8]

_NEVER: Final = frozenset({"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5", "SPIDER", "IMT"})
"""Formats that Pillow knows and that are not opened: they run other programs, have no decoder, or fit any bytes."""
_BY_ENDING: Final = frozenset({"TGA", "DIB", "PCX", "SGI", "FLI", "GBR", "IPTC", "MCIDAS", "PCD"})
"""Formats that their first bytes hardly tell from others; a file is one of them only if its ending says so too."""
_USUAL: Final = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
_GREY: Final = frozenset({"1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N"})
_ORIENTATION: Final = 0x0112
_BATCH: Final = 512
_LISTED: Final = 3  # images that cannot be read, of which an error tells the reasons
FULL_DEPTH: Final = 16
"""Bits of the widest numbers that are read."""
_WORTH_A_THREAD: Final = 8192  # bytes an image: below, threads lose more by waiting for each other than they win


class Encoded(NamedTuple):
    """An encoded image (its bytes, the file that holds them, or nothing) and where it comes from, for messages."""

    data: bytes | Path | None
    file: str
    row: int | None

    def __str__(self) -> str:
        return self.file if self.row is None else f"row {self.row} of {self.file}"


Resample = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
"""Filters of Pillow, by its names."""


@dataclass(frozen=True)
class Framing:
    """How images come to one form.

    Args:
        size: height and width; None to demand equal sizes.
        crop: None: each image is stretched to that size. A fraction in (0, 1]: the middle of the image is taken, in the
            proportions of the size and as large as fits into this part of it.
        resample: the filter of resizing; it is widened where an image shrinks, so that nothing aliases.
        squash: the middle that `crop` takes has the proportions of the image, and is stretched to the size.
        channels: 1: colours are weighed into grey (ITU-R BT.601). 3: grey is repeated in red, green and blue. None:
            a set is grey if all its images are.
        depth: bits that pixels have, where files store them in wider numbers (12 bits in 16). None: the file's own; a
            set whose 16-bit images leave the highest bit unused is then refused.
    """

    size: tuple[int, int] | None = None
    crop: float | None = None
    resample: Resample = "bicubic"
    squash: bool = False
    channels: int | None = None
    depth: int | None = None

    def apply(self, image: Image.Image) -> Image.Image:
        """The image in its size, antialiased where that is needed."""
        if self.size is None:
            return image
        (height, width), box = self.size, None
        if self.crop is not None:
            shares = (image.height / height, image.width / width)
            unit = self.crop * min(shares)
            across, down = unit * width, unit * height
            if self.squash:
                across, down = self.crop * image.width, self.crop * image.height
            # 29 / 28 * 28 is a last bit more than 29, and Pillow takes no box that goes beyond the image.
            left, top = max((image.width - across) / 2, 0.0), max((image.height - down) / 2, 0.0)
            box = (left, top, min(left + across, image.width), min(top + down, image.height))
        if (image.height, image.width) == self.size and box in (None, (0, 0, width, height)):
            return image
        return image.resize((width, height), Image.Resampling[self.resample.upper()], box)


class Decoded(NamedTuple):
    """Decoded images.

    Attributes:
        pixels: uint8 [N, C, H, W].
        unreadable: positions among those asked for that are left out, with the reason of each.
    """

    pixels: Pixels
    unreadable: dict[int, str]


def decode(images: Iterable[Encoded], framing: Framing = Framing()) -> Pixels:
    """Decode images into one array.

    The set is grey (C = 1) if every image is: modes 1, L, LA and 16-bit grey. Otherwise it is RGB (C = 3), whatever
    single images are; `framing.channels` overrides that. 16 bits are scaled to 8; transparency is dropped, as PIL's
    `convert` does; the orientation that a camera noted is applied; of an animation the first frame is taken.

    Args:
        images: at least one.
        framing: how they come to one form.

    Returns:
        uint8 [N, C, H, W].

    Raises:
        UserError: if there are none; or naming the images that are not readable, too large, or unlike the first in
            size; or if their largest value says that they hold fewer bits than their files.
    """
    return decode_readable(images, framing, skip=False).pixels


def decode_readable(images: Iterable[Encoded], framing: Framing, *, skip: bool) -> Decoded:
    """Decode images as `decode` does, without those that are not readable.

    Args:
        images: at least one.
        framing: how they come to one form.
        skip: False: refuse them all if one is not readable.

    Raises:
        UserError: as `decode`; and if none is readable.
    """
    chunks: list[Pixels] = []
    first: Encoded | None = None
    unreadable: dict[int, str] = {}
    deepest: _Deepest | None = None
    source, at = iter(images), 0
    with _bombs_refused(), ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(islice(source, _BATCH)):
            opened = list(_decoded(batch, framing, pool))
            unreadable |= {at + n: found for n, found in enumerate(opened) if isinstance(found, str)}
            at += len(batch)
            kept = [(encoded, one) for encoded, one in zip(batch, opened, strict=True) if isinstance(one, _Opened)]
            if not kept:
                continue
            first = first or kept[0][0]
            expected = chunks[0].shape[1:3] if chunks else kept[0][1].pixels.shape[:2]
            for encoded, (pixels, deep) in kept:
                if pixels.shape[:2] != expected:
                    raise UserError(_sizes_differ(first, expected, encoded, pixels))
                if deep is not None and (deepest is None or deep > deepest.value):
                    deepest = _Deepest(deep, str(encoded))
            grey = all(pixels.ndim == 2 for _, (pixels, _) in kept)
            chunks.append(np.stack([pixels[..., None] if grey else _as_rgb(pixels) for _, (pixels, _) in kept]))
    if unreadable and (not skip or not chunks):
        raise UserError(_told_unreadable(list(unreadable.values())))
    if not chunks:
        raise UserError("holds no images")
    if deepest is not None and framing.depth is None:
        refuse_unused_bits(deepest.value, deepest.image)
    grey = all(chunk.shape[3] == 1 for chunk in chunks)
    total, (height, width) = sum(map(len, chunks)), chunks[0].shape[1:3]
    result = np.empty((total, 1 if grey else 3, height, width), np.uint8)
    filled = 0
    for chunk in chunks:
        result[filled : filled + len(chunk)] = chunk.transpose(0, 3, 1, 2)  # a grey chunk is repeated in an RGB set
        filled += len(chunk)
    return Decoded(result, unreadable)


class _Deepest(NamedTuple):
    """The largest value of images that are stored with more than 8 bits, and the image that has it."""

    value: int
    image: str


def refuse_unused_bits(largest: int, where: str) -> None:
    """Refuse 16-bit images of which none uses the highest bit: they would come out dark, and eps mean more.

    Args:
        largest: value of all images.
        where: it is.
    """
    bits = max(8, largest.bit_length())
    if bits < FULL_DEPTH:
        raise UserError(
            f"16-bit images whose largest value is {largest} (in {where}), so they seem to hold {bits} bits: set "
            f"data.depth={bits} (evaluate, gallery, play: --depth {bits}), or 16 if they are that dark"
        )


def frame(images: Pixels, framing: Framing) -> Pixels:
    """Bring decoded images of one size to their form.

    Args:
        images: uint8 [N, H, W, C], C 1 or 3.
        framing: the form; its depth has been seen to.

    Returns:
        uint8 [N, C, H, W].
    """
    if framing.size is not None or framing.channels not in (None, images.shape[3]):
        modes = {1: "L", 3: "RGB"}
        mode = modes[framing.channels or images.shape[3]]
        pictures = (Image.fromarray(image[..., 0] if image.shape[2] == 1 else image) for image in images)
        framed = [np.asarray(framing.apply(picture.convert(mode))) for picture in pictures]
        images = np.stack([one[..., None] if one.ndim == 2 else one for one in framed])
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _told_unreadable(reasons: list[str]) -> str:
    advice = "mend or remove them, or set data.skip_unreadable=true (evaluate, gallery, play: --skip-unreadable)"
    if len(reasons) == 1:
        return f"{reasons[0]}; {advice.replace('them', 'it', 1)}"
    more = f"; and {len(reasons) - _LISTED} more" if len(reasons) > _LISTED else ""
    return f"{len(reasons)} images cannot be read: {'; '.join(reasons[:_LISTED])}{more}; {advice}"


def decode_single(content: bytes, shape: tuple[int, int, int], framing: Framing = Framing()) -> Pixels:
    """Decode an image of one's own as `decode` does those of a set, for a model of images of a shape.

    Args:
        content: the encoded image.
        shape: channels (1 or 3), height and width; colours are weighed into grey as PIL does (ITU-R BT.601).
        framing: how the images of the set come to one form; its size and channels are those of `shape`.

    Returns:
        uint8 [*shape].

    Raises:
        UserError: if it is not readable, or too large.
    """
    channels, *size = shape
    # One image says nothing of the depth of a set: without a word on it 16 bits are 16.
    framing = replace(framing, size=(size[0], size[1]), channels=channels, depth=framing.depth or FULL_DEPTH)
    return np.ascontiguousarray(decode([Encoded(content, "the file", None)], framing)[0])


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
        for row, opened in enumerate(_decoded(images, framing, pool)):
            if isinstance(opened, str):
                raise UserError(_told_unreadable([opened]))
            pixels = opened.pixels
            if pixels.shape[:2] != shape[1:]:
                raise UserError(_sizes_differ("the first image", shape[1:], images[row], pixels))
            if shape[0] == 1 and pixels.ndim == 3:
                raise UserError(
                    f"{images[row]} is coloured, but the set was taken for grey by a sample of its images; "
                    "set data.channels=3 (or 1), or data.stream=false"
                )
            result[row] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return result


def unreadable(images: Sequence[Encoded], framing: Framing) -> dict[int, str]:
    """The positions of images that cannot be read, and why."""
    with _bombs_refused(), ThreadPoolExecutor(os.cpu_count()) as pool:
        found = enumerate(_decoded(images, framing, pool))
        return {place: opened for place, opened in found if isinstance(opened, str)}


@contextmanager
def _bombs_refused() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _decoded(batch: Sequence[Encoded], framing: Framing, pool: Executor | None) -> Iterator[_Opened | str]:
    one = functools.partial(_decode_one, framing=framing)
    large = pool is not None and sum(map(_num_bytes, batch)) >= _WORTH_A_THREAD * len(batch)
    return pool.map(one, batch) if pool is not None and large else map(one, batch)


def _num_bytes(encoded: Encoded) -> int:
    if isinstance(encoded.data, bytes):
        return len(encoded.data)
    return encoded.data.stat().st_size if encoded.data is not None and encoded.data.exists() else 0


def _sizes_differ(first: Encoded | str, expected: tuple[int, ...], other: Encoded, pixels: Pixels) -> str:
    (h1, w1), (h2, w2) = expected, pixels.shape[:2]
    sizes = f"{first} is {h1}x{w1}, {other} is {h2}x{w2} (height x width)"
    resize = f"set data.image_size, for example [{h1}, {w1}], to resize them (evaluate, gallery, play: --image-size)"
    return f"images differ in size: {sizes}; {resize}"


@functools.cache
def _formats(ending: str = "") -> tuple[str, ...]:
    """The formats that a file with such an ending may have, the usual ones first."""
    Image.init()
    known = [name for name in Image.OPEN if name not in _NEVER | _BY_ENDING | frozenset(_USUAL)]
    named = Image.registered_extensions().get(ending)
    weak = [named] if named in _BY_ENDING and named in Image.OPEN else []
    return (*(name for name in _USUAL if name in Image.OPEN), *weak, *known)


@functools.cache
def endings() -> frozenset[str]:
    """The endings, with their dot, of the formats that are opened."""
    Image.init()
    formats = {*Image.OPEN, "MPO"} - _NEVER
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats)


def is_image(path: Path) -> bool:
    """Whether a file begins like an image, whatever its ending."""
    try:
        with Image.open(path, formats=_formats(path.suffix.lower())) as image:
            return image.width > 0
    except Exception:  # decoders fail on bytes of any kind in more ways than they document
        return False


class _Opened(NamedTuple):
    """An image, uint8 [H, W] if grey, else [H, W, 3]; and its largest value, if it is stored with more than 8 bits."""

    pixels: Pixels
    deep: int | None


def _decode_one(encoded: Encoded, framing: Framing) -> _Opened | str:
    """The image, or why it cannot be read."""
    if encoded.data is None:
        return f"{encoded} has no image"
    stream = io.BytesIO(encoded.data) if isinstance(encoded.data, bytes) else encoded.data
    ending = encoded.data.suffix.lower() if isinstance(encoded.data, Path) else ""
    try:
        with Image.open(stream, formats=_formats(ending)) as image:
            wide = _wide_mode(image)  # before anything has the file read, which forgets how it stores pixels
            found, deep = (image, None) if wide is None else _eight_bit_colours(image, stream, wide, framing.depth)
            turned = image.getexif().get(_ORIENTATION, 1)  # 1 for a TIFF that has been read: Pillow turns it then
            if turned != 1:
                found.getexif()[_ORIENTATION] = turned
                found = ImageOps.exif_transpose(found)
            return _opened(found, deep, framing)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = f"{Image.MAX_IMAGE_PIXELS:,} pixels"
        return f"{encoded} is larger than {limit}, possibly a decompression bomb; shrink it first"
    except UnidentifiedImageError:
        return f"{encoded} is not a readable image (known: {', '.join(_USUAL)} and others)"
    except Exception as error:  # decoders fail on hostile bytes in more ways than they document
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"{encoded} is not a readable image: {reason}"


def _opened(image: Image.Image, deep: int | None, framing: Framing) -> _Opened:
    """The image in its form; `deep` is the largest value of colours that were stored with 16 bits."""
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range; store it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image, deep = _eight_bit(image, framing.depth or FULL_DEPTH)
    elif image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode in _GREY else "RGB")
    if deep is None and framing.depth is not None and framing.depth < 8:
        image = Image.fromarray(scaled(np.asarray(image), framing.depth))
    if framing.channels is not None:
        image = image.convert("L" if framing.channels == 1 else "RGB")
    return _Opened(np.asarray(framing.apply(image)), deep)


def _wide_mode(image: Image.Image) -> str | None:
    """The raw mode of colours that a file stores in 16 bits, such as `RGB;16B`; None for all others."""
    for tile in getattr(image, "tile", ()) if image.mode not in _GREY else ():
        raw = tile[3][0] if isinstance(tile[3], tuple) else tile[3]
        if isinstance(raw, str) and ";16" in raw:
            return raw
    return None


def _eight_bit_colours(
    image: Image.Image, stream: io.BytesIO | Path, raw: str, depth: int | None
) -> tuple[Image.Image, int]:
    """Colours of 16 bits in 8, and the largest value that they may have. Pillow keeps the upper byte of each alone."""
    upper = np.asarray(image.convert("RGB"))
    deep = 256 * int(upper.max(initial=0)) + 255
    if depth is None or depth >= FULL_DEPTH:
        return Image.fromarray(upper), deep
    other = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[raw[-1]]
    if not raw.startswith("RGB"):
        raise ValueError(f"colours of {depth} bits cannot be read from {raw}; store it as RGB, or with 8 bits")
    if isinstance(stream, io.BytesIO):
        stream.seek(0)
    with Image.open(stream, formats=[str(image.format)]) as again:  # in the other order of bytes it is the lower one
        swapped = raw[:-1] + other
        tiles = [
            tile._replace(args=(swapped, *tile[3][1:]) if isinstance(tile[3], tuple) else swapped)
            for tile in getattr(again, "tile", ())
        ]
        setattr(again, "tile", tiles)  # noqa: B010  # the stubs of Pillow know it only of the files' classes
        lower = np.asarray(again.convert("RGB"))
    return Image.fromarray(scaled(upper.astype(np.int64) * 256 + lower, depth)), deep


def _eight_bit(image: Image.Image, depth: int) -> tuple[Image.Image, int]:
    """Mode L from a grey mode of more than 8 bits, the largest of whose values becomes 255; and the largest value."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels exceed 16 bits; store it with 8 or 16 bits")
    return Image.fromarray(scaled(values, depth)), int(values.max())


def scaled(values: NDArray[Any], depth: int) -> Pixels:
    """Numbers of so many bits as 8 bits, rounded."""
    top = 2**depth - 1
    if values.max(initial=0) > top:
        raise ValueError(f"its value {values.max()} does not fit into the {depth} bits of data.depth")
    result: Pixels = ((values.astype(np.int64) * 255 + top // 2) // top).astype(np.uint8)
    return result


def _as_rgb(pixels: Pixels) -> Pixels:
    return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels
