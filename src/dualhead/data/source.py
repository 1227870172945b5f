"""A data set by name or path: `digits`, parquet, an image folder, or a name on the Hugging Face Hub."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from dualhead.data import cache
from dualhead.data.decode import Encoded, decode
from dualhead.data.files import ImageFiles, ParquetFiles, Part, choose_part, find_files, no_part
from dualhead.data.split import Split
from dualhead.errors import UserError

if TYPE_CHECKING:
    from datasets import Features

_IMAGE_NAMES: Final = ("image", "img")
_LABEL_NAMES: Final = ("label", "labels", "fine_label", "class", "target")
_ROWS: Final = 1024  # read at once
_MANY_CLASSES: Final = 10_000  # a few rows may well have large labels, but not larger than this


def load_split(
    source: str,
    part: Part,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: Sequence[int] | None = None,
    limit: int | None = None,
) -> Split:
    """One part of a data set, decoded; the second time from the cache (see `dualhead.data.cache`).

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
        limit: only the first so many images. An image folder is read class by class in turn.

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
    options = _Options(part, image_column, label_column, size, limit)
    try:
        path = _path(source)
        return _from_hub(source, options) if path is None else _from_path(path, options)
    except UserError as error:
        raise UserError(f"data.source {source!r}: {error}") from None


@dataclass(frozen=True)
class _Options:
    part: Part
    image_column: str | None
    label_column: str | None
    image_size: tuple[int, int] | None
    limit: int | None


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


def _from_path(path: Path, options: _Options) -> Split:
    found = find_files(path, options.part)
    if isinstance(found, ImageFiles):
        names = found.class_names
        return _cached(found.all(), options, names, lambda: _read_images(path, found, options))
    return _cached(found.all(), options, None, lambda: _read_parquet(found, options))


def _read_images(root: Path, found: ImageFiles, options: _Options) -> Split:
    files, labels = found.files[: options.limit], found.labels[: options.limit]
    images = decode((Encoded(path, str(path.relative_to(root)), None) for path in files), options.image_size)
    return Split(torch.from_numpy(images), torch.tensor(labels), found.class_names)


@dataclass(frozen=True)
class _Table:
    """Rows with features, from a parquet file or from the Hub.

    Args:
        name: for messages.
        features: the columns with their types.
        read: the named column in pieces, as pyarrow arrays.
    """

    name: str
    features: Features
    read: Callable[[str], Iterator[Any]]


def _read_parquet(found: ParquetFiles, options: _Options) -> Split:
    return _read_tables([_parquet(path) for path in found.part], [_parquet(path) for path in found.other], options)


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
        schema = parquet.read_schema(path)
    except Exception as error:
        raise _damaged(path, error) from None
    if b"names_file" in (schema.metadata or {}).get(b"huggingface", b""):
        raise UserError(f"{path.name} takes its class names from a file that it names; store the names instead")
    try:
        features = Features.from_arrow_schema(schema)
    except Exception as error:  # JSON of any shape may stand there, and fails in as many ways
        fault = f"{path.name} describes its columns in a way that cannot be read"
        raise UserError(f"{fault} (metadata 'huggingface': {type(error).__name__}: {_one_line(error)})") from None
    return _Table(path.name, features, read)


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path.name} is not a readable parquet file: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())


def _from_hub(source: str, options: _Options) -> Split:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        loaded = load_dataset(name, config or None)
    except Exception as error:  # the Hub client raises errors of several libraries
        fault = "no such file or folder, and the Hugging Face Hub does not give it either"
        raise UserError(f"{fault}: {type(error).__name__}: {_one_line(error)}") from None
    chosen = choose_part(loaded, options.part)
    if chosen is None:
        raise no_part(options.part, loaded, "choose a data set that has one")
    other = choose_part(loaded, "test" if options.part == "train" else "train")
    tables = [_hub_table(part, loaded[part]) for part in (chosen, other) if part is not None]
    files = [Path(entry["filename"]) for part in (chosen, other) if part for entry in loaded[part].cache_files]
    return _cached(files, options, [source, chosen], lambda: _read_tables(tables[:1], tables[1:], options))


def _hub_table(part: str, dataset: Any) -> _Table:  # datasets has no types
    def read(column: str) -> Iterator[Any]:
        for table in dataset.select_columns([column]).with_format("arrow").iter(_ROWS):
            yield from table.column(0).chunks

    return _Table(f"its {part} part", dataset.features, read)


def _read_tables(tables: Sequence[_Table], others: Sequence[_Table], options: _Options) -> Split:
    first = tables[0]
    image = _image_column(first.features, options.image_column)
    label = _label_column(first.features, options.label_column)
    for table in tables[1:]:
        if table.features.get(image) != first.features[image] or table.features.get(label) != first.features[label]:
            raise UserError(f"{table.name} and {first.name} differ in the type of column {image!r} or {label!r}")
    labels = [_labels(table, label) for table in tables]
    names = getattr(first.features[label], "names", None)
    if names is None:
        # The numbers that occur in either part, so that both have the same classes.
        names = _numbered_classes(
            labels + [_labels(table, label) for table in others if label in table.features], label
        )
    if len(names) < 2:
        raise UserError(f"column {label!r} has {len(names)} class; a classifier needs at least 2")
    _check_labels(tables, labels, len(names), options.limit)
    numbers = np.concatenate(labels)[: options.limit]
    if not len(numbers):
        raise UserError(f"{first.name} has no rows")
    encoded = (row for table in tables for row in _encoded(table, image))
    images = decode(islice(encoded, len(numbers)), options.image_size)
    if len(images) != len(numbers):
        raise UserError(f"{first.name} is damaged: {len(numbers)} labels, but {len(images)} images")
    return Split(torch.from_numpy(images), torch.from_numpy(numbers), tuple(names))


def _numbered_classes(labels: Sequence[NDArray[np.int64]], column: str) -> list[str]:
    largest = max(int(numbers.max(initial=-1)) for numbers in labels)
    if largest >= max(_MANY_CLASSES, sum(map(len, labels))):
        raise UserError(f"column {column!r} holds numbers up to {largest}, more than there are rows: not class labels")
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
    tables: Sequence[_Table], labels: Sequence[NDArray[np.int64]], num_classes: int, limit: int | None
) -> None:
    left = limit
    for table, column in zip(tables, labels, strict=True):
        used = column[:left]
        wrong = ((used < 0) | (used >= num_classes)).nonzero()[0]
        if len(wrong):
            hint = " (-1 often marks a part without labels)" if used[wrong[0]] == -1 else ""
            fault = f"row {wrong[0]} of {table.name} has label {used[wrong[0]]}{hint}"
            raise UserError(f"{fault}; labels must lie in 0..{num_classes - 1}")
        left = None if left is None else left - len(used)


def _encoded(table: _Table, column: str) -> Iterator[Encoded]:
    row = 0
    for piece in table.read(column):
        for value in piece.to_pylist():
            content = value if isinstance(value, bytes | None) else value.get("bytes")
            if content is None:
                if value is None or not value.get("path"):
                    raise UserError(f"row {row} of {table.name} has no image")
                content = Path(value["path"])
            yield Encoded(content, table.name, row)
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
        raise UserError(f"{fault}; set {key} to a column of {holds}; there are: {listed}")
    return known[0]


def _type_name(feature: object) -> str:
    name = type(feature).__name__
    return str(getattr(feature, "dtype", name)) if name == "Value" else name
