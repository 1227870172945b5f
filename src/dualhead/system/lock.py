"""A folder belongs to one process at a time."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, SoftFileLock, Timeout

from dualhead.errors import UserError

NAME = ".lock"
_PATIENCE = 1.0
"""Seconds to wait for a folder: `owner_of` holds a lock for a moment, and a process that ends may need one."""


class FolderLock:
    """Holds a folder while it is entered; a file there names host and process of the owner.

    The lock is the operating system's, through `filelock`: it goes with the process that holds it, however that ends,
    and holds between hosts where the network file system passes locks on. Where a file system has none, the file itself
    is the lock, which a crash on another host leaves behind.

    Args:
        folder: is made if need be.

    Raises:
        UserError: on entering, if another process has the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._lock = FileLock(self._path, thread_local=False)

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=_PATIENCE)
        except Timeout:
            owner = _read(self._path)
            who = f"process {owner.get('pid')} on {owner.get('host')}" if owner else "a process that has not said who"
            raise UserError(
                f"{self._path.parent}: {who} is working there; wait for it, choose another --run-dir, or remove "
                f"{self._path} if it is gone for sure"
            ) from None
        try:
            if not self._file_is_the_lock():
                owner = {"host": socket.gethostname(), "pid": os.getpid()}
                self._path.write_text(json.dumps(owner), encoding="utf-8")
        except BaseException:  # no space, say
            self._leave()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        if not self._file_is_the_lock():
            self._path.unlink(missing_ok=True)  # while it is locked: whoever waits for this file sees that it is gone
        self._lock.release()

    def _file_is_the_lock(self) -> bool:
        """Whether filelock has found no locks on this file system: it then writes the owner itself."""
        return isinstance(self._lock, SoftFileLock)


def owner_of(folder: Path) -> dict[str, Any] | None:
    """Return host and process that work in a folder; None if nobody does."""
    path = folder / NAME
    if not path.is_file():
        return None
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except (Timeout, PermissionError):  # somebody else's folder, whose lock may only be read
        return _read(path)
    lock.release()
    return None


def _read(path: Path) -> dict[str, Any]:
    """Return host and process that a lock names; nothing if it does not name them, or not yet."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return {}
    try:
        owner = json.loads(text)
    except ValueError:  # filelock's own form: number and host, one a line
        number, _, host = text.partition("\n")
        return {"host": host.splitlines()[0], "pid": int(number)} if number.isdigit() and host.strip() else {}
    return owner if isinstance(owner, dict) else {}
