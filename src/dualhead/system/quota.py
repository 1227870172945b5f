"""How many processors a container may use: its quota of time, which the number of processors does not show."""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Final

CGROUP: Final = Path("/sys/fs/cgroup")
CHOICES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user says how many threads there are; one of them, and nothing is changed."""


def quota(folder: Path = CGROUP) -> float | None:
    """Return how many processors' time the container's quota allows; None without a quota or on another system.

    Args:
        folder: where the kernel tells of the control group, of version 2 or 1.
    """
    with suppress(OSError, ValueError, IndexError):
        allowed, period = (folder / "cpu.max").read_text("ascii").split()[:2]
        return None if allowed == "max" else int(allowed) / int(period)
    with suppress(OSError, ValueError, ZeroDivisionError):
        allowed_us = int((folder / "cpu" / "cpu.cfs_quota_us").read_text("ascii"))
        period_us = int((folder / "cpu" / "cpu.cfs_period_us").read_text("ascii"))
        return None if allowed_us <= 0 else allowed_us / period_us
    return None


def processors(folder: Path = CGROUP) -> int:
    """Return the number of processors that this process can keep busy, at least 1: usable ones, within the quota."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = quota(folder)
    return usable if allowed is None else max(1, min(usable, math.ceil(allowed)))


def fit_threads(environment: MutableMapping[str, str] = os.environ, folder: Path = CGROUP) -> None:
    """Let there be no more threads than the container's quota has processors, here and in processes started from here.

    Threads beyond it would use the quota up early in each period and then all stand still. The runtime reads the
    variable when it is loaded, which is when torch is. Without a quota nothing is changed.

    Args:
        environment: of the process; changed only where it says nothing of threads.
        folder: as for `quota`.
    """
    if quota(folder) is not None and not any(name in environment for name in CHOICES):
        environment["OMP_NUM_THREADS"] = str(processors(folder))
