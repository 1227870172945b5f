"""How threads wait for one another: they spin shortly and then sleep, so that a busy machine loses no time on them."""

from __future__ import annotations

import os
import time
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Final

SHORT_SPIN: Final = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
"""For GNU's runtime rounds of a loop, for LLVM's and Intel's milliseconds; their own defaults are 300,000 (without end
where a policy asks for it) and 200."""
SHORTER_SPIN: Final = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
"""On a machine whose processors are all busy: a core that waits is worth more to the thread that is waited for."""
STATISTICS: Final = Path("/proc/stat")
LOOKS: Final = 5
APART: Final = 0.003
"""How often the number of running tasks is read, and seconds between: the fewest count, since many run for a moment."""
CHOICES: Final = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables by which a user says how threads wait; one of them, and nothing is changed."""


def others_running(statistics: Path = STATISTICS) -> int | None:
    """Return how many tasks but this one want a processor, on the whole machine; None where the kernel does not tell.

    Args:
        statistics: the kernel's, which is read anew at each look.
    """
    seen = []
    for look in range(LOOKS):
        if look:
            time.sleep(APART)
        with suppress(OSError, ValueError, IndexError):
            seen.append(int(statistics.read_text("ascii").split("procs_running ")[1].split()[0]) - 1)
    return min(seen, default=None)


def wait_shortly(environment: MutableMapping[str, str] = os.environ, statistics: Path = STATISTICS) -> None:
    """Let threads of OpenMP sleep after a short spin, here and in the processes that this one starts.

    Shorter still where the others keep all processors busy already. The runtime reads its variables when it is loaded,
    which is when torch is. Called later, this reaches only processes that are started from then on.

    Args:
        environment: of the process; changed only where it says nothing of waiting.
        statistics: as for `others_running`.
    """
    if any(name in environment for name in CHOICES):
        return
    others = others_running(statistics)
    busy = others is not None and others >= (os.cpu_count() or 1)
    environment.update(SHORTER_SPIN if busy else SHORT_SPIN)
