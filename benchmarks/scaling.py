"""How training's cost grows, how soon it starts, how fast images load, and whether memory grows.

    python benchmarks/scaling.py --data FOLDER_OF_PARQUET -o benchmarks/results/scaling.json

Images, epochs and attack steps: the training loop on random images, with its log and its saved states, at three points
each; the points are measured in turn, round after round, and a straight line is fitted to their medians. Start-up: from
the start of a process to its first step and to the end of it, with the arithmetic named, so that none is measured; with
`--data` also the recipe `cifar10_cpu` on these images, loaded already. Loading: the images of `--data` with an empty
cache, and again. Memory: the highest of a process after each epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dualhead.data import Loader, Split
from dualhead.models import Normalize, backbones
from dualhead.system.arithmetic import choose_arithmetic, with_lanes
from dualhead.system.devices import describe_environment, find_device, synchronize
from dualhead.threats.lp import ThreatModel
from dualhead.training import CheckpointStore, MetricsLog, Passes, Position, Silent, Stage, StageFiles, StageRun

EPS = 8 / 255
PINNED = ["runtime.precision=float32", "runtime.layout=channels_last", "runtime.lanes=1"]

FIRST_STEP = """
import sys, time
import dualhead.commands.cli
from dualhead.errors import Interrupted
from dualhead.runs.run import train
from dualhead.training import Silent
class First(Silent):
    done = False
    def stage(self, name, number, stages, epochs, steps, done):
        print(time.time())
    def step(self, epoch, loss):
        float(loss)
        self.done = True
first = First()
try:
    train(sys.argv[1], sys.argv[3:], run_dir=sys.argv[2], progress=first, stop=lambda: first.done)
except Interrupted:
    print(time.time())
"""
"""Prints when the first step began, and when it was over."""

LOADING = """
import sys, time
from dualhead.data import load_split
began = time.perf_counter()
split = load_split(sys.argv[1], "train")
print(time.perf_counter() - began, len(split))
"""
"""Prints seconds without those of the imports, and how many images there are."""

EPOCHS_OF_MEMORY = """
import resource, sys
from dualhead.runs.run import train
from dualhead.training import Silent
class Memory(Silent):
    def epoch(self, metrics):
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
train(sys.argv[1], sys.argv[3:], run_dir=sys.argv[2], progress=Memory())
"""
"""Prints the highest memory so far, in kB, after each epoch."""


class Growth:
    """Stages that differ in images, epochs or attack steps, on one network and device.

    Args:
        backbone: its name.
        batch_size: images of a step.
        side: height and width of the images.
        device: where.
    """

    def __init__(self, backbone: str, batch_size: int, side: int, device: torch.device) -> None:
        self.backbone, self.batch_size, self.shape, self.device = backbone, batch_size, (3, side, side), device
        model, example = self.model(), torch.rand(batch_size, *self.shape, device=device)
        self.arithmetic = with_lanes(choose_arithmetic("auto", model, example), model, example)

    def model(self) -> torch.nn.Module:
        """The same network every time."""
        torch.manual_seed(0)
        normalize = Normalize([0.49, 0.48, 0.45], [0.25, 0.24, 0.26])
        return backbones.build(self.backbone).create(10, self.shape, normalize).to(self.device)

    def seconds(self, images: int, epochs: int, steps: int) -> float:
        """Of a stage, from its first step to its last weights."""
        values = torch.randint(0, 256, (images, *self.shape), dtype=torch.uint8)
        split = Split(values, torch.arange(images) % 10, tuple("0123456789"))
        attack = {"name": "pgd", "steps": steps, "step_size": 2 / 255, "start": "gaussian"}
        settings = {"train": ("model",), "attack": attack, "epochs": epochs, "batch_size": self.batch_size}
        objective = {"name": "trades", "beta": 6}
        stage = Stage.model_validate({"name": "stage", "objective": objective, "keep": "last", **settings})
        model = self.model()
        self.arithmetic.lay_out(model)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            run = StageRun(
                stage, Passes.of(model, stage), Loader(split, self.batch_size, seed=0, device=self.device),
                validator=None, threat=ThreatModel("Linf", EPS), arithmetic=self.arithmetic, seed=0, device=self.device,
                files=StageFiles(CheckpointStore(folder / "states"), folder / "best", folder / "last"),
                log=MetricsLog(folder / "metrics.jsonl"), progress=Silent(), stop=lambda: False, save_minutes=60.0,
            )  # fmt: skip
            began = time.perf_counter()
            run.run(Position())
            synchronize(self.device)
            return time.perf_counter() - began


def line_through(points: list[float], seconds: list[float]) -> dict[str, Any]:
    """The straight line through three points or more, and how far they lie from it."""
    slope, start = np.polyfit(points, seconds, 1)
    fitted, measured = slope * np.array(points) + start, np.array(seconds)
    left, spread = ((measured - fitted) ** 2).sum(), ((measured - measured.mean()) ** 2).sum()
    return {
        "points": points,
        "seconds": seconds,
        "seconds_each": float(slope),
        "seconds_at_0": float(start),
        "r2": float(1.0 - left / spread),
        "largest_relative_residual": float(np.abs(measured / fitted - 1.0).max()),
    }


def growth(bench: Growth, rounds: int) -> dict[str, Any]:
    """Seconds by images, epochs and attack steps, with the line through them."""
    batch = bench.batch_size
    plans = {
        "images": {n * batch: (n * batch, 1, 10) for n in (4, 8, 16)},
        "epochs": {n: (4 * batch, n, 10) for n in (1, 2, 4)},
        "attack steps": {n: (4 * batch, 1, n) for n in (5, 10, 20)},
    }
    taken: dict[tuple[int, int, int], list[float]] = {plan: [] for points in plans.values() for plan in points.values()}
    bench.seconds(batch, 1, 1)  # pays for allocation and for the choice of kernels
    for _ in range(rounds):
        for plan, seconds in taken.items():
            seconds.append(bench.seconds(*plan))
    return {
        name: line_through(list(points), [statistics.median(taken[plan]) for plan in points.values()])
        for name, points in plans.items()
    }


def python(script: str, arguments: list[str], cache: Path | None = None) -> list[str]:
    """What a script of its own process prints."""
    environment = dict(os.environ) | ({} if cache is None else {"DUALHEAD_CACHE": str(cache)})
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()


def start_up(recipe: str, overrides: list[str], rounds: int, cache: Path | None = None) -> dict[str, float]:
    """Seconds from the start of a process to its first step and to the end of it, medians."""
    seconds = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            began = time.time()
            told = python(FIRST_STEP, [recipe, f"{folder}/run", *PINNED, *overrides], cache)
            seconds.append([float(when) - began for when in told])
    first, over = (statistics.median(taken) for taken in zip(*seconds, strict=True))
    return {"first_step_begins": first, "first_step_is_over": over}


def loading(source: str, cache: Path, rounds: int) -> dict[str, float]:
    """Seconds to load the training images with an empty cache, and then again, medians."""
    first, again = [], []
    for number in range(rounds):
        folder = cache / str(number)
        for seconds in (first, again):
            taken, images = python(LOADING, [source], folder)
            seconds.append(float(taken))
    return {"images": int(images), "first": statistics.median(first), "again": statistics.median(again)}


def memory(epochs: int) -> dict[str, Any]:
    """The highest memory of a process in MB after each epoch of the recipe `digits_sat`, and its growth after two."""
    shorter = ["stages.*.epochs=1", f"stages.main_head.epochs={epochs}", "evaluate.limit=10", "evaluate.gallery=0"]
    with tempfile.TemporaryDirectory() as folder:
        printed = python(EPOCHS_OF_MEMORY, ["digits_sat", f"{folder}/run", *PINNED, *shorter])
    peaks = [int(kilobytes) / 1024 for kilobytes in printed[:epochs]]
    return {"peak_mb": peaks, "growth": peaks[-1] / peaks[1] - 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="parquet to load, and to start the recipe cifar10_cpu on")
    parser.add_argument("--backbone", default="wideresnet-10-1")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--side", type=int, default=32, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6, help="of the memory's run, at least 3")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    device = find_device(given.device)
    results: dict[str, Any] = {"environment": describe_environment(device)}
    results["settings"] = {key: str(value) for key, value in vars(given).items() if key not in ("data", "output")}

    def part(name: str, measure: Callable[[], Any]) -> Any:
        results[name] = measure()
        print(json.dumps({name: results[name]}), flush=True)
        if given.output:
            given.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        part("start_up_digits", lambda: start_up("digits", [], given.rounds))
        if given.data:
            part("loading", lambda: loading(given.data, cache, given.rounds))
            overrides = [f"data.source={given.data}"]
            part("start_up_cifar10_cpu", lambda: start_up("cifar10_cpu", overrides, given.rounds, cache / "0"))
    part("memory", lambda: memory(given.epochs))
    bench = Growth(given.backbone, given.batch_size, given.side, device)
    part("growth", lambda: growth(bench, given.rounds))


if __name__ == "__main__":
    main()
