"""Freed blocks stay with the process, where the C library is one that can be told so."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from dualhead.system.memory import keep_freed_blocks
def mapped():  # MiB of address space: unlike page faults, no other process and no load changes it
    with open("/proc/self/statm") as told:
        return int(told.read().split()[0]) * resource.getpagesize() / 2**20
if sys.argv[1] == "kept":
    keep_freed_blocks()
for _ in range(3):
    for mebibytes in (16, 15, 14, 12):  # batches shrink as samples are fooled: so do their blocks
        blocks = [torch.ones(mebibytes, 2**18) for _ in range(2)]
        used = mapped()
        del blocks
        print(used - mapped())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_what_is_freed_stays_with_the_process_for_the_next_blocks():
    given_back = {}
    for how in ("kept", "given back"):
        done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
        given_back[how] = [float(line) for line in done.stdout.split()]
    assert given_back["given back"][0] >= 32, "the test shows nothing here"
    assert max(given_back["kept"]) < 2  # no block; Python returns arenas of its own, of 1 MiB
