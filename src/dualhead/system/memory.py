"""Memory that the process keeps."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_blocks() -> None:
    """Have glibc keep what is freed, up to blocks of 32 MiB and 1 GiB in all, instead of handing it to the system.

    Passes on a CPU ask for the same large blocks again and again, and the kernel zeroes each that it hands out anew:
    up to a fifth of the time of a small network's pass in float32. glibc learns this by itself, but only from the
    sizes that it happens to see freed. Another C library is left as it is. For processes that are our own: a library
    does not change its host's memory.
    """
    with suppress(OSError, AttributeError):  # no C library of that kind
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
