"""A folder belongs to one process at a time; locks that nobody holds any more are taken over."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time

import pytest

from dualhead.errors import UserError
from dualhead.system import lock
from dualhead.system.lock import NAME, FolderLock


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
        assert (owner["host"], owner["pid"]) == (socket.gethostname(), os.getpid())
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what /proc says")
def test_of_a_process_that_died_and_was_not_waited_for_the_lock_is_stale(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write_lock(tmp_path, host=socket.gethostname(), pid=other.pid)
    other.kill()
    while lock._state(other.pid)[0] != "Z":
        time.sleep(0.01)
    with FolderLock(tmp_path):
        pass
    other.communicate()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what /proc says")
def test_a_process_that_got_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        started = lock._state(other.pid)[1]
        write_lock(tmp_path, host=socket.gethostname(), pid=other.pid, started=started)
        with pytest.raises(UserError, match="is working there"), FolderLock(tmp_path):
            pass
        write_lock(tmp_path, host=socket.gethostname(), pid=other.pid, started="1 of a boot before")
        with FolderLock(tmp_path):
            pass
    finally:
        other.communicate(b"\n")


def test_one_failure_of_the_file_system_does_not_end_the_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    touch, failed = os.utime, []

    def fails_once(path, *more):
        if not failed:
            failed.append(path)
            raise OSError(errno.ESTALE, "Stale file handle")
        touch(path, *more)

    with FolderLock(tmp_path):
        touch(tmp_path / NAME, (0, 0))
        monkeypatch.setattr(os, "utime", fails_once)
        deadline = time.monotonic() + 10
        while (tmp_path / NAME).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert failed
        assert (tmp_path / NAME).stat().st_mtime > 0


def test_a_lock_that_another_has_taken_over_stays_its(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    with FolderLock(tmp_path):
        write_lock(tmp_path, host="elsewhere", pid=1)
        os.utime(tmp_path / NAME, (0, 0))
        time.sleep(0.1)
        assert (tmp_path / NAME).stat().st_mtime == 0
    assert json.loads((tmp_path / NAME).read_text())["host"] == "elsewhere"


def test_a_lock_that_there_was_no_room_for_does_not_stay(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", full)
        with pytest.raises(OSError, match="No space left"), FolderLock(tmp_path):
            pass
    with FolderLock(tmp_path):
        pass


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
