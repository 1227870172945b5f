"""A folder belongs to one process at a time; locks that nobody holds any more are taken over."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time

import pytest

from dualhead import lock
from dualhead.errors import UserError
from dualhead.lock import NAME, FolderLock


def write_lock(folder, **owner):
    folder.mkdir(exist_ok=True)
    (folder / NAME).write_text(json.dumps(owner))


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_names_its_owner_and_goes_when_left(tmp_path):
    with FolderLock(tmp_path / "new" / "folder"):
        owner = json.loads((tmp_path / "new" / "folder" / NAME).read_text())
        assert owner == {"host": socket.gethostname(), "pid": os.getpid()}
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_goes_when_what_it_guards_fails(tmp_path):
    with pytest.raises(ValueError, match="anything"), FolderLock(tmp_path):
        raise ValueError("anything")
    assert not (tmp_path / NAME).exists()


def test_a_living_process_keeps_others_out(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        write_lock(tmp_path, host=socket.gethostname(), pid=other.pid)
        with pytest.raises(UserError, match=f"process {other.pid} on {socket.gethostname()}"), FolderLock(tmp_path):
            pass
        assert json.loads((tmp_path / NAME).read_text())["pid"] == other.pid
    finally:
        other.communicate(b"\n")
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_the_same_process_cannot_take_it_twice(tmp_path):
    with FolderLock(tmp_path):
        with pytest.raises(UserError, match="is working there"), FolderLock(tmp_path):
            pass
        assert (tmp_path / NAME).exists()


@pytest.mark.parametrize("owner", [{"pid": dead_pid()}, {"pid": os.getpid()}, {"pid": -1}, {"pid": "x"}, {}])
def test_a_stale_lock_of_this_host_is_taken_over(tmp_path, owner):
    # Its own number: in containers, where numbers repeat, a process before this one had it.
    write_lock(tmp_path, host=socket.gethostname(), **owner)
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_lock_of_another_host_holds_while_it_shows_life(tmp_path):
    write_lock(tmp_path, host="elsewhere", pid=1)
    with pytest.raises(UserError, match="process 1 on elsewhere"), FolderLock(tmp_path):
        pass
    long_ago = time.time() - lock.SILENT_SECONDS - 1
    os.utime(tmp_path / NAME, (long_ago, long_ago))
    with FolderLock(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_an_unreadable_lock_holds_while_it_is_young(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    with pytest.raises(UserError, match="is working there"), FolderLock(tmp_path):
        pass
    os.utime(tmp_path / NAME, (0, 0))
    with FolderLock(tmp_path):
        pass


def test_the_owner_shows_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    with FolderLock(tmp_path):
        os.utime(tmp_path / NAME, (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / NAME).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / NAME).stat().st_mtime > 0


def hold_once(folder, counter, together):
    """Take the lock if it is free, and count that one has it, until all have tried."""
    together.wait()
    try:
        with FolderLock(folder):
            with counter.get_lock():
                counter.value += 1
            together.wait()
    except UserError:
        together.wait()


def test_of_many_that_find_a_stale_lock_at_once_one_gets_it(tmp_path):
    write_lock(tmp_path, host=socket.gethostname(), pid=dead_pid())
    context = multiprocessing.get_context("fork")
    counter, together = context.Value("i", 0), context.Barrier(6, timeout=60)
    processes = [context.Process(target=hold_once, args=(tmp_path, counter, together)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert counter.value == 1
    assert list(tmp_path.iterdir()) == []
