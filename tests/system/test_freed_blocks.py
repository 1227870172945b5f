"""Freed blocks stay with the process, where the C library is one that can be told so."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from dualhead.system.memory import keep_freed_blocks
if sys.argv[1] == "kept":
    keep_freed_blocks()
def use():
    for rows in (64, 60, 56, 48):  # batches shrink as samples are fooled: so do their blocks
        blocks = [torch.ones(rows, 4096) for _ in range(8)]
for _ in range(3):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_the_same_blocks_cost_hardly_any_page_faults_again():
    faults = {}
    for how in ("kept", "given back"):
        done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["given back"] > 1000, "the test shows nothing here"
    assert 5 * faults["kept"] < faults["given back"]
