"""Which files of a local data set belong to a part.

Parts are told by names: `train` or `training`; `test`, `testing` or `validation` and the like, of which the first that
is there and has labels is the test part. A file or folder without such a name is a train part, and never serves as a
test part, since a model would then be measured on the images that it was trained on; a share of it can be split off.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from dualhead.data.decode import endings, is_image
from dualhead.data.names import in_order, match, one_form
from dualhead.errors import UserError

_log = logging.getLogger(__name__)

Part = Literal["train", "test"]

NAMES: Final[dict[Part, tuple[str, ...]]] = {
    "train": ("train", "training", "trainset"),
    "test": ("test", "testing", "testset", "eval", "evaluation", "validation", "valid", "val", "dev"),
}
"""Names that a part may have, the preferred one first."""
_KNOWN: Final = frozenset(name for names in NAMES.values() for name in names)
ARRAYS: Final = frozenset({".npz", ".npy"})
_NOT_DATA: Final = frozenset(
    {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__"}
)
"""Folders that operating systems and disk stations leave among others, in lower case."""
LABELS: Final = ("label", "labels", "fine_label", "class", "target")
"""Usual names of a column of labels."""
SAVED: Final = "dataset_dict.json"
"""In a folder to which `datasets` saved the parts of a set."""
_SAVED_ONE: Final = "state.json"


@dataclass(frozen=True)
class TableFiles:
    """Parquet files by the name of their part, sorted; or folders that `datasets` saved.

    Args:
        parts: for each name the files, or the folder.
        saved: whether they are folders of `datasets`.
    """

    parts: Mapping[str, tuple[Path, ...]]
    saved: bool = False


@dataclass(frozen=True)
class ArrayFiles:
    """One `.npz` file, or several files of numpy in one folder."""

    files: tuple[Path, ...]
    own: str
    """The part that they are if no name says so."""


@dataclass(frozen=True)
class ImageFiles:
    """Image files of a part with their classes.

    Args:
        class_names: names of the class folders of the train part (of this part, if there is no train part), in order.
        files: the images, class after class in turn, so that the first n hold all classes alike.
        labels: the label of each.
        shared: these are the images of both parts.
    """

    class_names: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    shared: bool = False

    def all(self) -> tuple[Path, ...]:
        """The files that decide what is loaded."""
        return self.files


def find_files(
    root: Path, part: Part, *, split_off: bool = False, label_column: str | None = None
) -> TableFiles | ArrayFiles | ImageFiles:
    """The files of a part below a file or folder.

    What `datasets` saved is looked for first, then parquet files at any depth, then files of numpy, then images in
    `PART/CLASS/` or, without parts, in `CLASS/`.

    Args:
        root: the file or folder.
        part: which part's images.
        split_off: the test part is a share of the train part.
        label_column: of a `metadata.csv` that lists images.

    Raises:
        UserError: if there are none, or they cannot be told apart.
    """
    if root.is_file():
        if root.suffix.lower() == ".parquet":
            return _sort_parquet(root.parent, [root])
        if root.suffix.lower() in ARRAYS:
            return ArrayFiles((root,), _own_part(root.parent))
        raise UserError(
            f"a file must be parquet, .npz or .npy, got {root.suffix or 'no extension'}; images go in train/CLASS/"
        )
    if saved := _saved_parts(root):
        return TableFiles(saved, saved=True)
    if parquet := _files_below(root, {".parquet"}):
        return _sort_parquet(root, parquet)
    arrays = sorted(path for path in root.iterdir() if path.suffix.lower() in ARRAYS and not path.name.startswith("."))
    if arrays and not any(_files_below(folder, endings()) for folder in _folders(root)):
        return ArrayFiles(tuple(arrays), _own_part(root))
    return _choose_images(root, part, label_column, split_off=split_off)


def _saved_parts(root: Path) -> dict[str, tuple[Path, ...]]:
    """The folders that `datasets` saved below another, by name; the folder itself, if it is one."""
    if (root / _SAVED_ONE).is_file() and not (root / SAVED).is_file():
        return {_own_part(root): (root,)}
    return {path.name.lower(): (path,) for path in _folders(root) if (path / _SAVED_ONE).is_file()}


def _files_below(root: Path, extensions: Set[str]) -> list[Path]:
    """The files with one of the extensions at any depth, sorted; what is hidden is left out."""
    found = []
    for folder, files in _walk(root):
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in extensions:  # noqa: PTH122  # for speed
                found.append(os.path.join(folder, name))  # noqa: PTH118  # likewise
    return [Path(path) for path in sorted(found)]


def _images_below(root: Path, passed_over: Counter[str]) -> list[Path]:
    """The images at any depth, sorted; the endings of all other files that are not hidden are counted."""
    found = []
    for folder, files in _walk(root):
        for name in files:
            if name.startswith("."):
                continue
            path, ending = os.path.join(folder, name), os.path.splitext(name)[1].lower()  # noqa: PTH118, PTH122
            if ending in endings() or is_image(Path(path)):
                found.append(path)
            else:
                passed_over[ending or "without an ending"] += 1
    return [Path(path) for path in sorted(found)]


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below and the names of its files; links to folders are followed, each folder is met once."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        status = os.stat(folder)  # noqa: PTH116  # for speed
        place = status.st_dev, status.st_ino
        folders[:] = [] if place in seen else sorted(name for name in folders if _may_hold_data(name))
        if place not in seen:
            seen.add(place)
            yield folder, files


def _may_hold_data(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _NOT_DATA


def _words(name: str) -> list[str]:
    """The words of a name: `seg_train`, `train-images` and `TrainSet` hold a word for a part."""
    return re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())


def said_part(name: str) -> str | None:
    """The name of a part that occurs as a word in a name."""
    return next((word for word in _words(name) if word in _KNOWN), None)


def _said_part(path: Path) -> str | None:
    """The name of a part that occurs as a word in a relative path; the file's name counts first, then its folders."""
    names = (path.stem, *reversed(path.parent.parts))
    return next((word for name in names if (word := said_part(name)) is not None), None)


def _own_part(folder: Path) -> str:
    """The part that a folder without parts is: what its whole name says, else train."""
    name = folder.resolve().name.lower()
    return name if name in _KNOWN else "train"


def choose_part(found: Iterable[str], part: Part) -> str | None:
    """Which of the names found is the part; None if it is not there."""
    names = set(found)
    return next((name for name in NAMES[part] if name in names), None)


def choose_shared(found: Iterable[str], part: Part, advice: str, *, split_off: bool) -> tuple[str, bool]:
    """Which of the names found is the part, and whether it is shared by both parts.

    Args:
        found: names.
        part: which.
        advice: for the error that it is not there.
        split_off: the test part is a share of the train part.

    Raises:
        UserError: if it is not there; or if it is there and a share of the other was to be split off.
    """
    names = set(found)
    if split_off:
        own = choose_part(names, "test")
        if own is not None and choose_part(names, "train") is not None:
            raise UserError(f"data.test: there is a test part already ({own}); leave the key out")
        chosen = choose_part(names, "train") or own
        if chosen is not None:
            return chosen, True
    chosen = choose_part(names, part)
    if chosen is None:
        listed = ", ".join(sorted(names))
        split = ", or split one off with data.test=0.2" if part == "test" and choose_part(names, "train") else ""
        usual = " or ".join(NAMES[part][:2] if part == "train" else ("test", "testing", "validation", "valid", "val"))
        raise UserError(f"there is no {part} part ({usual}), only {listed}; {advice}{split}")
    return chosen, False


def _sort_parquet(root: Path, files: list[Path]) -> TableFiles:
    by_name: dict[str, list[Path]] = {}
    for path in files:
        by_name.setdefault(_said_part(path.relative_to(root)) or "", []).append(path)
    if list(by_name) == [""]:  # no file says what it is
        by_name = {_own_part(root): files}
    elif "" in by_name:
        _log.warning("left out %d parquet files that name no part, %s first", len(by_name[""]), by_name.pop("")[0])
    return TableFiles({name: tuple(paths) for name, paths in by_name.items()})


def refuse_several_folders(root: Path, name: str, files: Iterable[Path]) -> None:
    """Refuse the files of a part that lie in several folders, as those of several sets do."""
    folders = sorted({str(path.parent.relative_to(root)) for path in files})
    if len(folders) > 1:
        raise UserError(f"there are {name} files in several folders ({', '.join(folders)}); give one of the folders")


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and _may_hold_data(path.name))


def _part_folders(root: Path) -> dict[str, Path]:
    """The folders of parts by their names in lower case: whole names, or else names that hold such a word."""
    folders = _folders(root)
    parts = {path.name.lower(): path for path in folders if path.name.lower() in _KNOWN}
    told: dict[str, list[Path]] = {}
    for path in folders:
        word = said_part(path.name)
        # A class may be called `bullet train`; but a class folder holds images, and a part holds class folders.
        if path not in parts.values() and word is not None and _folders(path):
            told.setdefault(word, []).append(path)
    if not parts and not (choose_part(told, "train") and choose_part(told, "test")):
        told = {}
    for word, paths in told.items():
        if word in parts:
            continue
        if len(paths) > 1:
            names = ", ".join(path.name for path in paths)
            raise UserError(
                f"there are several {word} folders ({names}); put their images in {root.name}/{word}/CLASS/"
            )
        parts[word] = paths[0]
    if parts:
        _tell_left_out([path for path in folders if path not in parts.values()])
    return {word: _within(path, word) for word, path in parts.items()}


def _within(folder: Path, word: str) -> Path:
    """The folder of the same part in the folder of a part, where nothing else is there: seg_train/seg_train/CLASS."""
    inner = _folders(folder)
    if len(inner) == 1 and word in _words(inner[0].name) and _folders(inner[0]):
        return inner[0]
    return folder


def _tell_left_out(folders: Iterable[Path]) -> None:
    for folder in folders:
        if count := len(_files_below(folder, endings())):
            _log.warning("left out %d images in %s/, which is no part (train, test, ...)", count, folder.name)


def _outermost(root: Path) -> Path:
    """The folder in which parts or classes lie: an archive often unpacks to a folder in a folder."""
    at = root
    while at.name.lower() not in _KNOWN and len(inner := _folders(at)) == 1 and inner[0].name.lower() not in _KNOWN:
        at = inner[0]
    return at if len(_folders(at)) > 1 or any(path.name.lower() in _KNOWN for path in _folders(at)) else root


def _choose_images(given: Path, part: Part, label_column: str | None, *, split_off: bool) -> ImageFiles:
    root = _outermost(given)
    parts = _part_folders(root) or {_own_part(root): root}
    chosen, shared = choose_shared(parts, part, f"put its images in {root.name}/{part}/CLASS/", split_off=split_off)
    trained = choose_part(parts, "train")
    names = None
    if trained is not None:
        listed = _listed_images(parts[trained], label_column)
        names = in_order(_class_folders(parts[trained]) if listed is None else listed)
    if part == "test" and not shared:
        chosen = _first_labelled(parts, chosen, names, label_column)
    passed_over: Counter[str] = Counter()
    classes = _listed_images(parts[chosen], label_column)
    if classes is None:
        classes = _images_by_class(parts[chosen], passed_over)
    if not classes:
        raise UserError(f"{parts[chosen].name}/ lists images without labels; every image needs one")
    if passed_over:
        told = ", ".join(f"{count} {ending}" for ending, count in passed_over.most_common(6))
        where = parts[chosen].name
        _log.warning("passed over %d files in %s/ that are no images: %s", passed_over.total(), where, told)
    names = in_order(classes) if names is None else names
    places = match(list(classes), names)
    if places is None:
        strange = next(name for name in classes if match([name], names) is None)
        raise UserError(f"{chosen}/{strange} is a class that {trained}/ does not have; its classes: {_few(names)}")
    number = dict(zip(classes, places, strict=True))
    ranked = sorted((rank, number[name], path) for name in classes for rank, path in enumerate(classes[name]))
    labels = tuple(label for _, label, _ in ranked)
    return ImageFiles(tuple(names), tuple(path for *_, path in ranked), labels, shared)


def _listed_images(folder: Path, label_column: str | None) -> dict[str, list[Path]] | None:
    """The images of each class that a `metadata.csv` or `.jsonl` lists, as `datasets` reads it; None without one.

    No class, if no image has a label.
    """
    csv_file, json_file = folder / "metadata.csv", folder / "metadata.jsonl"
    file = csv_file if csv_file.is_file() else json_file
    if not file.is_file():
        return None
    try:
        text = file.read_text(encoding="utf-8-sig")
        rows = list(csv.DictReader(text.splitlines()))
        if file == json_file:
            lines = [line for line in text.splitlines() if line.strip()]
            rows = [json.loads(line, parse_constant=lambda nan: None) for line in lines]
        columns = list(rows[0])
        others = [name for name in columns if name != "file_name"]
        usual = [name for name in others if name in LABELS] or others
        column = label_column or (usual[0] if len(usual) == 1 else None)
        if "file_name" not in columns or column not in columns:
            told = ", ".join(columns)
            raise UserError(
                f"{file.name} needs columns file_name and label, and has {told}; set data.label_column "
                "(evaluate, gallery, play: --label-column) to the one of labels"
            )
        labels = [row[column] for row in rows]
        lacking = [number for number, label in enumerate(labels) if label in (None, "")]
        several = next((label for label in labels if isinstance(label, list | dict)), None)
        if several is not None:
            raise UserError(f"{file.name} gives {several} as a label; a classifier needs one of each image")
        if len(lacking) == len(rows):
            return {}
        if lacking:
            raise UserError(f"row {lacking[0]} of {folder.name}/{file.name} has no label; every image needs one")
        found: dict[str, list[Path]] = {}
        for row, label in zip(rows, labels, strict=True):
            found.setdefault(one_form(str(label)), []).append(folder / str(row["file_name"]))
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file.name} is not a readable list of images: {type(error).__name__}: {error}") from None
    return found


def _first_labelled(parts: Mapping[str, Path], chosen: str, known: list[str] | None, label_column: str | None) -> str:
    """The test part, or the next in turn whose images lie in folders of classes, as those of a contest's do not."""
    for name in NAMES["test"]:
        if name in parts and (name == chosen or NAMES["test"].index(name) > NAMES["test"].index(chosen)):
            classes = list(_listed_images(parts[name], label_column) or _class_folders(parts[name]))
            if classes and (known is None or any(match([found], known) for found in classes)):
                if name != chosen:
                    _log.warning("%s/ has no class folders: %s/ is the test part", parts[chosen].name, parts[name].name)
                return name
    return chosen


def _class_folders(folder: Path) -> dict[str, list[Path]]:
    """The folders of each class, by its name in one form: two forms of one name are one class."""
    found: dict[str, list[Path]] = {}
    for path in _folders(folder):
        found.setdefault(one_form(path.name), []).append(path)
    return found


def _images_by_class(folder: Path, passed_over: Counter[str]) -> dict[str, list[Path]]:
    """The images of each class folder, both sorted.

    Raises:
        UserError: if images lie outside class folders, a class has none, or there is no class.
    """
    stray = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    images = [path for path in stray if path.suffix.lower() in endings() or is_image(path)]
    if images:
        first, where = min(images).name, folder.name
        raise UserError(
            f"{first} in {where}/ lies outside a class folder ({len(images)} such); move it to {where}/CLASS/, or "
            f"list file names and labels in {where}/metadata.csv (columns file_name, label)"
        )
    classes = {}
    for name, folders in _class_folders(folder).items():
        here: Counter[str] = Counter()
        classes[name] = sorted(path for one in folders for path in _images_below(one, here))
        passed_over.update(here)
        _refuse_parts_below(folder, folders)
        if not classes[name] and len(_class_folders(folder)) > 1:
            held = ", ".join(f"{count} {ending}" for ending, count in here.most_common(6)) or "nothing"
            raise UserError(
                f"class folder {folder.name}/{name}/ holds no image that can be read ({held}); convert what it holds, "
                "or move it away"
            )
    if not any(classes.values()):
        layouts = "train-*.parquet and test-*.parquet, or images in train/CLASS/ and test/CLASS/"
        raise UserError(f"{folder.name}/ holds neither parquet files nor class folders with images; expected {layouts}")
    return classes


def _refuse_parts_below(folder: Path, classes: list[Path]) -> None:
    below = {path.name.lower() for one in classes for path in _folders(one)} & _KNOWN
    if choose_part(below, "train") and choose_part(below, "test"):
        raise UserError(
            f"{folder.name}/{classes[0].name}/ holds the parts {', '.join(sorted(below))}; put parts outermost: "
            f"train/{classes[0].name}/, test/{classes[0].name}/"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:10])}, ... ({len(names)} in all)"
