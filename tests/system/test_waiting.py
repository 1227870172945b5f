"""Threads sleep after a short spin unless the user says how they wait."""

import json
import os
import subprocess
import sys

import pytest

from dualhead.system.waiting import CHOICES, SHORT_SPIN, wait_shortly

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
    assert _seen_by_a_child() == SHORT_SPIN


@pytest.mark.parametrize("name", CHOICES)
def test_whoever_says_how_threads_wait_is_obeyed(name):
    environment = {name: "as the user has it"}
    wait_shortly(environment)
    assert environment == {name: "as the user has it"}


def test_what_the_user_set_reaches_child_processes_alone():
    assert _seen_by_a_child(OMP_WAIT_POLICY="PASSIVE") == {"OMP_WAIT_POLICY": "PASSIVE"}
