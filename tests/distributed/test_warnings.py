"""Several processes find out the same about images and recipe; one of them says so, once."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import training_job

PROGRAM = """
import dualhead

dualhead.fit(
    "cnn-4", "set", recipe="digits_natural", run_dir="run", progress=False,
    overrides={"data.validation": 16, "stages.*.epochs": 1, "evaluate.limit": 16, "evaluate.gallery": 0,
               "evaluate.attacks": ["fgsm"], "validation.attack.steps": 1, "runtime.device": "cpu"},
)
"""


@pytest.mark.slow
def test_what_is_odd_about_the_images_is_told_once(tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "set").mkdir()
    for part, count in (("train", 96), ("test", 32)):
        images = random.integers(0, 256, (count, 8, 8), np.uint8)
        np.savez(tmp_path / "set" / f"{part}.npz", image=images, label=np.arange(count) % 3 + 1)
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(training_job.free_port()), "program.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stderr
    told = [line for line in ended.stderr.splitlines() if "no image has label 0" in line]
    assert len(told) == 1, ended.stderr
