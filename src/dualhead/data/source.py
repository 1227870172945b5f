"""A data set by name or path: `digits`, parquet, an image folder, or a name on the Hugging Face Hub."""

from __future__ import annotations

import functools
import importlib.resources
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, get_args

import numpy as np
import torch

from dualhead.data.arrays import LabelledArrays, given_arrays, read_arrays
from dualhead.data.decode import FULL_DEPTH, Encoded, Framing, Resample
from dualhead.data.files import ArrayFiles, ImageFiles, Part, find_files
from dualhead.data.given import GIVEN, held
from dualhead.data.labels import check_labels, numbered
from dualhead.data.reading import IN_MEMORY, PROBED, Choice, Options, Storage, cached, in_memory, shape_like, stored
from dualhead.data.split import Split
from dualhead.data.stored import Files, named_from
from dualhead.data.tables import from_hub, from_tables, parquet_part, saved_part
from dualhead.errors import UserError, under

_DARK: Final = 64  # a set without a value as large may well hold fewer bits than 8
_ON_THE_HUB: Final = "hf:"
_LIKE_A_NAME: Final = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")

_log = logging.getLogger(__name__)

_SPOKEN: Final = {
    "cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "mnist": "ylecun/mnist",
    "fashionmnist": "zalando-datasets/fashion_mnist", "svhn": "ufldl-stanford/svhn:cropped_digits",
    "tinyimagenet": "zh-plus/tiny-imagenet",
}  # fmt: skip
"""Names of data sets as people say them, without - and _, and their names on the Hub."""


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
    storage: Storage = IN_MEMORY,
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
    options = Options(part, image_column, label_column, framing, skip_unreadable, test, limit, choice)
    source = source if Path(source).exists() else name_on_hub(source) or source
    with under(f"data.source {source!r}"):
        split = _from_source(source, options, storage)
    _warn_of(split, source, options)
    return split


def _warn_of(split: Split, source: str, options: Options) -> None:
    """Words on images that were left out, and on a set that is so dark that it may hold fewer bits."""
    if split.skipped:
        more = "; ..." if len(split.skipped) > 3 else ""
        told = "; ".join(split.skipped[:3]) + more
        _log.warning("data.source %r: left out %d images that cannot be read: %s", source, len(split.skipped), told)
    if options.framing.depth is None:
        sample = torch.linspace(0, len(split) - 1, min(PROBED, len(split))).round().long()
        largest = int(split.images[sample].max()) if split.is_stored else int(split.images[:].max())
        if largest < _DARK:
            _log.warning(
                "data.source %r: the largest value of all images is %d of 255, as where pixels have %d bits; if so, "
                "set data.depth=%d (evaluate, gallery, play: --depth)",
                source, largest, max(1, largest.bit_length()), max(1, largest.bit_length()),
            )  # fmt: skip


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


def _from_source(source: str, options: Options, storage: Storage) -> Split:
    if source.startswith(GIVEN):
        return _from_given(source, options, storage)
    path = path_of(source)
    if path is not None:
        return _from_path(path, options, storage)
    asked = source.startswith(_ON_THE_HUB)
    return from_hub(source.removeprefix(_ON_THE_HUB), options, storage, asked=asked)


def _from_given(source: str, options: Options, storage: Storage) -> Split:
    given = held(source)
    named = given.parts.get(options.part)
    if isinstance(named, str):
        return _from_source(named if Path(named).exists() else name_on_hub(named) or named, options, storage)
    arrays = {part: content for part, content in given.parts.items() if not isinstance(content, str)}
    return _of_arrays(
        given_arrays(arrays, given.class_names, options.part, split_off=options.test is not None), options
    )


def _from_path(path: Path, options: Options, storage: Storage) -> Split:
    found = find_files(path, options.part, split_off=options.test is not None, label_column=options.label_column)
    if isinstance(found, ImageFiles):
        return _from_images(path, found, options, storage)
    if isinstance(found, ArrayFiles):
        return _from_arrays(found, options, storage)
    if found.saved:
        return from_tables(
            {name: saved_part(name, folder) for name, (folder,) in found.parts.items()}, options, storage
        )
    root = path.parent if path.is_file() else path
    return from_tables({name: parquet_part(root, name, f) for name, f in found.parts.items()}, options, storage)


def _from_images(root: Path, found: ImageFiles, options: Options, storage: Storage) -> Split:
    chosen = options.chosen(np.asarray(found.labels), found.class_names, shared=found.shared).tolist()
    paths, labels = [found.files[n] for n in chosen], torch.tensor([found.labels[n] for n in chosen])

    def encoded() -> Iterator[Encoded]:
        return (Encoded(path, str(named_from(root, path)), None) for path in paths)

    if storage.streams(len(paths), lambda: shape_like(next(encoded()), options)):
        return stored(Files(root, paths), torch.arange(len(paths)), labels, found.class_names, options, storage)
    named = [found.class_names, found.labels]  # a list of files may have other labels for the same ones
    return cached(found.all(), options, named, lambda: in_memory(encoded(), labels, found.class_names, options))


def _from_arrays(found: ArrayFiles, options: Options, storage: Storage) -> Split:
    if storage.stream:
        _log.warning("data.stream: images of numpy files are held in memory")
    arrays = read_arrays(
        found, options.part, options.image_column, options.label_column, split_off=options.test is not None
    )
    return _of_arrays(arrays, options)


def _of_arrays(arrays: LabelledArrays, options: Options) -> Split:
    if not len(arrays.labels):
        raise UserError("holds no images")
    theirs = [] if arrays.others is None else [arrays.others]
    numbers, names = numbered([arrays.labels], theirs, arrays.class_names, "labels")
    check_labels(numbers[0], len(names), lambda row: f"row {row} of its labels")
    chosen = options.chosen(numbers[0], names, shared=arrays.shared)
    images = arrays.images(chosen, options.framing)
    return Split(torch.from_numpy(images), torch.from_numpy(numbers[0][chosen]), tuple(names))
