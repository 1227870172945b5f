"""Decoded images on disk, so that a data set is decoded once.

The folder is `measured.cache_folder`. It may be deleted at any time. A file that cannot be read or written is worth a
line in the log and never an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import PIL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dualhead.data.split import Split
from dualhead.errors import UserError
from dualhead.system.measured import cache_folder

_log = logging.getLogger(__name__)
_VERSION = 2  # counts changes of what is stored


def folder() -> Path:
    """Where decoded images are kept."""
    return cache_folder()


def key_of(files: Iterable[Path], options: object) -> str:
    """A key that changes with the files (absolute path, size, time of change), the options, and what decodes them."""
    stats = [(str(path), path.stat()) for path in files]
    described = [_VERSION, PIL.__version__, options, [(path, s.st_size, s.st_mtime_ns) for path, s in stats]]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


def _checksum(images: Tensor, labels: Tensor) -> str:
    return str(zlib.crc32(labels.numpy().data, zlib.crc32(images.numpy().data)))


def read(key: str) -> Split | None:
    """The split stored under a key; None if there is none, or it is damaged."""
    try:
        path = folder() / f"{key}.safetensors"
        if not path.exists():
            return None
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            images, labels = file.get_tensor("images"), file.get_tensor("labels")
        if metadata["checksum"] != _checksum(images, labels):
            raise ValueError("its checksum does not fit")
        skipped = tuple(json.loads(metadata["skipped"]))
        return Split(images, labels, tuple(json.loads(metadata["class_names"])), skipped)
    except (OSError, RuntimeError, SafetensorError, UserError, ValueError, KeyError, TypeError) as error:
        _log.warning("ignored the cached images under %s: %s", key, error)
        return None


def write(key: str, split: Split) -> None:
    """Store a split; another process sees all of it or nothing."""
    temporary, images = None, split.images[:]
    try:
        folder().mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder(), suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        metadata = {
            "checksum": _checksum(images, split.labels),
            "class_names": json.dumps(split.class_names),
            "skipped": json.dumps(split.skipped),
        }
        save_file({"images": images, "labels": split.labels}, temporary, metadata)
        temporary.replace(folder() / f"{key}.safetensors")
    except (OSError, RuntimeError, SafetensorError) as error:
        _log.warning("the decoded images are not kept for the next run: %s", error)
        if temporary is not None:
            temporary.unlink(missing_ok=True)
