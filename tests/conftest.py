"""Keeps tests out of the user's own cache, and their temporary files in memory where there is room."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("untimed")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Workers of one session share it, so that each architecture is measured once."""
    shared = "PYTEST_XDIST_WORKER" in os.environ
    folder = tmp_path_factory.getbasetemp().parent / "cache" if shared else tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DUALHEAD_CACHE", str(folder))
        patch.delenv("DUALHEAD_PRECISION", raising=False)
        yield


MEMORY = Path("/dev/shm")
ROOM = 4 << 30
"""Bytes that must be free there; a whole run of the tests leaves a tenth of it."""


def pytest_configure(config):
    """Runs flush every file that they write; on a disk the tests would wait for that a sixth of their time."""
    if config.option.basetemp is None and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
