"""A folder belongs to one process at a time, and to nobody once that process is gone, however it ended."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from filelock import SoftFileLock

from dualhead.errors import UserError
from dualhead.system import lock
from dualhead.system.lock import NAME, FolderLock, owner_of

HOLD = "import sys; from pathlib import Path; from dualhead.system.lock import FolderLock\n"
HOLD += "with FolderLock(Path(sys.argv[1])): print('held', flush=True); input()"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE", 0.1)


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder until it is told to stop, or killed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], **pipes)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def me():
    return {"host": socket.gethostname(), "pid": os.getpid()}


def test_names_its_owner_and_goes_when_left(tmp_path):
    folder = tmp_path / "new" / "folder"
    with FolderLock(folder):
        assert json.loads((folder / NAME).read_text()) == me()
        assert owner_of(folder) == me()
    assert list(folder.iterdir()) == []
    assert owner_of(folder) is None


def test_goes_when_what_it_guards_fails(tmp_path):
    with pytest.raises(ValueError, match="anything"), FolderLock(tmp_path):
        raise ValueError("anything")
    assert not (tmp_path / NAME).exists()


def test_a_living_process_keeps_others_out(tmp_path, other):
    says = f"process {other.pid} on {socket.gethostname()} is working there; wait for it, choose another --run-dir"
    with pytest.raises(UserError, match=says), FolderLock(tmp_path):
        pass
    assert owner_of(tmp_path) == {"host": socket.gethostname(), "pid": other.pid}
    other.communicate(b"\n")
    assert other.returncode == 0
    with FolderLock(tmp_path):
        assert owner_of(tmp_path) == me()


def test_the_same_process_cannot_take_it_twice(tmp_path):
    with FolderLock(tmp_path):
        with pytest.raises(UserError, match=f"process {os.getpid()} on .* is working there"), FolderLock(tmp_path):
            pass
        assert owner_of(tmp_path) == me()


def test_of_a_process_that_was_killed_the_lock_is_free_before_it_is_waited_for(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while owner_of(tmp_path) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / NAME).exists()
    assert owner_of(tmp_path) is None
    with FolderLock(tmp_path):
        assert owner_of(tmp_path) == me()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"pid": 1}', '{"host": "elsewhere", "pid": 1}', "\x00"])
def test_a_file_that_nobody_holds_is_taken_over(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    assert owner_of(tmp_path) is None
    with FolderLock(tmp_path):
        assert owner_of(tmp_path) == me()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "17", "17\n"])
def test_an_owner_that_has_not_said_who_keeps_others_out(tmp_path, content):
    with FolderLock(tmp_path):
        (tmp_path / NAME).write_text(content)
        with pytest.raises(UserError, match="a process that has not said who is working there"), FolderLock(tmp_path):
            pass


def test_a_lock_that_may_only_be_read_names_its_owner(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / NAME).write_text('{"host": "elsewhere", "pid": 3}')
    monkeypatch.setattr(lock.FileLock, "acquire", refused)
    assert owner_of(tmp_path) == {"host": "elsewhere", "pid": 3}


def test_a_lock_that_there_was_no_room_for_does_not_stay(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", full)
        with pytest.raises(OSError, match="No space left"), FolderLock(tmp_path):
            pass
    with FolderLock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_where_a_file_system_has_no_locks_the_file_is_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "FileLock", SoftFileLock)
    says = f"process {os.getpid()} on {socket.gethostname()} is working there"
    with FolderLock(tmp_path), pytest.raises(UserError, match=says), FolderLock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / NAME).write_text("1\nelsewhere\n")
    with pytest.raises(UserError, match=r"process 1 on elsewhere is working there.* or remove"), FolderLock(tmp_path):
        pass


def take_often(folder, inside, taken):
    """Take the lock 30 times, and count how many have it at once."""
    for _ in range(30):
        while True:
            try:
                with FolderLock(folder):
                    with inside.get_lock():
                        inside.value += 1
                        assert inside.value == 1
                    with inside.get_lock():
                        inside.value -= 1
                    with taken.get_lock():
                        taken.value += 1
                break
            except UserError:
                continue


def test_of_many_that_want_it_one_has_it(tmp_path):
    (tmp_path / NAME).write_text(json.dumps({"host": socket.gethostname(), "pid": -1}))
    context = multiprocessing.get_context("fork")
    inside, taken = context.Value("i", 0), context.Value("i", 0)
    processes = [context.Process(target=take_often, args=(tmp_path, inside, taken)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert taken.value == 4 * 30
    assert list(tmp_path.iterdir()) == []
