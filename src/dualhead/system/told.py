"""Warnings are told once: by the first process of a group, and not again for the same text."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class Once(logging.Filter):
    """Drops what was said before: a folder is read for its training part and again for its test part."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record's text is new."""
        text = record.getMessage()
        new = text not in self._said
        self._said.add(text)
        return new


@contextmanager
def told_once() -> Iterator[None]:
    """Print no warning twice while inside, where nobody has set up logging."""
    handler, once = logging.lastResort, Once()
    if handler is not None:
        handler.addFilter(once)
    try:
        yield
    finally:
        if handler is not None:
            handler.removeFilter(once)


@contextmanager
def silent_unless(*, first: bool) -> Iterator[None]:
    """Keep warnings of the package back while inside, in a process that is not the first: all find out the same."""
    log = logging.getLogger("dualhead")
    level = log.level
    if not first:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
