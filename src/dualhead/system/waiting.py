"""How threads wait for one another: they spin shortly and then sleep, so that a busy machine loses no time on them."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Final

SHORT_SPIN: Final = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
"""For GNU's runtime rounds of a loop, for LLVM's and Intel's milliseconds; their own defaults are 300,000 (without end
where a policy asks for it) and 200."""
CHOICES: Final = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables by which a user says how threads wait; one of them, and nothing is changed."""


def wait_shortly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads of OpenMP sleep after a short spin, here and in the processes that this one starts.

    The runtime reads its variables when it is loaded, which is when torch is. Called later, this reaches only processes
    that are started from then on.

    Args:
        environment: of the process; changed only where it says nothing of waiting.
    """
    if not any(name in environment for name in CHOICES):
        environment.update(SHORT_SPIN)
