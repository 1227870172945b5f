"""Code from outside the package: files and modules that define components, found, run, told of and told apart.

A component may be named by its address, `my_file.py:Class` or `my_package.module:Class`. A *source* is the file or
module before the colon. The same sources may register components by name instead: as `plugins` of a recipe, as
`--plugin`, or as an entry point of an installed package (group `dualhead.components`).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from dualhead.errors import UserError, one_line

_log = logging.getLogger(__name__)

ENTRY_POINTS: Final = "dualhead.components"
"""Group of entry points whose modules register components when imported."""
_DOTTED: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_FILE: Final = ".py"


@dataclass(frozen=True)
class Source:
    """A file or module from outside that has been run.

    Args:
        name: absolute path of a file, or dotted name of a module.
        file: absolute path of the source file.
        sha256: digest of the file's bytes, in hexadecimal digits.
        package: distribution whose entry point named it; None for any other.
    """

    name: str
    file: str
    sha256: str
    package: str | None = None

    @property
    def folder(self) -> Path:
        """The folder that must be searched to find the source by its name."""
        return _root(self.name, Path(self.file))

    def describe(self) -> dict[str, str]:
        """Return plain data, as a run keeps it and `refuse_changed` reads it."""
        return {"name": self.name, "file": self.file, "sha256": self.sha256}

    def __str__(self) -> str:
        kind = "file" if self.name == self.file else "module"
        place = "" if kind == "file" else f" ({self.file})"
        return f"{kind} {self.name}{place}" + (f" of package {self.package}" if self.package else "")


@dataclass
class _Loaded:
    """A source, its module, and how to take back what it registered."""

    source: Source
    module: ModuleType
    undo: list[Callable[[], None]] = field(default_factory=list)


_loaded: dict[str, _Loaded] = {}
_loading: list[tuple[str, str, list[Callable[[], None]]]] = []
"""Name of the source, name of its module, and what it has registered; of those being run now, the innermost last."""
_folders: list[Path] = []
"""Where files and modules are looked for before the current folder."""
_stand_ins: dict[str, Path] = {}
"""Copies of files that are not where they were, by the path where they were."""
_broken: dict[str, str] = {}
"""Why the entry points of a package failed."""
_installed_loaded = False


# ---- names and places


def split_address(text: str) -> tuple[str, str] | None:
    """Return source and attribute of an address; None if the text is none."""
    source, colon, attribute = text.rpartition(":")
    if not colon or not _DOTTED.fullmatch(attribute):
        return None
    return (source, attribute) if is_file(source) or _DOTTED.fullmatch(source) else None


def is_file(source: str) -> bool:
    """Whether the name of a source means a file, not a module."""
    return source.endswith(_FILE)


@contextmanager
def searched_in(folders: Iterable[Path]) -> Iterator[None]:
    """Look for files and modules in these folders first, in their order, then in the current one."""
    before = list(_folders)
    _folders[:] = [folder.absolute() for folder in folders]
    try:
        yield
    finally:
        _folders[:] = before


def _places() -> list[Path]:
    return list(dict.fromkeys([*_folders, Path.cwd()]))


def located(source: str) -> str:
    """Return the name of a source that means the same in any folder: an absolute path, or a module's name.

    Raises:
        UserError: if it is neither a file that exists nor the name of a module.
    """
    if not is_file(source):
        if not _DOTTED.fullmatch(source):
            raise UserError(f"plugin {source!r}: write a file, my_file.py, or a module, my_package.module")
        return source
    path = Path(source).expanduser()
    tried = [path] if path.is_absolute() else [folder / path for folder in _places()]
    try:
        found = next((place for place in tried if place.is_file()), None)
    except (OSError, ValueError):  # a name that no file can have
        found = None
    found = found or _stand_ins.get(source)
    if found is None:
        where = "" if path.is_absolute() else f" in {' or '.join(str(folder) for folder in _places())}"
        raise UserError(f"plugin {source}: no such file{where}")
    return str(found.resolve())


# ---- running code


def load(source: str, package: str | None = None) -> ModuleType:
    """Run a file or import a module, once; a file that has changed since is run again.

    The first process says so in one line, with the first digits of the digest.

    Args:
        source: as `located` takes it.
        package: distribution whose entry point names it.

    Raises:
        UserError: if it does not exist or fails, with the place.
    """
    name = located(source)
    known = _loaded.get(name)
    if known is not None and (not is_file(name) or known.source.sha256 == digest(Path(name))):
        return known.module
    if known is not None:
        _take_back(known.undo)
        del _loaded[name]
    undo: list[Callable[[], None]] = []
    module_name = _module_name(name) if is_file(name) else name
    _loading.append((name, module_name, undo))
    try:
        module = _run(Path(name), module_name) if is_file(name) else _import(name)
    except BaseException:
        _take_back(undo)
        raise
    finally:
        _loading.pop()
    file = getattr(module, "__file__", None) if not is_file(name) else name
    if file is None and hasattr(module, "__path__"):
        raise UserError(f"plugin {name}: is a package without a file of its own; name the module that holds the class")
    if file is None:  # made in memory, as in a notebook
        _log.warning("code from outside is run: module %s, which has no file; a change of it will not be noticed", name)
        return module
    if name not in _loaded:
        _note(name, Path(file), module, package).undo = undo
    return module


def _note(name: str, file: Path, module: ModuleType, package: str | None = None) -> _Loaded:
    """Keep and tell that a source was run."""
    source = Source(name, str(file.resolve()), digest(file), package)
    _loaded[name] = _Loaded(source, module)
    if os.environ.get("RANK", "0") == "0":  # of several processes one tells
        _log.warning("code from outside is run: %s, sha256 %s", source, source.sha256[:12])
    return _loaded[name]


def _take_back(undo: list[Callable[[], None]]) -> None:
    for step in reversed(undo):
        step()
    undo.clear()


def _module_name(path: str) -> str:
    stem = re.sub(r"\W", "_", Path(path).stem)
    return f"dualhead_plugin_{stem}_{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def _run(path: Path, name: str) -> ModuleType:
    """Run a file as a module of its own, which may import its neighbours."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a path that ends in .py has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pydantic look annotations up there
    try:
        # Not through the loader, whose cache takes a file that changed within a second, to the same size, for the old.
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # whatever somebody else's file may raise
        del sys.modules[name]
        raise UserError(f"plugin {path}{_line_in(path, error)}: {reason(error)}") from error
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import(name: str) -> ModuleType:
    """Import a module, which may lie in the folders that are searched, as with `python -m`."""
    for folder in reversed(_places()):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"importing {name!r} failed: {reason(error)}") from error
        where = " or ".join(str(folder) for folder in _places())
        raise UserError(f"there is no module {error.name!r}, neither installed nor in {where}") from None
    except (Exception, SystemExit) as error:  # whatever somebody else's module may raise
        raise UserError(f"importing {name!r} failed: {reason(error)}{_place(error)}") from error


def reason(error: BaseException) -> str:
    """Return an exception in one line; a `UserError` says all in its message."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}"
    return (f"{type(error).__name__}: {error}".splitlines() or [""])[0].removesuffix(": ")


def _line_in(path: Path, error: BaseException) -> str:
    """Return `, line N` for the last line of a file that ran when an error arose; empty if there is none."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def _place(error: BaseException) -> str:
    """Return the file and line that raised an error, if it is not this package's, in brackets."""
    own = str(Path(__file__).parents[1])
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(("<", own))]
    if isinstance(error, SyntaxError):
        return f" ({error.filename}, line {error.lineno})"
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def find(address: str, where: str = "") -> tuple[str, Any]:
    """Return an address that means the same in any folder, and what it names, after running its source.

    Args:
        address: `my_file.py:Class` or `my_package.module:Class`.
        where: what begins a message, e.g. `objective 'my_file.py:Class'`.

    Raises:
        UserError: if there is no such file, module or attribute, or its code fails.
    """
    split = split_address(address)
    begin = f"{where}: " if where else ""
    if split is None:
        raise UserError(f"{begin}write my_file.py:NAME or my_package.module:NAME")
    source, attribute = split
    try:
        found: Any = load(source)
    except UserError as error:
        raise UserError(f"{begin}{error}") from error
    kind = "file" if is_file(source) else "module"
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(f"{begin}{kind} {source!r} has no {attribute!r}")
        found = getattr(found, part)
    return f"{located(source)}:{attribute}", found


# ---- what registers while its source is run


def address_of_registered(cls: type, undo: Callable[[], None]) -> str | None:
    """Return the address of a class that a source registers while it is run; None if no source is run.

    Args:
        cls: the class.
        undo: takes the registration back, if the source fails later or is run again.
    """
    if not _loading or cls.__module__ == "dualhead" or cls.__module__.startswith("dualhead."):
        return None
    name, module_name, taken_back = _loading[-1]
    taken_back.append(undo)
    if "<locals>" in cls.__qualname__:
        return None
    if cls.__module__ == module_name:
        return f"{name}:{cls.__qualname__}"
    own = cls.__module__  # of a module that the source imports
    module = sys.modules.get(own)
    file = getattr(module, "__file__", None)
    if module is None or file is None or own == "__main__":
        return None
    if own not in _loaded:
        _note(own, Path(file), module)
    return f"{own}:{cls.__qualname__}"


def is_loading() -> bool:
    """Whether the code of a source is being run."""
    return bool(_loading)


def origin(cls: type) -> str | None:
    """Return where a component's class comes from, for people: a package, file or module; None if it ships."""
    if cls.__module__.startswith("dualhead."):
        return None
    split = split_address(str(cls.__dict__.get("address", "")))
    known = _loaded.get(split[0]) if split else None
    if split is not None and is_file(split[0]):
        return split[0]
    if known is None:
        return f"module {cls.__module__}"
    if (package := _package_of(known.source)) is not None:
        return f"package {package}"
    return f"module {known.source.name}"


def code_of(cls: type) -> str | None:
    """Return the digest of the file that defines a class from outside; None if it ships, or was made in memory."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return None if cls.__module__.startswith("dualhead.") or file is None else digest(Path(file))


def _package_of(source: Source) -> str | None:
    """Return the distribution of a source or of the package that it lies in, if an entry point named that."""
    if is_file(source.name):
        return None
    top = source.name.partition(".")[0]
    named = (known.source for known in _loaded.values() if known.source.package is not None)
    return source.package or next((other.package for other in named if other.name.partition(".")[0] == top), None)


# ---- installed packages


def load_installed() -> bool:
    """Import the modules that installed packages name as entry points, once in a process.

    A package that fails is told in one line, and kept for `broken`.

    Returns:
        Whether any was imported now, or failed.
    """
    global _installed_loaded  # noqa: PLW0603  # a process imports them once
    if _installed_loaded:
        return False
    _installed_loaded = True
    points = sorted(entry_points(group=ENTRY_POINTS), key=lambda point: (point.name, point.value))
    for point in points:
        package = _distribution(point)
        try:
            load(point.module, package)
        except UserError as error:
            _broken[package] = str(error)
            _log.warning("package %s is left out: %s", package, one_line(str(error)))
    return bool(points)


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.name


def broken() -> str:
    """Return what an unknown name may be due to: `; package NAME failed: WHY`, or nothing."""
    return "".join(f"; package {package}, which might have it, failed: {why}" for package, why in _broken.items())


# ---- what a run keeps


def digest(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def sources_in(content: Any) -> list[Source]:
    """Return the sources that plain data name: as a plugin, or in an address; in the order of the data.

    Args:
        content: a resolved recipe, or an architecture.
    """
    found: dict[str, Source] = {}
    for text in _texts(content):
        split = split_address(text)
        for name in [text, *(split or ())[:1]]:
            if name in _loaded:
                found[name] = _loaded[name].source
    return list(found.values())


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _texts(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _texts(value)


def records_in(content: Any, where: str) -> list[dict[str, str]]:
    """Return records of sources that a file held.

    Raises:
        UserError: if they are none.
    """
    keys = ("name", "file", "sha256")
    listed: list[Any] = content if isinstance(content, list) else [None]
    if not all(isinstance(r, dict) and all(isinstance(r.get(key), str) for key in keys) for r in listed):
        raise UserError(f"{where}: must list plugins by {', '.join(keys)}")
    return [{key: record[key] for key in keys} for record in listed]


def refuse_changed(
    records: Sequence[dict[str, str]], owner: str, copies: Path | None = None, *, stand_in: bool = False
) -> None:
    """Refuse sources that are not those with which something was made; nothing of them is run.

    Modules are afterwards found where they were, also from another folder.

    Args:
        records: as `Source.describe` gave them.
        owner: what was made with them, for the message.
        copies: folder with a copy of each file, named by `copy_name`.
        stand_in: whether a copy is run in the place of a file that is not there.

    Raises:
        UserError: naming the file, and what to do.
    """
    for record in records:
        name, before = record["name"], record["sha256"]
        file = Path(name) if is_file(name) else _module_file(name, record["file"])
        kept = None if copies is None else copies / copy_name(record)
        old = f"put back the file {kept}" if kept is not None and kept.is_file() else "put back that version"
        if stand_in and is_file(name) and not Path(name).is_file() and kept is not None and kept.is_file():
            file = _stand_ins[name] = kept
        if file is None or not file.is_file():
            told = name if is_file(name) else f"module {name} ({record['file']})"
            raise UserError(f"{owner}: needs {told}, which is not there; {old}")
        now = digest(file)
        if now != before:
            raise UserError(
                f"{owner}: was made with another version of {file} (sha256 {before[:12]}, now {now[:12]}); {old}, or "
                "begin anew in another folder"
            )


def copy_name(record: dict[str, str]) -> str:
    """Return the name of a copy of a source file; another version has another."""
    path = Path(record["file"])
    return f"{path.stem}-{record['sha256'][:12]}{path.suffix}"


def _module_file(name: str, file: str | None = None) -> Path | None:
    """Return the file of a module; if it is found nowhere, in the folder where it was when `file` held it."""
    try:
        importlib.invalidate_caches()
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        spec = None
    except Exception:  # of the packages that it lies in; whoever imports it says more
        return None if file is None else Path(file)
    if spec is not None and spec.origin not in (None, "built-in", "frozen"):
        return Path(str(spec.origin))
    if file is None or not Path(file).is_file():
        return None
    root = str(_root(name, Path(file)))
    if root not in sys.path:
        sys.path.append(root)
        return _module_file(name, None)
    return None


def _root(name: str, file: Path) -> Path:
    """Return the folder of a file, or that from which a module is imported that lies in it."""
    return file.parent if is_file(name) else file.parents[name.count(".") + (file.name == "__init__.py")]
