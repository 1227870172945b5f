"""A disk that is full, or data that vanish, end a run with one line; nothing earlier is lost, and it goes on later."""

from __future__ import annotations

import importlib.resources
import os
import resource
import shutil
import subprocess
import sys

import pytest

from dualhead.training import CheckpointStore
from helpers.e2e import TINY
from helpers.resume import outcome

SMALL = (*TINY, "data.train_limit=120", "data.validation=24", "evaluate.limit=16", "runtime.save_minutes=1e-9")


def run(*words, bytes_a_file=None):
    """`dualhead WORDS` in a process that may write so many bytes to a file, as on a disk without room for more."""

    def limit():
        if bytes_a_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, bytes_a_file))

    command = [sys.executable, "-m", "dualhead", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, preexec_fn=limit, timeout=300, check=False
    )


def failed_in_one_line(ended, *says):
    assert ended.returncode == 1, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.startswith("dualhead: ")]
    assert len(lines) == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    assert any(word in lines[0] for word in says), lines[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = run("train", "digits", *SMALL, "--run-dir", folder, "--quiet")
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.mark.slow
def test_training_and_evaluation_go_on_when_there_is_room_again(undisturbed, tmp_path):
    state = max(path.stat().st_size for path in (undisturbed / "checkpoints" / "states").iterdir())
    folder = tmp_path / "run"
    ended = run("train", "digits", *SMALL, "--run-dir", folder, "--quiet", bytes_a_file=state - 1000)
    failed_in_one_line(ended, "File too large", "states")
    assert not list(folder.rglob("*.tmp"))
    assert not (folder / ".lock").exists()
    kept = CheckpointStore(folder / "checkpoints" / "states").load()
    assert kept is None or kept.position.stage <= 2  # what was whole before is whole still
    ended = run("train", "digits", *SMALL, "--run-dir", folder, "--quiet")
    assert ended.returncode == 0, ended.stderr
    assert outcome(folder) == outcome(undisturbed)

    output = tmp_path / "evaluated"
    words = ("evaluate", folder, "--attack", "pgd-3", "--limit", "16", "--output", output, "--quiet")
    failed_in_one_line(run(*words, bytes_a_file=600), "File too large")
    assert not (output / "results.json").exists()
    assert run(*words).returncode == 0
    assert (output / "results.json").is_file()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, in memory, and how to change its size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder]
        return subprocess.run(command, capture_output=True, check=False)

    if shutil.which("mount") is None or mount("size=64k").returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    yield folder, lambda size: mount("remount", f"size={size}")
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_one_line_and_with_room_it_goes_on(undisturbed, small_disk):
    disk, resize = small_disk
    needed = sum(path.stat().st_size for path in undisturbed.rglob("*") if path.is_file())
    begun = False
    for share in (0.2, 0.5):
        resize(int(needed * share))
        ended = run("train", "digits", *SMALL, "--run-dir", disk / "run", "--quiet")
        failed_in_one_line(ended, "No space left on device")
        assert not (disk / "run" / ".lock").exists()
        saved = CheckpointStore(disk / "run" / "checkpoints" / "states").load()
        begun = begun or saved is not None
    assert begun, "the disk was full before anything could be lost"
    resize("64m")
    ended = run("train", "digits", *SMALL, "--run-dir", disk / "run", "--quiet")
    assert ended.returncode == 0, ended.stderr
    assert outcome(disk / "run") == outcome(undisturbed)


@pytest.mark.slow
def test_data_that_vanish_between_two_starts_are_told_and_the_run_stays(undisturbed, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(str(importlib.resources.files("dualhead.data") / "digits"), data)
    folder = tmp_path / "run"
    words = ("train", "digits", *SMALL, f"data.source={data}", "--run-dir", folder, "--quiet")
    assert run(*words).returncode == 0
    before = outcome(folder)
    shutil.rmtree(data)
    ended = run(*words)
    assert ended.returncode == 2
    assert "no such file or folder" in ended.stderr
    assert outcome(folder) == before
