"""Leave a small finished run, an export of it and the logits of old models, for later code to be tested on.

    python tools/freeze_run.py        # tests/data

Made once, with the code whose runs must stay readable: run again it would only show that code can read what it writes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers.frozen_models import EXPORTED, LOGITS, RUN, VERDICTS, evaluate_published  # from the folder above
from helpers.frozen_recipes import PORTABLE

SETTINGS = (
    "model.backbone={name: cnn, width: 6, stages: 2, convolutions: 1}", "threat.eps=0.1", "stages.*.batch_size=64",
    "stages.*.epochs=6", "stages.main_head.epochs=18", "stages.*.objective.beta=2", "stages.*.attack.steps=2",
    "stages.*.attack.step_size=0.06", "validation.attack.steps=3", "validation.attack.step_size=0.05",
    "evaluate.limit=64", "evaluate.gallery=4", "evaluate.attacks=[fgsm, pgd-5, apgd-ce-5]", "runtime.device=cpu",
    "runtime.lanes=1",
)  # fmt: skip


def dualhead(*arguments: str) -> None:
    command = [sys.executable, "-m", "dualhead", *arguments]
    subprocess.run(command, env={**os.environ, **PORTABLE}, check=True, cwd=RUN.parent)


def main() -> None:
    for folder in (RUN, EXPORTED):
        shutil.rmtree(folder, ignore_errors=True)
    RUN.parent.mkdir(exist_ok=True)
    dualhead("train", "digits", *SETTINGS, "--run-dir", RUN.name, "--quiet")
    dualhead("export", RUN.name, "--to", EXPORTED.name, "--quiet")
    # What a finished run does without: the states to go on from, the page, and weights that no stage keeps.
    shutil.rmtree(RUN / "checkpoints" / "states")
    (RUN / "report.html").unlink()
    for stage, other in (("main_head", "last"), ("second_head", "best"), ("aggregator", "last")):
        (RUN / "checkpoints" / stage / f"{other}.safetensors").unlink()
    for journal in (RUN / "evaluation" / "rows").glob("*/progress"):
        shutil.rmtree(journal)
    tests = Path(__file__).resolve().parent.parent / "tests"
    subprocess.run(
        [sys.executable, "-m", "helpers.frozen_models", str(LOGITS)],
        cwd=tests,
        env={**os.environ, **PORTABLE},
        check=True,
    )
    with tempfile.TemporaryDirectory() as place:
        verdicts = evaluate_published(Path(place))
    VERDICTS.write_text(json.dumps(verdicts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
