"""A folder belongs to one process at a time."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any, Self

from dualhead.errors import UserError

NAME = ".lock"
BEAT_SECONDS = 30.0
"""How often the owner shows that it lives, for processes on other machines, which cannot ask for it."""
SILENT_SECONDS = 300.0
"""After so long without a sign the owner on another machine counts as gone."""

_held: set[Path] = set()


class FolderLock:
    """Holds a folder while it is entered: a file there names host and process of the owner.

    A lock left behind by a process that is gone is taken over: on the same host the system is asked whether the process
    lives; of an owner on another host only the age of its last sign of life is known.

    Args:
        folder: is made if need be.

    Raises:
        UserError: on entering, if another process has the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._show_life, daemon=True)

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while not self._take():
            owner = _read(self._path)
            if owner is None:
                continue  # given back in this moment
            if self._path.resolve() in _held or _lives(owner, self._path):
                who = (
                    f"process {owner.get('pid')} on {owner.get('host')}" if owner else "a process that has not said who"
                )
                raise UserError(
                    f"{self._path.parent}: {who} is working there; wait for it, choose another --run-dir, or remove "
                    f"{self._path} if it is gone for sure"
                )
            self._remove(owner)
        _held.add(self._path.resolve())
        self._beat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._beat.join()
        _held.discard(self._path.resolve())
        if self._is_mine():
            self._path.unlink(missing_ok=True)

    def _take(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(_this_process(), file)
        except OSError:  # no space: a lock that names nobody would keep all out until it is old
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _is_mine(self) -> bool:
        """Whether the lock still names this process: another may have taken over while it was suspended."""
        return _read(self._path) == _this_process()

    def _remove(self, stale: dict[str, Any]) -> None:
        """Remove a stale lock, unless somebody else has just done so and locked the folder."""
        aside = self._path.with_name(f"{NAME}.{socket.gethostname()}.{os.getpid()}.tmp")
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return
        if _read(aside) == stale:
            aside.unlink()
        else:
            aside.replace(self._path)

    def _show_life(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a network's file system may fail for a moment
                if self._is_mine():
                    os.utime(self._path)


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _state(os.getpid())[1]}


def _state(pid: int) -> tuple[str, str | None]:
    """What Linux says of a process: a letter, and when it started, in ticks since a boot that is named too.

    None, and no letter, where there is no such process, or no such system.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return "", None
    return fields[0], f"{fields[19]} of {boot}"


def owner_of(folder: Path) -> dict[str, Any] | None:
    """Host and process that work in a folder; None if nobody does, or only one that is gone."""
    path = folder / NAME
    owner = _read(path)
    return owner if owner is not None and (path.resolve() in _held or _lives(owner, path)) else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:  # its owner has not written into it yet, or never will: then its age decides
        content = {}
    return content if isinstance(content, dict) else {}


def _lives(owner: dict[str, Any], path: Path) -> bool:
    if owner.get("host") != socket.gethostname():
        try:
            return time.time() - path.stat().st_mtime < SILENT_SECONDS
        except FileNotFoundError:
            return False
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0 or pid == os.getpid():  # this process does not hold it, so it is another's
        return False
    state, started = _state(pid)
    if state:  # a zombie is dead, and not yet waited for; one that started later has the number of one that is gone
        return state not in ("Z", "X") and owner.get("started") in (None, started)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process, alive
        pass
    return True
