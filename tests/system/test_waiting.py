"""Threads sleep after a short spin, shorter on a busy machine, unless the user says how they wait."""

import json
import os
import subprocess
import sys

import pytest

from dualhead.system import waiting
from dualhead.system.waiting import CHOICES, SHORT_SPIN, SHORTER_SPIN, all_busy, wait_shortly

_GRANDCHILD = (
    "import json, os, subprocess, sys; import dualhead; assert 'torch' not in sys.modules;"
    "sys.stdout.write(subprocess.run([sys.executable, '-c', 'import json, os; print(json.dumps(dict(os.environ)))'],"
    "capture_output=True, text=True, check=True).stdout)"
)


def _seen_by_a_child(**told):
    environment = {name: value for name, value in os.environ.items() if name not in CHOICES} | told
    done = subprocess.run(
        [sys.executable, "-c", _GRANDCHILD], env=environment, capture_output=True, text=True, check=True
    )
    return {name: value for name, value in json.loads(done.stdout).items() if name in CHOICES}


def test_a_short_spin_is_set_before_torch_is_loaded_and_reaches_child_processes():
    assert _seen_by_a_child() in (SHORT_SPIN, SHORTER_SPIN)  # as others leave the machine


@pytest.mark.parametrize(
    ("running", "wanted"), [(1, SHORT_SPIN), (4, SHORT_SPIN), (5, SHORTER_SPIN), (90, SHORTER_SPIN), (None, SHORT_SPIN)]
)
def test_the_spin_is_shorter_where_others_keep_every_processor_busy(tmp_path, monkeypatch, running, wanted):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    statistics = tmp_path / "stat"
    if running is not None:
        statistics.write_text(f"cpu  1 2 3\nprocs_running {running}\nprocs_blocked 0\n")  # this process is one of them
    environment = {}
    wait_shortly(environment, statistics)
    assert environment == wanted


@pytest.mark.parametrize(
    ("running", "busy", "looks"), [([9] * 5, True, 5), ([9, 3, 9, 9, 9], False, 2), ([3, 9, 9, 9, 9], False, 1)]
)
def test_tasks_that_run_for_a_moment_do_not_count(tmp_path, monkeypatch, running, busy, looks):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    statistics, left = tmp_path / "stat", list(running)

    def look(*_):
        statistics.write_text(f"procs_running {left.pop(0)}\n")

    look()
    monkeypatch.setattr(waiting.time, "sleep", look)
    assert all_busy(statistics) is busy
    assert len(running) - len(left) == looks


@pytest.mark.parametrize("name", CHOICES)
def test_whoever_says_how_threads_wait_is_obeyed(name):
    environment = {name: "as the user has it"}
    wait_shortly(environment)
    assert environment == {name: "as the user has it"}


def test_what_the_user_set_reaches_child_processes_alone():
    assert _seen_by_a_child(OMP_WAIT_POLICY="PASSIVE") == {"OMP_WAIT_POLICY": "PASSIVE"}
