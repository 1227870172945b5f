"""How threads wait for one another: they spin shortly and then sleep, so that a busy machine loses no time on them."""

from __future__ import annotations

import os
import time
from collections.abc import MutableMapping
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
"""Times that the number of running tasks must be high, since many run for a moment, and seconds between them."""
CHOICES: Final = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables by which a user says how threads wait; one of them, and nothing is changed."""


def all_busy(statistics: Path = STATISTICS) -> bool:
    """Tell whether other tasks keep every processor of the machine busy; not where the kernel does not tell.

    Args:
        statistics: the kernel's, which is read anew at each look.
    """
    for look in range(LOOKS):
        if look:
            time.sleep(APART)
        try:
            running = int(statistics.read_text("ascii").split("procs_running ")[1].split()[0])
        except (OSError, ValueError, IndexError):
            return False
        if running - 1 < (os.cpu_count() or 1):  # this process runs too
            return False
    return True


def wait_shortly(environment: MutableMapping[str, str] = os.environ, statistics: Path = STATISTICS) -> None:
    """Let threads of OpenMP sleep after a short spin, here and in the processes that this one starts.

    Shorter still where the others keep all processors busy already. The runtime reads its variables when it is loaded,
    which is when torch is. Called later, this reaches only processes that are started from then on.

    Args:
        environment: of the process; changed only where it says nothing of waiting.
        statistics: as for `all_busy`.
    """
    if not any(name in environment for name in CHOICES):
        environment.update(SHORTER_SPIN if all_busy(statistics) else SHORT_SPIN)
