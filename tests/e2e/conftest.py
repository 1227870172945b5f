"""One tiny finished run that many tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.e2e import TINY, dualhead


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """A finished run of three stages; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    ended = dualhead("train", "digits", *TINY, "--run-dir", folder, "--quiet", "--json")
    assert ended.status == 0, ended.err
    return folder
