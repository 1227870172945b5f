"""A data set by name or path: `digits`, parquet, an image folder, or a name on the Hugging Face Hub."""

from __future__ import annotations

import functools
import importlib.resources
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from dualhead.data import cache
from dualhead.data.arrays import LabelledArrays, given_arrays, read_arrays
from dualhead.data.decode import FULL_DEPTH, Encoded, Framing, Resample, decode, decode_readable, unreadable
from dualhead.data.files import (
    LABELS,
    ArrayFiles,
    ImageFiles,
    Part,
    choose_part,
    choose_shared,
    find_files,
    refuse_several_folders,
)
from dualhead.data.given import GIVEN, held
from dualhead.data.names import in_order, one_form
from dualhead.data.split import Split, held_rows
from dualhead.data.stored import Encodings, Files, Rows, StoredImages, encoded_row, named_from
from dualhead.errors import UserError
from dualhead.noise import Streams

if TYPE_CHECKING:
    from datasets import Features

_IMAGE_NAMES: Final = ("image", "img")
_ROWS: Final = 1024  # read at once
_MANY_CLASSES: Final = 10_000  # a few rows may well have large labels, but not larger than this
_PROBED: Final = 64  # images, evenly spread, that tell whether a set on disk is grey
_DARK: Final = 64  # a set without a value as large may well hold fewer bits than 8
_LISTS: Final = frozenset({"List", "LargeList", "Sequence", "list", "Array2D", "Array3D"})
_ON_THE_HUB: Final = "hf:"
_LIKE_A_NAME: Final = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_TEST_SEED: Final = 0  # the test part is the same whatever the seed of a run

_log = logging.getLogger(__name__)

_SPOKEN: Final = {
    "cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "mnist": "ylecun/mnist",
    "fashionmnist": "zalando-datasets/fashion_mnist", "svhn": "ufldl-stanford/svhn:cropped_digits",
    "tinyimagenet": "zh-plus/tiny-imagenet",
}  # fmt: skip
"""Names of data sets as people say them, without - and _, and their names on the Hub."""

Choice = Literal["first", "sample"]


@dataclass(frozen=True)
class Storage:
    """Where the images of a set are while they are used.

    Args:
        stream: True: on disk, decoded when they are needed; False: decoded into memory; None: on disk if they would
            take more than `room` in memory.
        room: bytes; None: any number.
        workers: processes that decode streamed images; 0: the one that uses them decodes.
    """

    stream: bool | None = None
    room: int | None = None
    workers: int = 0

    def streams(self, count: int, shape: Callable[[], tuple[int, int, int]]) -> bool:
        """Whether so many images of such a shape stay on disk."""
        if self.stream is not None:
            return self.stream
        if self.room is None:
            return False
        size = count * math.prod(shape())
        if size > self.room:
            _log.info("%d images take %d bytes decoded, more than %d: read from disk", count, size, self.room)
        return size > self.room


def load_split(
    source: str,
    part: Part,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: Sequence[int] | None = None,
    crop: float | None = None,
    resample: Resample = "bicubic",
    squash: bool = False,
    channels: int | None = None,
    depth: int | None = None,
    skip_unreadable: bool = False,
    test: float | None = None,
    limit: int | None = None,
    choice: Choice = "first",
    storage: Storage = Storage(),
) -> Split:
    """One part of a data set, decoded; the second time from the cache (see `dualhead.data.cache`).

    Images that stay on disk are decoded whenever they are used, and nothing of them is cached, except that parquet is
    converted once to Arrow files in the cache's folder, from which single rows can be read.

    Args:
        source: one of:
            `digits`, 8x8 grey, embedded in the package;
            a folder of parquet files as on the Hub (`train-*.parquet`, `test-*.parquet`, at any depth), or one file;
            a folder that `datasets` saved (`save_to_disk`);
            a `.npz` file, or a folder of `.npz` or `.npy` files (see `dualhead.data.arrays`);
            an image folder (`train/CLASS/*.png`, `test/CLASS/*.png`);
            `given:DIGEST`, images that a program holds (see `dualhead.data.given`);
            the name of a data set on the Hugging Face Hub, `hf:uoft-cs/cifar10` or `hf:OWNER/NAME:CONFIG`.
            What exists as a path is taken as a path (`./digits` for a folder of that name). `OWNER/NAME` without
            `hf:` is a name on the Hub if there is neither such a path nor a folder `OWNER`.
        part: `train`, or `test`, which is the part called test, testing, validation, valid or val, in this order of
            preference, that has labels. A file or folder without parts is the train part unless its own name says
            otherwise.
        image_column: column of a table, or name of an array, that holds the images; None to find it.
        label_column: that which holds the labels: integers, whole floats, booleans or text; None to find it.
        image_size: height and width to which images are resized; None if they are equally large.
        crop: None to stretch images to `image_size`; else see `Framing`.
        resample: filter of resizing.
        squash: see `Framing`.
        channels: 1 or 3, to read colours as grey or grey as colours; None: as the images are.
        depth: bits of a pixel, where files hold fewer than they could (see `Framing`).
        skip_unreadable: leave out images that cannot be read, rather than refuse the set (see `Split.skipped`).
        test: how much of the train part is the test part where a set has none: a fraction, or a number of images,
            of all classes in proportion and always the same. The train part is the rest.
        limit: only so many images.
        choice: which: the first (an image folder is read class by class in turn), or a random sample of all, always
            the same, in the order of the set.
        storage: whether they are decoded into memory.

    Raises:
        UserError: one line that says what cannot be read, where, and what would be right.
    """
    if part not in get_args(Part):
        raise UserError(f"part {part!r} is not known; use one of {', '.join(get_args(Part))}")
    if limit is not None and limit < 1:
        raise UserError(f"data.limit must be at least 1, got {limit}")
    size = None if image_size is None else tuple(image_size)
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise UserError(f"data.image_size must be [height, width], both at least 1, got {list(size)}")
    if resample not in get_args(Resample):
        raise UserError(f"data.resample {resample!r} is not known; use one of {', '.join(get_args(Resample))}")
    if channels not in (None, 1, 3):
        raise UserError(f"data.channels must be 1 (grey) or 3 (colour), got {channels}")
    if depth is not None and not 1 <= depth <= FULL_DEPTH:
        raise UserError(f"data.depth must lie in 1 to {FULL_DEPTH} bits, got {depth}")
    framing = Framing(size, crop, resample, squash, channels, depth)
    options = _Options(part, image_column, label_column, framing, skip_unreadable, test, limit, choice)
    source = source if Path(source).exists() else name_on_hub(source) or source
    try:
        split = _from_source(source, options, storage)
    except UserError as error:
        raise UserError(f"data.source {source!r}: {error}") from None
    _warn_of(split, source, options)
    return split


def _warn_of(split: Split, source: str, options: _Options) -> None:
    """Words on images that were left out, and on a set that is so dark that it may hold fewer bits."""
    if split.skipped:
        more = "; ..." if len(split.skipped) > 3 else ""
        told = "; ".join(split.skipped[:3]) + more
        _log.warning("data.source %r: left out %d images that cannot be read: %s", source, len(split.skipped), told)
    if options.framing.depth is None:
        sample = torch.linspace(0, len(split) - 1, min(_PROBED, len(split))).round().long()
        largest = int(split.images[sample].max()) if split.is_stored else int(split.images[:].max())
        if largest < _DARK:
            _log.warning(
                "data.source %r: the largest value of all images is %d of 255, as where pixels have %d bits; if so, "
                "set data.depth=%d (evaluate, gallery, play: --depth)",
                source, largest, max(1, largest.bit_length()), max(1, largest.bit_length()),
            )  # fmt: skip


@dataclass(frozen=True)
class _Options:
    part: Part
    image_column: str | None
    label_column: str | None
    framing: Framing
    skip: bool
    test: float | None
    limit: int | None
    choice: Choice

    def chosen(self, labels: NDArray[np.int64], names: Sequence[str], *, shared: bool) -> NDArray[np.int64]:
        """Positions of the images that are used, of all that have these labels, in order.

        Args:
            labels: of all.
            names: of the classes.
            shared: they are the images of both parts.
        """
        rows: NDArray[np.int64] = np.arange(len(labels))
        if shared and self.test is not None:
            try:
                held = held_rows(torch.from_numpy(labels), names, self.test, _TEST_SEED, "test_part")
            except UserError as error:
                raise UserError(f"data.test: {error}") from None
            rows = (held if self.part == "test" else ~held).nonzero()[:, 0].numpy()
        count = len(rows) if self.limit is None else min(self.limit, len(rows))
        if self.choice == "first" or count == len(rows):
            return rows[:count]
        lot = Streams.of(0, torch.arange(len(rows))).fork("train_limit").bits(1)[:, 0]
        sample: NDArray[np.int64] = rows[np.sort(lot.argsort(stable=True)[:count].numpy())]
        return sample

    def for_cache(self) -> list[object]:
        """All that decides what is decoded, as plain values."""
        return [list(values) if isinstance(values, tuple) else values for values in astuple(self)]


def name_on_hub(source: str) -> str | None:
    """The Hub's name, with `hf:`, of a data set as people say it (`cifar10`, `CIFAR-10`); None for what is none."""
    found = _SPOKEN.get(re.sub("[-_ ]", "", source).lower())
    return None if found is None else f"{_ON_THE_HUB}{found}"


def path_of(source: str) -> Path | None:
    """The path that a source names, absolute; None for a name on the Hub.

    Raises:
        UserError: if it is neither.
    """
    if source == "digits":
        if Path(source).exists():
            _log.warning("digits is the set that the package brings; write ./digits for the folder of that name")
        return Path(str(importlib.resources.files("dualhead.data") / "digits"))
    if source.startswith(_ON_THE_HUB):
        return None
    path = Path(source).expanduser()
    if source and path.exists():
        return path.absolute()
    like_a_path = source.startswith(("/", ".", "~")) or source.endswith((".parquet", ".npz", ".npy", "/"))
    if like_a_path or not _LIKE_A_NAME.fullmatch(source):
        hub = "" if like_a_path or "/" in source or not source else f"; {_ON_THE_HUB}{source} is a name on the Hub"
        where = "" if path.is_absolute() or not source else f" in {Path.cwd()}"
        raise UserError(f"no such file or folder{where}{hub}")
    owner = source.partition("/")[0]
    if Path(owner).is_dir():
        raise UserError(
            f"no such file or folder in {owner}/; {_ON_THE_HUB}{source} is the data set of that name on the Hub"
        )
    return None


def resolve(source: str) -> str:
    """A source that means the same wherever it is used: that of a file or folder here becomes its absolute path."""
    if source == "digits" or source.startswith(_ON_THE_HUB) or not source:
        return source
    path = Path(source).expanduser()
    if not path.exists():
        return name_on_hub(source) or source
    if path.is_dir() and _LIKE_A_NAME.fullmatch(source):
        _tell_folder(source)
    return str(path.absolute())


@functools.cache
def _tell_folder(source: str) -> None:
    _log.warning("data.source %s: the folder here; %s%s is that of the Hub", source, _ON_THE_HUB, source)


def _cached(files: Sequence[Path], options: _Options, extra: object, make: Callable[[], Split]) -> Split:
    key = cache.key_of(files, [options.for_cache(), extra])
    split = cache.read(key)
    if split is None:
        split = make()
        cache.write(key, split)
    return split


def _from_source(source: str, options: _Options, storage: Storage) -> Split:
    if source.startswith(GIVEN):
        return _from_given(source, options, storage)
    path = path_of(source)
    return _from_hub(source, options, storage) if path is None else _from_path(path, options, storage)


def _from_given(source: str, options: _Options, storage: Storage) -> Split:
    given = held(source)
    named = given.parts.get(options.part)
    if isinstance(named, str):
        return _from_source(named if Path(named).exists() else name_on_hub(named) or named, options, storage)
    arrays = {part: content for part, content in given.parts.items() if not isinstance(content, str)}
    return _of_arrays(
        given_arrays(arrays, given.class_names, options.part, split_off=options.test is not None), options
    )


def _from_path(path: Path, options: _Options, storage: Storage) -> Split:
    found = find_files(path, options.part, split_off=options.test is not None, label_column=options.label_column)
    if isinstance(found, ImageFiles):
        return _from_images(path, found, options, storage)
    if isinstance(found, ArrayFiles):
        return _from_arrays(found, options, storage)
    if found.saved:
        return _from_tables({name: _saved(name, folder) for name, (folder,) in found.parts.items()}, options, storage)
    root = path.parent if path.is_file() else path
    return _from_tables({name: _parquet_part(root, name, f) for name, f in found.parts.items()}, options, storage)


def _from_images(root: Path, found: ImageFiles, options: _Options, storage: Storage) -> Split:
    chosen = options.chosen(np.asarray(found.labels), found.class_names, shared=found.shared).tolist()
    paths, labels = [found.files[n] for n in chosen], torch.tensor([found.labels[n] for n in chosen])

    def encoded() -> Iterator[Encoded]:
        return (Encoded(path, str(named_from(root, path)), None) for path in paths)

    if storage.streams(len(paths), lambda: _shape_like(next(encoded()), options)):
        return _stored(Files(root, paths), torch.arange(len(paths)), labels, found.class_names, options, storage)
    named = [found.class_names, found.labels]  # a list of files may have other labels for the same ones
    return _cached(found.all(), options, named, lambda: _in_memory(encoded(), labels, found.class_names, options))


def _from_arrays(found: ArrayFiles, options: _Options, storage: Storage) -> Split:
    if storage.stream:
        _log.warning("data.stream: images of numpy files are held in memory")
    arrays = read_arrays(
        found, options.part, options.image_column, options.label_column, split_off=options.test is not None
    )
    return _of_arrays(arrays, options)


def _of_arrays(arrays: LabelledArrays, options: _Options) -> Split:
    if not len(arrays.labels):
        raise UserError("holds no images")
    theirs = [] if arrays.others is None else [arrays.others]
    numbers, names = _classes([arrays.labels], theirs, arrays.class_names, "labels")
    _check_labels(numbers[0], len(names), lambda row: f"row {row} of its labels")
    chosen = options.chosen(numbers[0], names, shared=arrays.shared)
    images = arrays.images(chosen, options.framing)
    return Split(torch.from_numpy(images), torch.from_numpy(numbers[0][chosen]), tuple(names))


def _in_memory(encoded: Iterable[Encoded], labels: torch.Tensor, names: Sequence[str], options: _Options) -> Split:
    """Decoded images and their labels, without those that cannot be read, if these are to be skipped."""
    decoded = decode_readable(encoded, options.framing, skip=options.skip)
    if len(decoded.pixels) + len(decoded.unreadable) != len(labels):
        raise UserError(f"is damaged: {len(labels)} labels, but {len(decoded.pixels)} images")
    kept = _without(decoded.unreadable, labels, names)
    return Split(torch.from_numpy(decoded.pixels), labels[kept], tuple(names), tuple(decoded.unreadable.values()))


def _without(unreadable: Mapping[int, str], labels: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """Bool [N]: the images that can be read."""
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[list(unreadable)] = False
    gone = set(labels.tolist()) - set(labels[kept].tolist())
    if gone:
        raise UserError(f"class {names[min(gone)]!r} has no image that can be read: {next(iter(unreadable.values()))}")
    return kept


def _shape_like(first: Encoded, options: _Options) -> tuple[int, int, int]:
    """Three channels, and the height and width that images have: the given ones, else those of the first."""
    height, width = options.framing.size or decode([first], Framing(depth=FULL_DEPTH)).shape[2:]
    return options.framing.channels or 3, height, width


def _stored(
    encodings: Encodings, rows: torch.Tensor, labels: torch.Tensor, names: Sequence[str], options: _Options,
    storage: Storage,
) -> Split:  # fmt: skip
    """Images that stay on disk; a sample of them tells channels, size and depth."""
    skipped: dict[int, str] = {}
    if options.skip:
        _log.info("reading %d images to find those that cannot be read", len(rows))
        for first in range(0, len(rows), _ROWS):
            piece = encodings.read(rows[first : first + _ROWS].numpy())
            one_size = replace(options.framing, size=(1, 1), depth=options.framing.depth or FULL_DEPTH)
            skipped |= {first + n: reason for n, reason in unreadable(piece, one_size).items()}
        kept = _without(skipped, labels, names)
        rows, labels = rows[kept], labels[kept]
    probed = rows[torch.linspace(0, len(rows) - 1, min(_PROBED, len(rows)), dtype=torch.float64).round().long()]
    _, channels, height, width = decode(encodings.read(probed.numpy()), options.framing).shape
    images = StoredImages(encodings, rows, options.framing, (channels, height, width), storage.workers)
    return Split(images, labels, tuple(names), tuple(skipped.values()))


@dataclass(frozen=True)
class _Table:
    """Rows with features, from a parquet file or from the Hub.

    Args:
        name: for messages.
        rows: number of them.
        features: the columns with their types.
        read: the named column in pieces, as pyarrow arrays.
        folder: to which paths of images may be relative.
    """

    name: str
    rows: int
    features: Features
    read: Callable[[str], Iterator[Any]]
    folder: Path | None = None


@dataclass(frozen=True)
class _TablePart:
    """The tables of a part, opened when they are needed.

    Args:
        tables: one after the other.
        files: that hold them.
        rows_of: an image column of all of them as a `datasets.Dataset` that reads single rows.
    """

    tables: Callable[[], list[_Table]]
    files: Sequence[Path]
    rows_of: Callable[[str], Any]


def _from_tables(parts: Mapping[str, _TablePart], options: _Options, storage: Storage, extra: object = None) -> Split:
    labelled = _without_withheld_labels(parts, options)
    advice = f"name its files like {options.part}-00000.parquet, and give the folder that holds both"
    chosen, shared = choose_shared(labelled, options.part, advice, split_off=options.test is not None)
    other = None if shared else choose_part(labelled, "test" if options.part == "train" else "train")
    others = [] if other is None else parts[other].tables()
    reader = _TableReader(parts[chosen].tables(), others, options, shared, parts[chosen].rows_of)
    files = [*parts[chosen].files, *([] if other is None else parts[other].files)]
    return reader.read(files, [extra, chosen], storage)


def _without_withheld_labels(parts: Mapping[str, _TablePart], options: _Options) -> list[str]:
    """The parts, without a test part that has no labels, as ImageNet's says -1, if there is another to test on."""
    left = list(parts)
    while (test := choose_part(left, "test")) and choose_part(rest := [p for p in left if p != test], "test"):
        how = _withheld(parts[test].tables(), options)
        if how is None:
            break
        _log.warning("its %s part has no labels%s: the %s part is used", test, how, choose_part(rest, "test"))
        left = rest
    return left


def _withheld(tables: Sequence[_Table], options: _Options) -> str | None:
    """How tables say that they have no labels; None if they have some."""
    try:
        column = _label_column(tables[0].features, options.label_column)
    except UserError:
        return ""
    pieces = [piece for table in tables for piece in table.read(column)]
    if all(piece.null_count == len(piece) for piece in pieces):
        return ""
    return " (-1)" if all(value == -1 for piece in pieces for value in piece.to_pylist()) else None


def _parquet_part(root: Path, name: str, files: tuple[Path, ...]) -> _TablePart:
    def tables() -> list[_Table]:
        refuse_several_folders(root, name, files)
        return [_parquet(path) for path in files]

    return _TablePart(tables, files, lambda column: _arrow(files, column))


def _saved(name: str, folder: Path) -> _TablePart:
    """A part that `datasets` saved to a folder."""
    import datasets

    @functools.cache
    def loaded() -> Any:
        try:
            return datasets.load_from_disk(str(folder))
        except Exception as error:  # JSON of any shape and damaged Arrow files fail in as many ways
            raise UserError(f"{folder.name}/ is not a readable folder of `save_to_disk`: {_one_line(error)}") from None

    files = sorted(path for path in folder.iterdir() if path.is_file())
    return _TablePart(lambda: [_dataset_table(name, loaded(), folder)], files, lambda _: loaded())


def _arrow(files: tuple[Path, ...], column: str) -> Any:  # datasets has no types
    """The rows of a part as a data set of Arrow files, which are made the first time."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        paths = [str(path) for path in files]
        place = cache.folder() / "arrow" / cache.key_of(files, column)  # other files of the same names are others
        return datasets.Dataset.from_parquet(paths, columns=[column], cache_dir=str(place))
    except Exception as error:  # of several libraries: a damaged file, a full disk
        cause = error.__cause__ or error
        raise UserError(
            f"{files[0].parent.name}/ cannot be converted for reading single rows: {type(cause).__name__}: "
            f"{_one_line(cause)}"
        ) from None
    finally:
        if shown:
            datasets.enable_progress_bars()


def _parquet(path: Path) -> _Table:
    from datasets import Features
    from pyarrow import parquet

    def read(column: str) -> Iterator[Any]:
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(_ROWS, columns=[column]):
                    yield batch.column(0)
        except Exception as error:  # what is damaged inside comes out as errors of several libraries
            raise _damaged(path, error) from None

    try:
        schema, rows = parquet.read_schema(path), parquet.read_metadata(path).num_rows
    except Exception as error:
        raise _damaged(path, error) from None
    if b"names_file" in (schema.metadata or {}).get(b"huggingface", b""):
        raise UserError(f"{path.name} takes its class names from a file that it names; store the names instead")
    try:
        features = Features.from_arrow_schema(schema)
    except Exception as error:  # JSON of any shape may stand there, and fails in as many ways
        fault = f"{path.name} describes its columns in a way that cannot be read"
        raise UserError(f"{fault} (metadata 'huggingface': {type(error).__name__}: {_one_line(error)})") from None
    return _Table(path.name, rows, features, read, path.parent)


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path.name} is not a readable parquet file: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())


def _from_hub(source: str, options: _Options, storage: Storage) -> Split:
    from datasets import load_dataset

    name, _, config = source.removeprefix(_ON_THE_HUB).partition(":")
    asked = source.startswith(_ON_THE_HUB)
    try:
        loaded = load_dataset(name, config or None)
    except Exception as error:  # the Hub client raises errors of several libraries
        fault = "the Hugging Face Hub does not give it"
        if not asked:
            fault = "no such file or folder, and the Hugging Face Hub does not give it either"
        raise UserError(f"{fault}: {type(error).__name__}: {_one_line(error)}") from None
    if not asked:
        _log.warning("data.source %s: no such folder here, taken from the Hugging Face Hub", source)

    def part(name: str, dataset: Any) -> _TablePart:
        files = [Path(entry["filename"]) for entry in dataset.cache_files]
        return _TablePart(lambda: [_dataset_table(name, dataset, None)], files, lambda _: dataset)

    parts = {name: part(name, dataset) for name, dataset in loaded.items()}
    return _from_tables(parts, options, storage, source.removeprefix(_ON_THE_HUB))


def _dataset_table(part: str, dataset: Any, folder: Path | None) -> _Table:  # datasets has no types
    def read(column: str) -> Iterator[Any]:
        for table in dataset.select_columns([column]).with_format("arrow").iter(_ROWS):
            yield from table.column(0).chunks

    return _Table(f"its {part} part", dataset.num_rows, dataset.features, read, folder)


@dataclass(frozen=True)
class _TableReader:
    """Images and labels in the rows of tables.

    Args:
        tables: of the part, one after the other.
        others: of the other part; its labels count where classes have no names.
        options: which images, and how.
        shared: the tables are those of both parts.
        rows_of: an image column of the part as a `datasets.Dataset` that reads single rows.
    """

    tables: Sequence[_Table]
    others: Sequence[_Table]
    options: _Options
    shared: bool
    rows_of: Callable[[str], Any]

    def read(self, files: Sequence[Path], extra: object, storage: Storage) -> Split:
        """The split; in memory it is cached under the files and what else names it."""
        chosen, numbers, names = self._labelled()
        if storage.streams(len(chosen), self._shape):
            return self._stored(chosen, numbers, names, storage)
        return _cached(files, self.options, [extra, names], lambda: self._decoded(chosen, numbers, names))

    def _columns(self) -> tuple[str, str]:
        first = self.tables[0]
        image = _image_column(first.features, self.options.image_column)
        label = _label_column(first.features, self.options.label_column)
        for table in self.tables[1:]:
            if table.features.get(image) != first.features[image] or table.features.get(label) != first.features[label]:
                raise UserError(f"{table.name} and {first.name} differ in the type of column {image!r} or {label!r}")
        return image, label

    def _shape(self) -> tuple[int, int, int]:
        image, _ = self._columns()
        return _shape_like(next(row for table in self.tables for row in _encoded(table, image)), self.options)

    def _labelled(self) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str]]:
        """Rows that are used, their labels, and the names of the classes."""
        first, (_, label) = self.tables[0], self._columns()
        if not sum(table.rows for table in self.tables):
            raise UserError(f"{first.name} has no rows")
        found = [_labels(table, label) for table in self.tables]
        # Where classes have no names, those of either part count, so that both have the same.
        named = getattr(first.features[label], "names", None)
        theirs = [] if named else [_labels(table, label) for table in self.others if label in table.features]
        labels, names = _classes(found, theirs, named, label)
        if len(names) < 2:
            raise UserError(f"column {label!r} has {len(names)} class; a classifier needs at least 2")
        numbers = np.concatenate(labels)
        if not self.shared:
            chosen = self.options.chosen(numbers, names, shared=False)
            _check_labels(numbers[chosen], len(names), lambda row: _place(self.tables, int(chosen[row])))
            return chosen, numbers[chosen], names
        _check_labels(numbers, len(names), lambda row: _place(self.tables, row))
        chosen = self.options.chosen(numbers, names, shared=True)
        return chosen, numbers[chosen], names

    def _decoded(self, chosen: NDArray[np.int64], numbers: NDArray[np.int64], names: list[str]) -> Split:
        image, _ = self._columns()
        used = np.zeros(chosen[-1] + 1, np.bool_)  # what comes after the last one is not even read
        used[chosen] = True
        encoded = (row for table in self.tables for row in _encoded(table, image))
        try:
            return _in_memory(compress(encoded, used), torch.from_numpy(numbers), names, self.options)
        except UserError as error:
            if str(error).startswith("is damaged"):
                raise UserError(f"{self.tables[0].name} {error}") from None
            raise

    def _stored(
        self, chosen: NDArray[np.int64], numbers: NDArray[np.int64], names: list[str], storage: Storage
    ) -> Split:
        image, _ = self._columns()
        tables = [(table.name, table.rows, table.folder) for table in self.tables]
        rows, labels = Rows(self.rows_of(image), image, tables), torch.from_numpy(numbers)
        return _stored(rows, torch.from_numpy(chosen), labels, names, self.options, storage)


def _classes(
    labels: Sequence[NDArray[Any]], theirs: Sequence[NDArray[Any]], named: Sequence[str] | None, column: str
) -> tuple[list[NDArray[np.int64]], list[str]]:
    """Labels as numbers of classes, and the names of these.

    Args:
        labels: numbers or text of the part.
        theirs: of the other part; both have the same classes.
        named: the names, if they are known.
        column: for messages.
    """
    kinds = {values.dtype.kind in "OU" for values in labels}
    theirs = [values for values in theirs if (values.dtype.kind in "OU") in kinds]
    if kinds == {False}:
        numbers = [_whole(values, column) for values in labels]
        if named is not None:
            return numbers, list(named)
        if all(values.dtype.kind == "b" for values in labels):
            return numbers, ["False", "True"]
        return numbers, _numbered_classes([*numbers, *(_whole(values, column) for values in theirs)], column)
    texts = [[one_form(str(value)) for value in values.tolist()] for values in labels]
    found = {name for part in texts for name in part} | {one_form(str(v)) for p in theirs for v in p.tolist()}
    names = in_order(found) if named is None else list(named)
    if strange := sorted(found - set(names)):
        told = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise UserError(f"{column}: {strange[0]!r} is none of the class names ({told}); name all classes")
    number = {name: place for place, name in enumerate(names)}
    return [np.array([number[name] for name in part], np.int64) for part in texts], names


def _whole(values: NDArray[Any], column: str) -> NDArray[np.int64]:
    if values.dtype.kind == "f" and not (whole := (values == np.round(values)) & np.isfinite(values)).all():
        strange = values[~whole][0]
        raise UserError(f"column {column!r} holds numbers such as {strange:g}: labels are whole numbers, or text")
    return values.astype(np.int64)


def _numbered_classes(labels: Sequence[NDArray[np.int64]], column: str) -> list[str]:
    largest = max(int(numbers.max(initial=-1)) for numbers in labels)
    if largest >= max(_MANY_CLASSES, sum(map(len, labels))):
        raise UserError(f"column {column!r} holds numbers up to {largest}, more than there are rows: not class labels")
    seen = np.unique(np.concatenate([numbers[numbers >= 0] for numbers in labels]))
    missing = sorted(set(range(largest + 1)) - set(seen.tolist()))
    if missing == [0]:
        _log.warning("column %r: no image has label 0; counted from 0 to %d, class 0 has none", column, largest)
    elif missing:
        _log.warning(
            "column %r: labels go from 0 to %d, and no image has %s: %d classes, of which %d have images; store the "
            "names of classes as text if there are no others", column, largest, _few_numbers(missing), largest + 1,
            len(seen),
        )  # fmt: skip
    return [str(number) for number in range(largest + 1)]


def _few_numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:6])) + (f" and {len(numbers) - 6} more" if len(numbers) > 6 else "")


def _labels(table: _Table, column: str) -> NDArray[Any]:
    """Numbers, or text as objects."""
    pieces: list[NDArray[Any]] = []
    for piece in table.read(column):
        if piece.null_count:
            row = sum(map(len, pieces)) + piece.is_null().to_pylist().index(True)
            raise UserError(f"row {row} of {table.name} has no label; every image needs one")
        whole = piece.dictionary_decode() if hasattr(piece, "dictionary_decode") else piece
        values = whole.to_numpy(zero_copy_only=False)
        if values.dtype.kind == "O" and len(values) and not isinstance(values[0], str):
            raise UserError(f"column {column!r} holds several labels of an image; a classifier needs one of each")
        pieces.append(values)
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


def _check_labels(numbers: NDArray[np.int64], num_classes: int, place: Callable[[int], str]) -> None:
    wrong = ((numbers < 0) | (numbers >= num_classes)).nonzero()[0]
    if len(wrong):
        number = numbers[wrong[0]]
        hint = " (-1 often marks a part without labels)" if number == -1 else ""
        allowed = f"labels must lie in 0..{num_classes - 1}"
        raise UserError(f"{place(int(wrong[0]))} has label {number}{hint}; {allowed}")


def _place(tables: Iterable[_Table], row: int) -> str:
    """The table that a row of all lies in, and its number there."""
    for table in tables:
        if row < table.rows:
            return f"row {row} of {table.name}"
        row -= table.rows
    raise IndexError(row)


def _encoded(table: _Table, column: str) -> Iterator[Encoded]:
    row = 0
    for piece in table.read(column):
        for value in piece.to_pylist():
            yield encoded_row(value, table.name, row, table.folder)
            row += 1


def _image_column(features: Features, named: str | None) -> str:
    from datasets import Image

    def fits(name: str, feature: object) -> bool:
        plain = isinstance(feature, dict) and "bytes" in feature  # an image column whose metadata were lost
        kind = getattr(feature, "dtype", None)
        paths = name == named and kind in ("string", "large_string")
        return isinstance(feature, Image) or plain or paths or kind in ("binary", "large_binary")

    candidates = [name for name, feature in features.items() if fits(name, feature)]
    return _choose_column(features, candidates, _IMAGE_NAMES, named, "image")


def _label_column(features: Features, named: str | None) -> str:
    from datasets import ClassLabel

    def fits(name: str, feature: object) -> bool:
        kind = str(getattr(feature, "dtype", ""))
        plain = "int" in kind or kind in ("bool", "string", "large_string") or "float" in kind
        return isinstance(feature, ClassLabel) or (plain and (name == named or name in LABELS))

    likely = [name for name, feature in features.items() if fits(name, feature)]
    return _choose_column(features, likely, LABELS, named, "label")


def _choose_column(
    features: Features, candidates: list[str], usual: Sequence[str], named: str | None, what: str
) -> str:
    """The column named; else the one candidate with a usual name; else the only candidate."""
    listed = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())
    key = f"data.{what}_column"
    holds = "encoded images" if what == "image" else "labels: integers from 0 on, or text"
    if named is not None:
        if named not in features:
            raise UserError(f"{key}: there is no column {named!r}; there are: {listed}")
        if named not in candidates:
            raise UserError(f"{key}: column {named!r} cannot be used, it must hold {holds}; there are: {listed}")
        return named
    known = [name for name in candidates if name in usual] or candidates
    lists = [name for name in features if name in usual and _type_name(features[name]) in _LISTS]
    if not known and lists:
        holds, advice = "several labels of an image", "a classifier needs one of each"
        if what == "image":
            holds, advice = "pixels in lists", "store encoded images, or arrays in a .npz file"
        raise UserError(f"column {lists[0]!r} holds {holds}; {advice}, or set {key}; there are: {listed}")
    if len(known) != 1:
        fault = f"no {what} column was found" if not known else f"the {what} column is not clear ({' or '.join(known)})"
        option = f"(evaluate, gallery, play: --{what}-column)"
        raise UserError(f"{fault}; set {key} to a column of {holds} {option}; there are: {listed}")
    return known[0]


def _type_name(feature: object) -> str:
    name = type(feature).__name__
    return str(getattr(feature, "dtype", name)) if name == "Value" else name
