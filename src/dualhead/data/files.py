"""Which files of a local data set belong to a part.

Parts are told by names: `train` or `training`; `test`, `validation`, `valid` or `val`, of which the first that is there
is the test part. A file or folder without such a name is a train part, and never serves as a test part: who trained on
it would measure on the same images.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from dualhead.data.decode import EXTENSIONS
from dualhead.errors import UserError

_log = logging.getLogger(__name__)

Part = Literal["train", "test"]

NAMES: Final[dict[Part, tuple[str, ...]]] = {
    "train": ("train", "training"),
    "test": ("test", "validation", "valid", "val"),
}
"""What a part may be called, the preferred name first."""
_KNOWN: Final = frozenset(name for names in NAMES.values() for name in names)


@dataclass(frozen=True)
class ParquetFiles:
    """Parquet files of a part, sorted, and those of the other part (empty if there is none)."""

    part: tuple[Path, ...]
    other: tuple[Path, ...]

    def all(self) -> tuple[Path, ...]:
        """The files that decide what is loaded."""
        return self.part + self.other


@dataclass(frozen=True)
class ImageFiles:
    """Image files of a part with their classes.

    Args:
        class_names: names of the class folders of the train part (of this part, if there is no train part), sorted.
        files: the images, class after class in turn, so that the first n hold all classes alike.
        labels: the label of each.
    """

    class_names: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]

    def all(self) -> tuple[Path, ...]:
        """The files that decide what is loaded."""
        return self.files


def find_files(root: Path, part: Part) -> ParquetFiles | ImageFiles:
    """The files of a part below a file or folder.

    Parquet files are looked for first, at any depth; then images in `PART/CLASS/` or, without parts, in `CLASS/`.

    Raises:
        UserError: if there are none, or they cannot be told apart.
    """
    if root.is_file():
        if root.suffix != ".parquet":
            raise UserError(f"a file must be parquet, got {root.suffix or 'no extension'}; images go in train/CLASS/")
        return _choose_parquet(root.parent, [root], part)
    parquet = _files_below(root, {".parquet"})
    return _choose_parquet(root, parquet, part) if parquet else _choose_images(root, part)


def _files_below(root: Path, extensions: Set[str]) -> list[Path]:
    """The files with one of the extensions at any depth, sorted; what is hidden is left out."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in extensions:  # noqa: PTH122  # for speed
                found.append(os.path.join(folder, name))  # noqa: PTH118  # likewise
    return [Path(path) for path in sorted(found)]


def _said_part(path: Path) -> str | None:
    """The name of a part that occurs as a word in a relative path; the file's name counts first, then its folders."""
    for name in (path.stem, *reversed(path.parent.parts)):
        for word in re.split(r"[^a-z]+", name.lower()):
            if word in _KNOWN:
                return word
    return None


def _own_part(folder: Path) -> str:
    """The part that a folder without parts is: what its whole name says, else train."""
    name = folder.resolve().name.lower()
    return name if name in _KNOWN else "train"


def choose_part(found: Iterable[str], part: Part) -> str | None:
    """Which of the names found is the part; None if it is not there."""
    names = set(found)
    return next((name for name in NAMES[part] if name in names), None)


def no_part(part: Part, found: Iterable[str], advice: str) -> UserError:
    """The error that a part is not there."""
    listed = ", ".join(sorted(set(found)))
    return UserError(f"there is no {part} part ({' or '.join(NAMES[part])}), only {listed}; {advice}")


def _choose_parquet(root: Path, files: list[Path], part: Part) -> ParquetFiles:
    by_name: dict[str, list[Path]] = {}
    for path in files:
        by_name.setdefault(_said_part(path.relative_to(root)) or "", []).append(path)
    if list(by_name) == [""]:  # no file says what it is
        by_name = {_own_part(root): files}
    elif "" in by_name:
        _log.warning("left out %d parquet files that name no part, %s first", len(by_name[""]), by_name.pop("")[0])
    chosen = choose_part(by_name, part)
    if chosen is None:
        raise no_part(part, by_name, f"name its files like {part}-00000.parquet, and give the folder that holds both")
    folders = sorted({str(path.parent.relative_to(root)) for path in by_name[chosen]})
    if len(folders) > 1:
        raise UserError(f"there are {chosen} files in several folders ({', '.join(folders)}); give one of the folders")
    other = choose_part(by_name, "test" if part == "train" else "train")
    return ParquetFiles(tuple(by_name[chosen]), tuple(by_name[other]) if other else ())


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _choose_images(root: Path, part: Part) -> ImageFiles:
    parts = {path.name.lower(): path for path in _folders(root) if path.name.lower() in _KNOWN}
    if not parts:
        parts = {_own_part(root): root}
    chosen = choose_part(parts, part)
    if chosen is None:
        raise no_part(part, parts, f"put its images in {root.name}/{part}/CLASS/")
    classes = _class_folders(parts[chosen])
    trained = choose_part(parts, "train")
    names = list(classes) if trained in (None, chosen) else list(_class_folders(parts[str(trained)]))
    number = {name: label for label, name in enumerate(names)}
    for name in classes:
        if name not in number:
            raise UserError(f"{chosen}/{name} is a class that {trained}/ does not have; its classes: {_few(names)}")
    ranked = sorted((rank, number[name], path) for name in classes for rank, path in enumerate(classes[name]))
    return ImageFiles(tuple(names), tuple(path for *_, path in ranked), tuple(label for _, label, _ in ranked))


def _class_folders(folder: Path) -> dict[str, list[Path]]:
    """The images of each class folder that has any, both sorted."""
    stray = [path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")]
    if stray:
        raise UserError(
            f"{stray[0].name} in {folder.name}/ lies outside a class folder; move it to {folder.name}/CLASS/"
        )
    found = {path.name: _files_below(path, EXTENSIONS) for path in _folders(folder)}
    classes = {name: files for name, files in found.items() if files}
    if not classes:
        layouts = "train-*.parquet and test-*.parquet, or images in train/CLASS/ and test/CLASS/"
        raise UserError(f"{folder.name}/ holds neither parquet files nor class folders with images; expected {layouts}")
    return classes


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:10])}, ... ({len(names)} in all)"
