"""The package at work on the pretend accelerator, as a program of its own: jobs in as JSON, results out."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

import dualhead
from dualhead.attacks import attacks as registered
from dualhead.commands.cli import main as run_command
from dualhead.threats import threats
from helpers.pretend_accelerator import NAME, Away, install, waits

SHORT = {"steps": 4, "queries": 6, "searches": 2, "targets": 2, "candidates": 2, "angles": 3, "shifts": 2, "eot": 1}
"""Numbers that make attacks quick where their length does not matter."""
jobs: dict[str, Callable[..., Any]] = {}


def job(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function be asked for by its name."""
    jobs[function.__name__] = function
    return function


class StepWaits:
    """A progress that tells which waits belong to which step, and looks at where losses are.

    A step begins when the one before has been told, so loading its images is part of it. The first step of a stage or
    an epoch, before which a state is saved, stands apart.

    Attributes:
        first: waits of first steps and what came before them, by place.
        later: waits of all other steps, by place and number of the step.
        steps: how many were taken, by stage.
    """

    def __init__(self) -> None:
        self.first: dict[str, int] = {}
        self.later: dict[str, list[int]] = {}
        self.steps: dict[str, int] = {}
        self._name, self._epoch = "", 0

    def stage(self, name: str, number: int, stages: int, epochs: int, steps: int, done: int) -> None:
        self._name = name
        self.steps[name] = 0
        waits.clear()

    def step(self, epoch: int, loss: Tensor) -> None:
        assert isinstance(loss, Away), f"the loss is on {loss.device}"
        self.steps[self._name] += 1
        number = self.steps[self._name]
        for wait, count in waits.items():
            place = f"{wait.where}: {wait.what}"
            if number == 1 or epoch != self._epoch:
                self.first[place] = self.first.get(place, 0) + count
            else:
                self.later.setdefault(place, []).extend([number] * count)
        self._epoch = epoch
        waits.clear()

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        waits.clear()

    def told(self) -> dict[str, Any]:
        """All of it, as plain data."""
        return {"steps": self.steps, "first": self.first, "later": self.later}


@job
def strict() -> dict[str, Any]:
    """What the device itself refuses, and what it counts as waiting."""
    here, there = torch.rand(4), torch.rand(4, device=NAME)
    layer = torch.nn.BatchNorm1d(4).to(NAME)
    mixed: dict[str, Callable[[], object]] = {
        "sum": lambda: here + there,
        "in place": lambda: here.add_(there),
        "cat": lambda: torch.cat((there, here)),
        "layer": lambda: layer(torch.rand(2, 4)),
        "index": lambda: here[torch.tensor([1], device=NAME)],
        "numpy": there.numpy,
        "foreach": lambda: torch._foreach_add_([there], [here]),
    }
    refused = [name for name, do in mixed.items() if _fails(do)]
    asked: dict[str, Callable[[], object]] = {
        "item": lambda: there.sum().item(),
        "bool": lambda: bool((there > 0).all()),
        "tolist": there.tolist,
        "cpu": there.cpu,
        "sent": lambda: here.to(NAME),
        "made": lambda: torch.tensor([1.0], device=NAME),
        "mask": lambda: there[there > 0.5],
        "nonzero": (there > 0.5).nonzero,
        "list": lambda: there[[0, 1]],
        "equal": lambda: torch.equal(there, there),
        "index of the device": lambda: there[torch.arange(2, device=NAME)],
        "scalar": lambda: there * torch.tensor(2.0),
        "masked fill": lambda: there.masked_fill_(there > 2, 0.0),
        "written by mask": lambda: there.__setitem__(there > 2, 0.0),
        "sent without waiting": lambda: here.to(NAME, non_blocking=True),
        "gradient": lambda: layer(torch.rand(2, 4, device=NAME)).sum().backward(),
    }
    waited = {}
    for name, do in asked.items():
        waits.clear()
        do()
        waited[name] = sorted(wait.what for wait in waits.elements())
    return {"mixed": list(mixed), "refused": refused, "waited": waited}


def _fails(do: Callable[[], object]) -> bool:
    try:
        do()
    except (RuntimeError, TypeError):
        return True
    return False


@job
def train(folder: str, recipe: str, *overrides: str) -> dict[str, Any]:
    """Train and evaluate on the device; what it waited for."""
    watch = StepWaits()
    result = dualhead.train(recipe, [*overrides, f"runtime.device={NAME}"], run_dir=folder, progress=watch)
    return {**watch.told(), "devices": sorted({str(values.device) for values in result.model.state_dict().values()})}


@job
def stop(folder: str, steps: str, recipe: str, *overrides: str) -> dict[str, Any]:
    """Train on the device until after so many steps; where that was."""
    watch = StepWaits()
    try:
        dualhead.train(
            recipe, [*overrides, f"runtime.device={NAME}"], run_dir=folder, progress=watch,
            stop=lambda: sum(watch.steps.values()) >= int(steps),
        )  # fmt: skip
    except dualhead.Interrupted as interrupted:
        return {**watch.told(), "said": str(interrupted)}
    raise AssertionError("it was to be stopped")


@job
def train_on_the_cpu(folder: str, recipe: str, *overrides: str) -> None:
    """Train the same where tensors may mix."""
    dualhead.train(recipe, [*overrides, "runtime.device=cpu"], run_dir=folder)


@job
def compare(one: str, other: str) -> list[str]:
    """Names of tensors of two runs' models that are not equal to the bit."""
    first, second = (load_file(Path(folder, "model", "model.safetensors")) for folder in (one, other))
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


@job
def attack(folder: str, output: str, name: str, *, count: int = 6) -> dict[str, Any]:
    """Evaluate a model with an attack, here and on the CPU, under the first threat it is for; robust images of each."""
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fields = {field.name for field in dataclasses.fields(registered.get(name))}
    spec = {"name": name, **{key: value for key, value in SHORT.items() if key in fields}}
    family = next(iter(registered.get(name).norms or ("Linf",)))
    if family in threats.names():
        threat = threats.build({"name": family, "eps": threats.get(family).typical_eps})
    else:
        threat = dualhead.ThreatModel(family, 0.02)
    found: dict[str, Any] = {}
    for device in (NAME, "cpu"):
        model = dualhead.load(folder)
        with torch.no_grad():
            labels = model(images / 255).argmax(1)
        evaluation = dualhead.evaluate(
            model, images, labels, threat=threat, attacks=[spec], device=device, precision="float32",
            save_adversarial=True, output_dir=Path(output, device), batch_size=8, diagnostics=name == "pgd",
        )  # fmt: skip
        found[device] = {label: verdicts.robust.tolist() for label, verdicts in evaluation.verdicts.items()}
        found["where"] = sorted({str(parameter.device) for parameter in model.parameters()}) + found.get("where", [])
    return found


@job
def command(*arguments: str) -> Any:
    """The command line in this process; what it printed, as JSON."""
    said = io.StringIO()
    with mock.patch.object(sys, "argv", ["dualhead", *arguments]), contextlib.redirect_stdout(said):
        try:
            run_command()
        except SystemExit as ended:
            assert not ended.code, f"status {ended.code}: {said.getvalue()}"
    return json.loads(said.getvalue())


def main() -> None:
    """Do the jobs that standard input names, each [NAME, ARGUMENT...], up to the first that fails."""
    install()
    torch.set_num_threads(1)
    results = []
    with contextlib.redirect_stdout(sys.stderr):
        for name, *arguments in json.load(sys.stdin):
            results.append(jobs[name](*arguments))
    print(json.dumps(results), flush=True)
    os._exit(
        0
    )  # torch's threads for a device that Python makes may outlive the interpreter, and end the process by abort


if __name__ == "__main__":
    main()
