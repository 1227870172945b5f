"""Images and labels in files of numpy: `.npz`, or `.npy` files in one folder."""

from __future__ import annotations

import functools
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from dualhead.data.decode import FULL_DEPTH, Framing, Pixels, frame, refuse_unused_bits, scaled
from dualhead.data.files import ArrayFiles, Part, choose_shared, said_part
from dualhead.data.names import one_form
from dualhead.errors import UserError

_IMAGE_WORDS: Final = frozenset("x image images img imgs data pixels".split())  # noqa: SIM905  # one line reads better
_LABEL_WORDS: Final = frozenset("y label labels target targets".split())  # noqa: SIM905  # likewise
_NAME_KEYS: Final = frozenset({"class_names", "classes", "label_names", "names"})
_LARGEST_RATIO: Final = 1000  # bytes that one byte of a compressed file may become; black images reach some hundreds
_ROUNDING: Final = 1e-3  # what arithmetic may leave of floats beyond [0, 1]


@dataclass(frozen=True)
class _Array:
    """An array in a file: its name, its header, and a way to read its first rows."""

    key: str
    part: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[int], NDArray[Any]]


@dataclass(frozen=True)
class LabelledArrays:
    """Images and labels of a part.

    Args:
        shared: they are those of both parts.
        labels: numbers [N], or text.
        others: the labels of the other part, if there is one.
        class_names: as the file has them; None if it has none.
        images: uint8 [N, C, H, W] of some rows, in order, in the form that is asked for.
    """

    shared: bool
    labels: NDArray[Any]
    others: NDArray[Any] | None
    class_names: list[str] | None
    images: Callable[[NDArray[np.int64], Framing], Pixels]


def read_arrays(
    found: ArrayFiles, part: Part, image_key: str | None, label_key: str | None, *, split_off: bool
) -> LabelledArrays:
    """Find the arrays of a part by their names: `x_train`, `test_images`, `image` and `label`, and the like.

    Args:
        found: the files.
        part: which.
        image_key: name of the array of images, with or without the word for the part; None to find it.
        label_key: that of the labels.
        split_off: the test part is a share of the train part.

    Raises:
        UserError: if they are not there, or would have to be unpickled.
    """
    arrays = [array for file in found.files for array in _arrays_in(file, found.own)]
    named = [array for array in arrays if array.key.lower() in _NAME_KEYS and array.dtype.kind in "US"]
    arrays = [array for array in arrays if array not in named]
    if not arrays:
        raise UserError("holds no arrays")
    parts = {array.part for array in arrays}
    advice = "name its arrays x_train, y_train, x_test and y_test, or its files train.npz and test.npz"
    chosen, shared = choose_shared(parts, part, advice, split_off=split_off)
    images, labels = _pair([array for array in arrays if array.part == chosen], image_key, label_key)
    others, columns = None, _columns(labels)
    if not shared:
        for name in sorted(parts - {chosen}):
            try:
                theirs = _pair([array for array in arrays if array.part == name], image_key, label_key)[1]
                others, columns = _flat(theirs), columns or _columns(theirs)
            except UserError:
                continue  # a part without labels says nothing of classes
    own = _flat(labels)
    named = [array for array in named if len(array.shape) == 1 and not _one_each(array, own)]
    if named:
        columns = [one_form(str(name)) for name in named[0].read(named[0].shape[0]).tolist()]
    return LabelledArrays(shared, own, others, columns, lambda rows, framing: _framed(images, rows, framing))


def given_arrays(
    given: Mapping[str, tuple[NDArray[Any], NDArray[Any]]],
    class_names: Sequence[str] | None,
    part: Part,
    *,
    split_off: bool,
) -> LabelledArrays:
    """Treat arrays in memory as `read_arrays` does those of a file, so that both give the same images.

    Args:
        given: images and labels of each part.
        class_names: in the order of the labels; None for numbers.
        part: which.
        split_off: the test part is a share of the train part.

    Raises:
        UserError: if they are no labelled images.
    """
    advice = "give test= too, or set data.test to the share of the training images that is kept for it"
    chosen, shared = choose_shared(set(given), part, advice, split_off=split_off)
    images = _in_memory(f"{chosen} images", chosen, given[chosen][0])
    labels = _in_memory(f"{chosen} labels", chosen, given[chosen][1])
    if len(images.shape) < 3 or not labels.shape or images.shape[0] != labels.shape[0]:
        raise UserError(
            f"array {images.key!r} has shape {list(images.shape)}, and {labels.key!r} {list(labels.shape)}; right are "
            "images [N, C, H, W] and labels [N]"
        )
    others = [_in_memory(f"{name} labels", name, given[name][1]) for name in sorted(given) if name != chosen]
    columns = [found for array in (labels, *others) if (found := _columns(array)) is not None]
    names = next(iter(columns), None) if class_names is None else [one_form(name) for name in class_names]
    return LabelledArrays(
        shared, _flat(labels), _flat(others[0]) if others and not shared else None, names,
        lambda rows, framing: _framed(images, rows, framing),
    )  # fmt: skip


def _in_memory(key: str, part: str, values: NDArray[Any]) -> _Array:
    return _Array(key, part, values.shape, values.dtype, lambda rows: values[:rows] if values.ndim else values)


def _arrays_in(file: Path, own: str) -> Iterable[_Array]:
    word = said_part(file.stem) or own
    with _readable(file):
        if file.suffix.lower() == ".npy":
            yield _described(file, file.stem, word, lambda: file.open("rb"))
            return
        with zipfile.ZipFile(file) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
            unpacked = sum(entry.file_size for entry in entries)
            if unpacked > _LARGEST_RATIO * file.stat().st_size + 2**20:
                raise UserError(
                    f"{file.name} unpacks to {unpacked:,} bytes from {file.stat().st_size:,}, possibly a decompression "
                    "bomb"
                )
        for entry in entries:
            key = entry.filename.removesuffix(".npy")
            yield _described(file, key, said_part(key) or word, functools.partial(_Member, file, entry.filename))


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Tell of a damaged file in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # what is damaged comes out as errors of several libraries
        reason = " ".join((str(error) or type(error).__name__).split())
        raise UserError(f"{file.name} is not a readable file of numpy: {reason}") from None


class _Member:
    """A file in an archive, which is closed with it."""

    def __init__(self, archive: Path, name: str) -> None:
        self._archive = zipfile.ZipFile(archive)
        self._file = self._archive.open(name)

    def __enter__(self) -> IO[bytes]:
        return self._file

    def __exit__(self, *raised: object) -> None:
        self._file.close()
        self._archive.close()


def _described(place: Path, key: str, part: str, opened: Callable[[], Any]) -> _Array:
    with opened() as file:
        shape, by_column, dtype = _header(file)
    if dtype.hasobject:
        raise UserError(f"array {key!r} holds Python objects, and reading it would run code; store it as numbers")

    def read(rows: int) -> NDArray[Any]:
        with _readable(place), opened() as file:
            _header(file)
            wanted = shape if by_column or not shape else (rows, *shape[1:])
            size = int(np.prod(wanted, dtype=np.int64)) * dtype.itemsize
            content = file.read(size)
            if len(content) < size:
                raise UserError(f"{place.name} is cut off: array {key!r} has {len(content):,} of {size:,} bytes")
        array = np.frombuffer(content, dtype).reshape(wanted, order="F" if by_column else "C")
        return array[:rows] if shape else array

    return _Array(key, part, shape, dtype, read)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise UserError(f"its format of numpy {version} is not known")
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return reader(file)


def _pair(arrays: Sequence[_Array], image_key: str | None, label_key: str | None) -> tuple[_Array, _Array]:
    images = _choose(arrays, image_key, _IMAGE_WORDS, "image", lambda array: len(array.shape) in (3, 4))
    labels = _choose(
        [array for array in arrays if array is not images], label_key, _LABEL_WORDS, "label",
        lambda array: len(array.shape) in (1, 2) and array.shape[0] == images.shape[0],
    )  # fmt: skip
    if images.shape[0] != labels.shape[0]:
        raise UserError(
            f"array {images.key!r} holds {images.shape[0]} images, and {labels.key!r} {labels.shape[0]} labels"
        )
    return images, labels


def _choose(
    arrays: Sequence[_Array], named: str | None, words: frozenset[str], what: str, fits: Callable[[_Array], bool]
) -> _Array:
    """The array named; else the only one with a usual name; else the only one of a shape that fits."""
    told = ", ".join(f"{array.key} {array.dtype} {list(array.shape)}" for array in arrays) or "none"
    if named is not None:
        found = [array for array in arrays if named in (array.key, _without_part(array.key))]
        if len(found) != 1:
            raise UserError(f"data.{what}_column: there is no array {named!r}; there are: {told}")
        return found[0]
    usual = [array for array in arrays if words & set(re.split(r"[^a-z]+", array.key.lower()))]
    found = usual or [array for array in arrays if fits(array)]
    if len(found) != 1:
        raise UserError(
            f"which array holds the {what}s is not clear; set data.{what}_column (evaluate, gallery, play: "
            f"--{what}-column) to one of: {told}"
        )
    return found[0]


def _without_part(key: str) -> str:
    word = said_part(key)
    return key if word is None else re.sub(rf"_?{word}_?", "", key, flags=re.IGNORECASE)


def _flat(array: _Array) -> NDArray[Any]:
    """Labels [N] from numbers or text [N] or [N, 1], or from rows of which one entry is 1 [N, K]."""
    values = array.read(array.shape[0] if array.shape else 1)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim == 2 and values.dtype.kind in "iufb":
        if not (np.isin(values, (0, 1)).all() and (values.sum(1) == 1).all()):
            raise UserError(f"array {array.key!r} gives several labels to an image, and a classifier needs one of each")
        values = values.argmax(1)
    if values.ndim != 1:
        raise UserError(f"array {array.key!r} has shape {list(values.shape)}; labels are [N]")
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")
    return values


def _one_each(names: _Array, labels: NDArray[Any]) -> bool:
    """Whether names are those of the images, such as of their files: as many, and more than there are classes."""
    numbers = labels.dtype.kind in "iu"
    classes = int(labels.max(initial=-1)) + 1 if numbers else len(np.unique(labels))
    return names.shape[0] == len(labels) > classes


def _columns(array: _Array) -> list[str] | None:
    """The classes that labels have columns for [N, K], by number: also one without an image; None for others."""
    return [str(column) for column in range(array.shape[1])] if len(array.shape) == 2 and array.shape[1] > 1 else None


def _framed(array: _Array, rows: NDArray[np.int64], framing: Framing) -> Pixels:
    values = _channels_last(array.read(int(rows[-1]) + 1)[rows], array.key)
    return frame(_eight_bits(values, array.key, framing), framing)


def _channels_last(values: NDArray[Any], key: str) -> NDArray[Any]:
    """[N, H, W, C] from [N, H, W], [N, H, W, C] or [N, C, H, W]."""
    if values.ndim == 3:
        return values[..., None]
    if values.ndim != 4:
        raise UserError(
            f"array {key!r} has shape {list(values.shape)}; images are [N, H, W], [N, H, W, C] or [N, C, H, W]"
        )
    first, last = values.shape[1] in (1, 3), values.shape[3] in (1, 3)
    if first == last:
        fault = "either axis could be" if first else "neither axis can be"
        raise UserError(f"array {key!r} has shape {list(values.shape)}: {fault} the 1 or 3 channels")
    return values.transpose(0, 2, 3, 1) if first else values


def _eight_bits(values: NDArray[Any], key: str, framing: Framing) -> Pixels:
    """Uint8 from numbers of other types; floats are taken for [0, 1], or for 0 to 255 if all are whole."""
    if values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        if low >= -_ROUNDING and high <= 1 + _ROUNDING:
            return (values.clip(0, 1).astype(np.float64) * 255).round().astype(np.uint8)
        if not (low >= 0 and high <= 255 and bool((values == values.round()).all())):
            raise UserError(
                f"array {key!r} holds floats from {low:.4g} to {high:.4g}; images are floats in [0, 1], or whole "
                "numbers from 0 to 255: undo a normalisation before you store them"
            )
        values = values.astype(np.uint8)
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "iu":
        raise UserError(f"array {key!r} holds {values.dtype}; images are numbers")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise UserError(f"array {key!r} holds numbers from {low} to {high}; images have 8 or 16 bits")
    if values.dtype.itemsize == 1 or (high <= 255 and values.dtype.itemsize > 2):
        depth = min(framing.depth or 8, 8)
    else:
        if framing.depth is None:
            refuse_unused_bits(high, f"array {key!r}")
        depth = framing.depth or FULL_DEPTH
    if depth == 8 and high <= 255:
        return values.astype(np.uint8)
    try:
        return scaled(values, depth)
    except ValueError as error:
        raise UserError(f"array {key!r}: {error}") from None
