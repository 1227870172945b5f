"""A tiny run of all three stages, and what of it must come out the same however it was interrupted."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from dualhead.errors import Interrupted
from dualhead.recipe import parse_recipe
from dualhead.recipe.schema import Recipe
from dualhead.recipe.yaml import load_recipe
from dualhead.runs.folder import taken
from dualhead.runs.prepare import prepare
from dualhead.runs.run import train
from dualhead.runs.stages import train_stages
from dualhead.training import Silent

OVERRIDES = [
    "data.train_limit=128", "data.validation=32", "validation.attack.steps=1",
    # Dropout draws from torch's own generator, the one source of randomness that has a state.
    "model.backbone={name: wideresnet, depth: 10, width: 1, dropout: 0.3}", "model.attach_at=block1",
    "stages.*.batch_size=32", "stages.*.epochs=2", "stages.*.attack.steps=2",
]  # fmt: skip
STEPS = 3 * 2 * 3
"""96 images in batches of 32, 2 epochs, 3 stages."""


def recipe(*more: str, base: str = "digits") -> Recipe:
    return load_recipe(base, [*OVERRIDES, *more])


def train_until(folder: Path, stop: Callable[[], bool], *more: str, base: str = "digits") -> bool:
    """Train in a folder until done (True) or stopped (False)."""
    try:
        prepared = prepare(recipe(*more, base=base), folder)
        with taken(prepared.folder):
            train_stages(prepared, Silent(), stop)
    except Interrupted:
        return False
    return True


def train_in_process(folder: str, epochs: int) -> None:
    """What a process of its own does; saves after about every step."""
    torch.set_num_threads(1)
    train_until(Path(folder), lambda: False, "runtime.save_minutes=1e-9", f"stages.*.epochs={epochs}")


def newest_state(folder: Path) -> str:
    """Name of the last state that a run has saved; empty if there is none."""
    return max((path.name for path in (folder / "checkpoints" / "states").glob("*.pt")), default="")


def in_spite_of(
    kills: int, work: Callable[[str, int], None], folder: Path, epochs: int, epoch_seconds: float = 0.0, seed: int = 0
) -> int:
    """Kill a process that trains, again and again, until it gets through; how often it was killed.

    Each time it is killed within about an epoch of its start or of a state that it has saved: by the run's own course
    and not by the clock alone, so that a busy machine does not let it get through before its time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dualhead.runs.run"])
    moments, killed = random.Random(seed), 0
    while True:
        before, wait_for_state = newest_state(folder), moments.random() < 0.7
        process = context.Process(target=work, args=(str(folder), epochs))
        process.start()
        if killed < kills:
            while wait_for_state and process.exitcode is None and newest_state(folder) == before:
                time.sleep(0.002)
            process.join(moments.uniform(0.0, epoch_seconds))
        else:
            process.join()
        if process.exitcode is None:
            process.kill()
            process.join()
            killed += 1
        else:
            assert process.exitcode == 0, f"the process ended by itself, with status {process.exitcode}"
            return killed


def _run_in_process(folder: str, content: Mapping[str, object]) -> None:
    torch.set_num_threads(1)
    train(parse_recipe(content), run_dir=folder)


def run_in_spite_of(kills: int, content: Mapping[str, object], folder: Path) -> int:
    """Kill a process that runs a recipe after it has left another file, again and again; how often it was killed.

    Args:
        kills: at most so often; then the process is left to end.
        content: of the recipe, which should save often.
        folder: of the run.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dualhead.runs.run"])
    moments, killed = random.Random(1), 0

    def files() -> int:
        return sum(1 for _ in folder.rglob("*") if _.is_file()) if folder.is_dir() else 0

    while True:
        before = files()
        process = context.Process(target=_run_in_process, args=(str(folder), content))
        process.start()
        while killed < kills and process.exitcode is None and files() == before:
            time.sleep(0.01)
        if killed < kills:
            time.sleep(moments.random() * 0.6)
            process.kill()
        process.join()
        if process.exitcode == 0:
            return killed
        assert process.exitcode == -signal.SIGKILL, f"the process ended by itself, with status {process.exitcode}"
        killed += 1


def outcome(folder: Path) -> dict[str, object]:
    """All weights by checksum, the log and the summaries without the times."""
    weights = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summaries = {path.parent.name: json.loads(path.read_text()) for path in folder.rglob("summary.json")}
    return {"weights": weights, "metrics": _without_times(lines), "summaries": _without_times(summaries)}


def _without_times(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_times(inner) for key, inner in value.items() if key != "seconds"}
    return [_without_times(inner) for inner in value] if isinstance(value, list) else value
