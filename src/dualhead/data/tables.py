"""Tables of images and labels: parquet files, folders that `datasets` saved, the Hugging Face Hub."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from dualhead.data import cache
from dualhead.data.decode import Encoded
from dualhead.data.files import LABELS, choose_part, choose_shared, refuse_several_folders
from dualhead.data.labels import check_labels, numbered
from dualhead.data.reading import ROWS, Options, Storage, cached, in_memory, shape_like, stored
from dualhead.data.split import Split
from dualhead.data.stored import Rows, encoded_row
from dualhead.errors import UserError

if TYPE_CHECKING:
    from datasets import Features

_IMAGE_NAMES: Final = ("image", "img")
_LISTS: Final = frozenset({"List", "LargeList", "Sequence", "list", "Array2D", "Array3D"})

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Table:
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
class TablePart:
    """The tables of a part, opened when they are needed.

    Args:
        tables: one after the other.
        files: that hold them.
        rows_of: an image column of all of them as a `datasets.Dataset` that reads single rows.
    """

    tables: Callable[[], list[Table]]
    files: Sequence[Path]
    rows_of: Callable[[str], Any]


def from_tables(parts: Mapping[str, TablePart], options: Options, storage: Storage, extra: object = None) -> Split:
    """Read a part of a set by the tables of its parts; `extra` names them in the cache beside their files."""
    labelled = _without_withheld_labels(parts, options)
    advice = f"name its files like {options.part}-00000.parquet, and give the folder that holds both"
    chosen, shared = choose_shared(labelled, options.part, advice, split_off=options.test is not None)
    other = None if shared else choose_part(labelled, "test" if options.part == "train" else "train")
    others = [] if other is None else parts[other].tables()
    reader = TableReader(parts[chosen].tables(), others, options, shared, parts[chosen].rows_of)
    files = [*parts[chosen].files, *([] if other is None else parts[other].files)]
    return reader.read(files, [extra, chosen], storage)


def _without_withheld_labels(parts: Mapping[str, TablePart], options: Options) -> list[str]:
    """The parts, without a test part that has no labels, as ImageNet's says -1, if there is another to test on."""
    left = list(parts)
    while (test := choose_part(left, "test")) and choose_part(rest := [p for p in left if p != test], "test"):
        how = _withheld(parts[test].tables(), options)
        if how is None:
            break
        _log.warning("its %s part has no labels%s: the %s part is used", test, how, choose_part(rest, "test"))
        left = rest
    return left


def _withheld(tables: Sequence[Table], options: Options) -> str | None:
    """How tables say that they have no labels; None if they have some."""
    try:
        column = _label_column(tables[0].features, options.label_column)
    except UserError:
        return ""
    pieces = [piece for table in tables for piece in table.read(column)]
    if all(piece.null_count == len(piece) for piece in pieces):
        return ""
    return " (-1)" if all(value == -1 for piece in pieces for value in piece.to_pylist()) else None


def parquet_part(root: Path, name: str, files: tuple[Path, ...]) -> TablePart:
    """A part that lies in parquet files, under a folder."""

    def tables() -> list[Table]:
        refuse_several_folders(root, name, files)
        return [_parquet(path) for path in files]

    return TablePart(tables, files, lambda column: _arrow(files, column))


def saved_part(name: str, folder: Path) -> TablePart:
    """A part that `datasets` saved to a folder."""
    import datasets

    @functools.cache
    def loaded() -> Any:
        try:
            return datasets.load_from_disk(str(folder))
        except Exception as error:  # JSON of any shape and damaged Arrow files fail in as many ways
            raise UserError(f"{folder.name}/ is not a readable folder of `save_to_disk`: {_one_line(error)}") from None

    files = sorted(path for path in folder.iterdir() if path.is_file())
    return TablePart(lambda: [_dataset_table(name, loaded(), folder)], files, lambda _: loaded())


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


def _parquet(path: Path) -> Table:
    from datasets import Features
    from pyarrow import parquet

    def read(column: str) -> Iterator[Any]:
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(ROWS, columns=[column]):
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
    return Table(path.name, rows, features, read, path.parent)


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path.name} is not a readable parquet file: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())


def from_hub(source: str, options: Options, storage: Storage, *, asked: bool) -> Split:
    """Load a data set of the Hugging Face Hub.

    Args:
        source: its name, `OWNER/NAME` or `OWNER/NAME:CONFIG`.
        options: which images, and how.
        storage: where they are.
        asked: the Hub was asked for by name; else the name might have been that of a folder.

    Raises:
        UserError: if the Hub does not give it, or it is no set of labelled images.
    """
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        loaded = load_dataset(name, config or None)
    except Exception as error:  # the Hub client raises errors of several libraries
        fault = "the Hugging Face Hub does not give it"
        if not asked:
            fault = "no such file or folder, and the Hugging Face Hub does not give it either"
        raise UserError(f"{fault}: {type(error).__name__}: {_one_line(error)}") from None
    if not asked:
        _log.warning("data.source %s: no such folder here, taken from the Hugging Face Hub", source)

    def part(name: str, dataset: Any) -> TablePart:
        files = [Path(entry["filename"]) for entry in dataset.cache_files]
        return TablePart(lambda: [_dataset_table(name, dataset, None)], files, lambda _: dataset)

    parts = {name: part(name, dataset) for name, dataset in loaded.items()}
    return from_tables(parts, options, storage, source)


def _dataset_table(part: str, dataset: Any, folder: Path | None) -> Table:  # datasets has no types
    def read(column: str) -> Iterator[Any]:
        for table in dataset.select_columns([column]).with_format("arrow").iter(ROWS):
            yield from table.column(0).chunks

    return Table(f"its {part} part", dataset.num_rows, dataset.features, read, folder)


@dataclass(frozen=True)
class TableReader:
    """Images and labels in the rows of tables.

    Args:
        tables: of the part, one after the other.
        others: of the other part; its labels count where classes have no names.
        options: which images, and how.
        shared: the tables are those of both parts.
        rows_of: an image column of the part as a `datasets.Dataset` that reads single rows.
    """

    tables: Sequence[Table]
    others: Sequence[Table]
    options: Options
    shared: bool
    rows_of: Callable[[str], Any]

    def read(self, files: Sequence[Path], extra: object, storage: Storage) -> Split:
        """The split; in memory it is cached under the files and what else names it."""
        chosen, numbers, names = self._labelled()
        if storage.streams(len(chosen), self._shape):
            return self._stored(chosen, numbers, names, storage)
        return cached(files, self.options, [extra, names], lambda: self._decoded(chosen, numbers, names))

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
        return shape_like(next(row for table in self.tables for row in _encoded(table, image)), self.options)

    def _labelled(self) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str]]:
        """Rows that are used, their labels, and the names of the classes."""
        first, (_, label) = self.tables[0], self._columns()
        if not sum(table.rows for table in self.tables):
            raise UserError(f"{first.name} has no rows")
        found = [_labels(table, label) for table in self.tables]
        # Where classes have no names, those of either part count, so that both have the same.
        named = getattr(first.features[label], "names", None)
        theirs = [] if named else [_labels(table, label) for table in self.others if label in table.features]
        labels, names = numbered(found, theirs, named, label)
        if len(names) < 2:
            raise UserError(f"column {label!r} has {len(names)} class; a classifier needs at least 2")
        numbers = np.concatenate(labels)
        if not self.shared:
            chosen = self.options.chosen(numbers, names, shared=False)
            check_labels(numbers[chosen], len(names), lambda row: _place(self.tables, int(chosen[row])))
            return chosen, numbers[chosen], names
        check_labels(numbers, len(names), lambda row: _place(self.tables, row))
        chosen = self.options.chosen(numbers, names, shared=True)
        return chosen, numbers[chosen], names

    def _decoded(self, chosen: NDArray[np.int64], numbers: NDArray[np.int64], names: list[str]) -> Split:
        image, _ = self._columns()
        used = np.zeros(chosen[-1] + 1, np.bool_)  # what comes after the last one is not even read
        used[chosen] = True
        encoded = (row for table in self.tables for row in _encoded(table, image))
        try:
            return in_memory(compress(encoded, used), torch.from_numpy(numbers), names, self.options)
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
        return stored(rows, torch.from_numpy(chosen), labels, names, self.options, storage)


def _labels(table: Table, column: str) -> NDArray[Any]:
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


def _place(tables: Iterable[Table], row: int) -> str:
    """The table that a row of all lies in, and its number there."""
    for table in tables:
        if row < table.rows:
            return f"row {row} of {table.name}"
        row -= table.rows
    raise IndexError(row)


def _encoded(table: Table, column: str) -> Iterator[Encoded]:
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
