"""Studies under `benchmarks/`: their scripts with recorders in place of programs, and made-up runs to collect."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from dualhead.evaluation import Evaluation, Verdicts
from dualhead.evaluation.results import accuracies
from dualhead.recipe import load_recipe

ROOT = Path(__file__).parents[2]
RECORDER = """#!/usr/bin/env bash
printf '%s\\n' "$@" END >> "$ASKED"
trap 'exit 130' INT
[[ -z ${HANGS_ON:-} || $* != *"$HANGS_ON"* ]] || for _ in {1..600}; do sleep 0.1; done
case $1 in
  train)
    while [[ $1 != --run-dir ]]; do shift; done
    mkdir -p "$2/model"
    touch "$2/model/config.json" "$2/model/model.safetensors" "$2/report.html"
    ;;
  evaluate) while [[ $1 != --output ]]; do shift; done; mkdir -p "$2"; touch "$2/results.json" ;;
  *)
    case $2 in
      keep) mkdir -p "$(dirname "$4")"; touch "$4" ;;
      tell) touch "$4" ;;
      length | betas | rate) echo "$SAYS" ;;
    esac
    ;;
esac
"""
"""In place of dualhead and of python: writes down what it was asked, and leaves the files that a script looks for."""


def asked_of(script, folder, *words, recorder=RECORDER, within=120, **environment):
    """How a script ended, and the commands that it gave; what it keeps lies in `folder / "kept"`.

    Args:
        script: below the root of the repository.
        folder: for the recorder and what it writes.
        words: of the command line.
        recorder: a program in place of dualhead and of python.
        within: seconds after which the script is interrupted, as by a user.
        environment: further variables.
    """
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    for name in ("dualhead", "python"):
        (folder / "bin" / name).write_text(recorder)
        (folder / "bin" / name).chmod(0o755)
    (folder / "asked").write_text("")
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    places = {"PATH": path, "ASKED": str(folder / "asked"), "KEPT": str(folder / "kept")}
    ended = subprocess.run(
        ["timeout", "--signal", "INT", str(within), script, *words], cwd=ROOT,
        env={**os.environ, **places, **environment}, check=False, capture_output=True, text=True,
    )  # fmt: skip
    return ended, [text.splitlines() for text in (folder / "asked").read_text().split("END\n") if text]


def trained(asked):
    """The commands that train, by the folders of their runs below `out`."""
    return {after("--run-dir", words).split("/out/")[1]: words for words in asked if words[0] == "train"}


def recipe_of(words):
    """The recipe of a command that trains."""
    return load_recipe(str(ROOT / words[1]), words[2 : words.index("--run-dir")])


def after(word, words):
    return words[words.index(word) + 1]


def module_of(path):
    """A script under `benchmarks/`, as a module."""
    name = "studied_" + path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # data classes look for it there
    spec.loader.exec_module(module)
    return module


def evaluation(clean, **attacked):
    """An evaluation of images of class 0: which are right, and right under each attack."""
    count = len(clean)
    zeros, ints = np.zeros(count), np.zeros(count, np.int64)
    verdicts = {
        name.replace("_", "-"): Verdicts(clean & right, zeros, ints, ints, ints, zeros, ints)
        for name, right in attacked.items()
    }
    made = Evaluation(np.arange(count), ints, np.where(clean, 0, 1), verdicts, {})
    told = {"threat": {"norm": "Linf", "eps": 8 / 255}, "diagnostics": [], "attacks": {name: {} for name in verdicts}}
    made.results |= {**told, "num_samples": count, **accuracies(made.correct)}
    return made


def made_run(folder, *, flops=1e9, unit=1e3, precision="bf16", held_out=(0.5, 0.25), **evaluations):
    """Leave of a made-up run what is kept of it; evaluations by the name of their folder."""
    cost = {"flops": flops, "forward_equivalents": flops / unit, "seconds": 60.0}
    rows = [
        {"name": name, "output": output, "parameters": count, "training_cost": cost}
        for name, output, count in (("head 2", "head2", 77_850), ("mean of heads", "mean", 155_700))
    ]
    log = {"stage": "base", "validation_clean": held_out[0], "validation_robust": held_out[1]}
    for name, text in {
        "comparison.json": json.dumps({"rows": rows}),
        "environment.json": json.dumps({"precision": precision}),
        "metrics.jsonl": json.dumps({"stage": "base"}) + "\n" + json.dumps(log) + "\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name, made in evaluations.items():
        made.results |= {"subject": {"output": "head2"}} if name == "head2" else {}
        made.save(folder / "evaluations" / name)
    return folder


def measured(clean, robust, count=2000):
    """An evaluation of so many images, of which these shares are right and robust."""
    places = np.arange(count)
    right = places < round(clean * count)
    return evaluation(right, pgd_40=right, autoattack_fast=places < round(robust * count))
