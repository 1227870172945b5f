"""Makes the modules of this folder importable from every test, and keeps tests out of the user's own cache."""

import os

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
