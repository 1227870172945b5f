"""A data set by name or path: `digits`, parquet, an image folder, or a name on the Hugging Face Hub."""

from __future__ import annotations

import importlib.resources
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from dualhead.data import cache
from dualhead.data.decode import Encoded, Framing, decode
from dualhead.data.files import ImageFiles, ParquetFiles, Part, choose_part, find_files, no_part
from dualhead.data.split import Split
from dualhead.data.stored import Encodings, Files, Rows, StoredImages, encoded_row
from dualhead.errors import UserError
from dualhead.noise import Streams

if TYPE_CHECKING:
    from datasets import Features

_IMAGE_NAMES: Final = ("image", "img")
_LABEL_NAMES: Final = ("label", "labels", "fine_label", "class", "target")
_ROWS: Final = 1024  # read at once
_MANY_CLASSES: Final = 10_000  # a few rows may well have large labels, but not larger than this
_PROBED: Final = 64  # images, evenly spread, that tell whether a set on disk is grey

_log = logging.getLogger(__name__)

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
            an image folder (`train/CLASS/*.png`, `test/CLASS/*.png`);
            the name of a data set on the Hugging Face Hub, `uoft-cs/cifar10` or `OWNER/NAME:CONFIG`.
            What exists as a path is taken as a path (`./digits` for a folder of that name).
        part: `train`, or `test`, which is the part called test, validation, valid or val, in this order of preference.
            A file or folder without parts is the train part unless its own name says otherwise.
        image_column: column of a table that holds the images; None to find it by its type and name.
        label_column: column that holds the labels, integers; None to find it.
        image_size: height and width to which images are resized; None if they are equally large.
        crop: None to stretch images to `image_size`; else see `Framing`.
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
    options = _Options(part, image_column, label_column, size, crop, limit, choice)
    try:
        path = _path(source)
        return _from_hub(source, options, storage) if path is None else _from_path(path, options, storage)
    except UserError as error:
        raise UserError(f"data.source {source!r}: {error}") from None


@dataclass(frozen=True)
class _Options:
    part: Part
    image_column: str | None
    label_column: str | None
    image_size: tuple[int, int] | None
    crop: float | None
    limit: int | None
    choice: Choice

    @property
    def framing(self) -> Framing:
        return Framing(self.image_size, self.crop)

    def chosen(self, total: int) -> NDArray[np.int64]:
        """Positions of the images that are used, of so many, in order."""
        count = total if self.limit is None else min(self.limit, total)
        if self.choice == "first" or count == total:
            return np.arange(count)
        lot = Streams.of(0, torch.arange(total)).fork("train_limit").bits(1)[:, 0]
        return np.sort(lot.argsort(stable=True)[:count].numpy())


def _path(source: str) -> Path | None:
    """The path that a source names; None for a name on the Hub."""
    if source == "digits":
        return Path(str(importlib.resources.files("dualhead.data") / "digits"))
    path = Path(source).expanduser()
    if source and path.exists():
        return path.absolute()
    like_a_path = source.startswith(("/", ".", "~")) or source.count("/") > 1 or source.endswith((".parquet", "/"))
    if like_a_path or not source:
        raise UserError("no such file or folder")
    return None


def _cached(files: Sequence[Path], options: _Options, extra: object, make: Callable[[], Split]) -> Split:
    key = cache.key_of(files, [vars(options), extra])
    split = cache.read(key)
    if split is None:
        split = make()
        cache.write(key, split)
    return split


def _from_path(path: Path, options: _Options, storage: Storage) -> Split:
    found = find_files(path, options.part)
    if isinstance(found, ImageFiles):
        return _from_images(path, found, options, storage)
    tables, others = [_parquet(path) for path in found.part], [_parquet(path) for path in found.other]
    reader = _TableReader(tables, others, options, lambda column: _arrow(found, column))
    return reader.read(found.all(), None, storage)


def _from_images(root: Path, found: ImageFiles, options: _Options, storage: Storage) -> Split:
    chosen = options.chosen(len(found.files)).tolist()
    paths, labels = [found.files[n] for n in chosen], torch.tensor([found.labels[n] for n in chosen])

    def encoded() -> Iterator[Encoded]:
        return (Encoded(path, str(path.relative_to(root)), None) for path in paths)

    if storage.streams(len(paths), lambda: _shape_like(next(encoded()), options)):
        return _stored(Files(root, paths), torch.arange(len(paths)), labels, found.class_names, options, storage)
    return _cached(
        found.all(), options, found.class_names,
        lambda: Split(torch.from_numpy(decode(encoded(), options.framing)), labels, found.class_names),
    )  # fmt: skip


def _shape_like(first: Encoded, options: _Options) -> tuple[int, int, int]:
    """Three channels, and the height and width that images have: the given ones, else those of the first."""
    height, width = options.image_size or decode([first]).shape[2:]
    return 3, height, width


def _stored(
    encodings: Encodings, rows: torch.Tensor, labels: torch.Tensor, names: Sequence[str], options: _Options,
    storage: Storage,
) -> Split:  # fmt: skip
    """Images that stay on disk; a sample of them tells channels and size."""
    probed = rows[torch.linspace(0, len(rows) - 1, min(_PROBED, len(rows)), dtype=torch.float64).round().long()]
    _, channels, height, width = decode(encodings.read(probed.numpy()), options.framing).shape
    images = StoredImages(encodings, rows, options.framing, (channels, height, width), storage.workers)
    return Split(images, labels, tuple(names))


@dataclass(frozen=True)
class _Table:
    """Rows with features, from a parquet file or from the Hub.

    Args:
        name: for messages.
        rows: number of them.
        features: the columns with their types.
        read: the named column in pieces, as pyarrow arrays.
    """

    name: str
    rows: int
    features: Features
    read: Callable[[str], Iterator[Any]]


def _arrow(found: ParquetFiles, column: str) -> Any:  # datasets has no types
    """The rows of a part as a data set of Arrow files, which are made the first time."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        paths = [str(path) for path in found.part]
        place = cache.folder() / "arrow" / cache.key_of(found.part, column)  # other files of the same names are others
        return datasets.Dataset.from_parquet(paths, columns=[column], cache_dir=str(place))
    except Exception as error:  # of several libraries: a damaged file, a full disk
        cause = error.__cause__ or error
        raise UserError(
            f"{found.part[0].parent.name}/ cannot be converted for reading single rows: {type(cause).__name__}: "
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
    return _Table(path.name, rows, features, read)


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path.name} is not a readable parquet file: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())


def _from_hub(source: str, options: _Options, storage: Storage) -> Split:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        loaded = load_dataset(name, config or None)
    except Exception as error:  # the Hub client raises errors of several libraries
        fault = "no such file or folder, and the Hugging Face Hub does not give it either"
        raise UserError(f"{fault}: {type(error).__name__}: {_one_line(error)}") from None
    labelled = _without_withheld_labels(loaded, options)
    chosen = choose_part(labelled, options.part)
    if chosen is None:
        raise no_part(options.part, loaded, "choose a data set that has one")
    other = choose_part(labelled, "test" if options.part == "train" else "train")
    tables = [_hub_table(part, loaded[part]) for part in (chosen, other) if part is not None]
    files = [Path(entry["filename"]) for part in (chosen, other) if part for entry in loaded[part].cache_files]
    reader = _TableReader(tables[:1], tables[1:], options, lambda _: loaded[chosen])
    return reader.read(files, [source, chosen], storage)


def _without_withheld_labels(loaded: Any, options: _Options) -> list[str]:
    """The parts, without a test part that says -1 of all images, as ImageNet's does, if there is another to test on."""
    parts = list(loaded)
    while (test := choose_part(parts, "test")) and choose_part(rest := [p for p in parts if p != test], "test"):
        table = _hub_table(test, loaded[test])
        if (_labels(table, _label_column(table.features, options.label_column)) != -1).any():
            break
        _log.warning("its %s part has no labels (-1): the %s part is used", test, choose_part(rest, "test"))
        parts = rest
    return parts


def _hub_table(part: str, dataset: Any) -> _Table:  # datasets has no types
    def read(column: str) -> Iterator[Any]:
        for table in dataset.select_columns([column]).with_format("arrow").iter(_ROWS):
            yield from table.column(0).chunks

    return _Table(f"its {part} part", dataset.num_rows, dataset.features, read)


@dataclass(frozen=True)
class _TableReader:
    """Images and labels in the rows of tables.

    Args:
        tables: of the part, one after the other.
        others: of the other part; its labels count where classes have no names.
        options: which images, and how.
        rows_of: an image column of the part as a `datasets.Dataset` that reads single rows.
    """

    tables: Sequence[_Table]
    others: Sequence[_Table]
    options: _Options
    rows_of: Callable[[str], Any]

    def read(self, files: Sequence[Path], extra: object, storage: Storage) -> Split:
        """The split; in memory it is cached under the files and what else names it."""
        total = sum(table.rows for table in self.tables)
        count = min(self.options.limit or total, total)
        if count and storage.streams(count, self._shape):
            return self._stored(storage)
        return _cached(files, self.options, extra, self._decoded)

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
        labels = [_labels(table, label) for table in self.tables]
        names = getattr(first.features[label], "names", None)
        if names is None:
            # The numbers that occur in either part, so that both have the same classes.
            theirs = [_labels(table, label) for table in self.others if label in table.features]
            names = _numbered_classes(labels + theirs, label)
        if len(names) < 2:
            raise UserError(f"column {label!r} has {len(names)} class; a classifier needs at least 2")
        numbers = np.concatenate(labels)
        if not len(numbers):
            raise UserError(f"{first.name} has no rows")
        chosen = self.options.chosen(len(numbers))
        _check_labels(self.tables, numbers, chosen, len(names))
        return chosen, numbers[chosen], names

    def _decoded(self) -> Split:
        chosen, numbers, names = self._labelled()
        image, _ = self._columns()
        used = np.zeros(chosen[-1] + 1, np.bool_)  # what comes after the last one is not even read
        used[chosen] = True
        encoded = (row for table in self.tables for row in _encoded(table, image))
        images = decode(compress(encoded, used), self.options.framing)
        if len(images) != len(numbers):
            name = self.tables[0].name
            raise UserError(f"{name} is damaged: {len(numbers)} labels, but {len(images)} images")
        return Split(torch.from_numpy(images), torch.from_numpy(numbers), tuple(names))

    def _stored(self, storage: Storage) -> Split:
        chosen, numbers, names = self._labelled()
        image, _ = self._columns()
        rows = Rows(self.rows_of(image), image, [(table.name, table.rows) for table in self.tables])
        labels = torch.from_numpy(numbers)
        return _stored(rows, torch.from_numpy(chosen), labels, names, self.options, storage)


def _numbered_classes(labels: Sequence[NDArray[np.int64]], column: str) -> list[str]:
    largest = max(int(numbers.max(initial=-1)) for numbers in labels)
    if largest >= max(_MANY_CLASSES, sum(map(len, labels))):
        raise UserError(f"column {column!r} holds numbers up to {largest}, more than there are rows: not class labels")
    if not any((numbers == 0).any() for numbers in labels):
        _log.warning("column %r: no image has label 0; counted from 0 to %d, class 0 has none", column, largest)
    return [str(number) for number in range(largest + 1)]


def _labels(table: _Table, column: str) -> NDArray[np.int64]:
    pieces = [np.zeros(0, np.int64)]
    for piece in table.read(column):
        if piece.null_count:
            row = sum(map(len, pieces)) + piece.is_null().to_pylist().index(True)
            raise UserError(f"row {row} of {table.name} has no label; every image needs one")
        pieces.append(piece.to_numpy(zero_copy_only=False).astype(np.int64))
    return np.concatenate(pieces)


def _check_labels(
    tables: Sequence[_Table], numbers: NDArray[np.int64], chosen: NDArray[np.int64], num_classes: int
) -> None:
    used = numbers[chosen]
    wrong = ((used < 0) | (used >= num_classes)).nonzero()[0]
    if len(wrong):
        number = used[wrong[0]]
        hint = " (-1 often marks a part without labels)" if number == -1 else ""
        name, row = _place(tables, int(chosen[wrong[0]]))
        raise UserError(f"row {row} of {name} has label {number}{hint}; labels must lie in 0..{num_classes - 1}")


def _place(tables: Iterable[_Table], row: int) -> tuple[str, int]:
    """Name of the table that a row of all lies in, and its number there."""
    for table in tables:
        if row < table.rows:
            return table.name, row
        row -= table.rows
    raise IndexError(row)


def _encoded(table: _Table, column: str) -> Iterator[Encoded]:
    row = 0
    for piece in table.read(column):
        for value in piece.to_pylist():
            yield encoded_row(value, table.name, row)
            row += 1


def _image_column(features: Features, named: str | None) -> str:
    from datasets import Image

    def fits(feature: object) -> bool:
        plain = isinstance(feature, dict) and "bytes" in feature  # an image column whose metadata were lost
        return isinstance(feature, Image) or plain or getattr(feature, "dtype", None) == "binary"

    candidates = [name for name, feature in features.items() if fits(feature)]
    return _choose_column(features, candidates, _IMAGE_NAMES, named, "image")


def _label_column(features: Features, named: str | None) -> str:
    from datasets import ClassLabel

    whole = [name for name, feature in features.items() if "int" in str(getattr(feature, "dtype", ""))]
    likely = [n for n in whole if n == named or n in _LABEL_NAMES or isinstance(features[n], ClassLabel)]
    return _choose_column(features, likely, _LABEL_NAMES, named, "label")


def _choose_column(
    features: Features, candidates: list[str], usual: Sequence[str], named: str | None, what: str
) -> str:
    """The column named; else the one candidate with a usual name; else the only candidate."""
    listed = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items())
    key = f"data.{what}_column"
    holds = "encoded images" if what == "image" else "integers from 0 on, one per class"
    if named is not None:
        if named not in features:
            raise UserError(f"{key}: there is no column {named!r}; there are: {listed}")
        if named not in candidates:
            raise UserError(f"{key}: column {named!r} cannot be used, it must hold {holds}; there are: {listed}")
        return named
    known = [name for name in candidates if name in usual] or candidates
    if len(known) != 1:
        fault = f"no {what} column was found" if not known else f"the {what} column is not clear ({' or '.join(known)})"
        option = f"(evaluate, gallery, play: --{what}-column)"
        raise UserError(f"{fault}; set {key} to a column of {holds} {option}; there are: {listed}")
    return known[0]


def _type_name(feature: object) -> str:
    name = type(feature).__name__
    return str(getattr(feature, "dtype", name)) if name == "Value" else name
