"""Makes the modules of this folder importable from every test, and keeps tests out of the user's own cache."""

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("untimed")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DUALHEAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
