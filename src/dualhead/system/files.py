"""Files that are either whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

from dualhead.errors import UserError

_LONGEST_NAME = 200
"""Bytes of a name that `shortened_name` lets pass; file systems take 255, and files aside have longer names."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file aside, put it on the disk, then give it its name; a crash leaves the old file or the new.

    Args:
        path: the file; its folder is made if need be.
        write: writes to the path it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.touch()
        mode = aside.stat().st_mode  # as the umask has it; safetensors would let nobody but the owner read
        write(aside)
        aside.chmod(mode)
        _flush(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    _flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically."""
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON with keys as given and a final newline, atomically; refuse numbers that are not finite."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def head_sentence(path: Path) -> str:
    """Return the first sentence of the comment at the head of a YAML file; empty if there is none."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    comment = " ".join(line.removeprefix("#").strip() for line in lines)
    found = re.match(r".*?\.(?=\s+[A-Z]|$)", comment)
    return found[0] if found else comment


def shortened_name(name: str) -> str:
    """Return a name that file systems take: the end of one that is too long gives way to a digest of the whole."""
    encoded = name.encode()
    if len(encoded) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    return f"{encoded[: _LONGEST_NAME - len(digest) - 1].decode(errors='ignore')}-{digest}"


def check_folder(folder: Path, option: str) -> None:
    """Refuse a path that is no folder, or a folder that cannot be written to; nothing is made.

    Args:
        folder: there already or to be made later.
        option: the option it was given by, for the message.

    Raises:
        UserError: if it, or what it would lie in, is a file or may not be written to.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"{option} {folder}: {'it' if nearest == folder else nearest} is a file; choose another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{option} {folder}: no permission to write in {nearest}; choose another folder")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
