"""Does a device train and attack as the CPU does, and how much memory does a step take there?

    python benchmarks/device_check.py [--device auto] [--backbone resnet-18] [--batch-size 128] [-o device.json]

A few epochs of digits in float32 on the CPU and on the device; both networks, and attacks on both, must agree. Then the
peak memory of steps of SAT, TRADES and stage 3 of DH-AT. Ends with an error if anything disagrees.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dualhead
from dualhead.data import load_split
from dualhead.heads import attach_second_head
from dualhead.models import Normalize, backbones
from dualhead.noise import Streams
from dualhead.system.arithmetic import choose_arithmetic
from dualhead.system.devices import describe_environment, find_device, synchronize
from dualhead.threats import ThreatModel
from dualhead.training import Passes, Stage
from dualhead.training.step import TrainingStep

ATTACKS = ("fgsm", "pgd-10", "apgd-ce", "apgd-t", "fab-t", "square-200")
EXACT = ("runtime={precision: float32, layout: contiguous, lanes: 1}", "evaluate.gallery=0", "evaluate.limit=50")
IMAGES, THREAT = 100, ThreatModel("Linf", 0.1)
MOST_APART = 2
"""Images on which verdicts may differ: rounding decides about what lies at the boundary."""


def trained(device: str) -> nn.Module:
    """Return a network that has seen two epochs of digits on a device."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ["stages.*.epochs=2", "evaluate.attacks=[fgsm]", *EXACT, f"runtime.device={device}"]
        return dualhead.train("digits_base", settings, run_dir=Path(folder) / "run").model.cpu().eval()


def verdicts(model: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    """Return which images withstand each attack."""
    test = load_split("digits", "test")
    x, y = test.images[:IMAGES].to(device).float() / 255, test.labels[:IMAGES].to(device)
    found = dualhead.evaluate(
        model.to(device), x, y, threat=THREAT, attacks=list(ATTACKS), precision="float32", diagnostics=False
    )
    model.cpu()
    return {name: torch.from_numpy(verdict.robust) for name, verdict in found.verdicts.items()}


def agreement(device: torch.device) -> list[dict[str, Any]]:
    """Compare a training and attacks with the CPU's."""
    ours, theirs = trained(str(device)), trained("cpu")
    x = load_split("digits", "test").images[:IMAGES].float() / 255
    with torch.no_grad():
        apart = int((ours(x).argmax(1) != theirs(x).argmax(1)).sum())
    rows = [{"what": "training", "images": IMAGES, "apart": apart, "agrees": apart <= MOST_APART}]
    here, there = verdicts(theirs, torch.device("cpu")), verdicts(theirs, device)
    for name in ATTACKS:
        apart = int((here[name] != there[name]).sum())
        rows.append({"what": name, "images": IMAGES, "apart": apart, "agrees": apart <= MOST_APART})
    return rows


def peak(device: torch.device) -> float:
    """Return the most memory so far, MiB: the device's, or this process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def step_memory(device: torch.device, backbone: str, batch_size: int) -> list[dict[str, Any]]:
    """Return peak memory and seconds of a step of each method."""
    rows = []
    for name, parts, objective in (
        ("sat", ("model",), "sat"),
        ("trades", ("model",), "trades"),
        ("stage 3 of DH-AT", ("aggregator",), "trades"),
    ):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        kind = backbones.build(backbone)
        model: nn.Module = kind.create(10, (3, 32, 32), Normalize([0.5] * 3, [0.25] * 3))
        if parts != ("model",):
            model = attach_second_head(
                model, kind.attach_at, example=torch.rand(2, 3, 32, 32), aggregator="pairwise_cnn"
            )
        model.to(device)
        x, y = torch.rand(batch_size, 3, 32, 32, device=device), torch.arange(batch_size, device=device) % 10
        arithmetic = choose_arithmetic("auto", model, x)
        stage = Stage.model_validate({"name": "step", "train": parts, "objective": objective, "epochs": 1})
        passes = Passes.of(model, stage)
        step = TrainingStep(passes, stage, THREAT, stage.optimiser.create(passes.parameters()), arithmetic)
        batch = dualhead.data.Batch(torch.arange(batch_size, device=device), x, y)
        for _ in range(2):
            begun = time.perf_counter()
            step(batch, Streams.of(0, batch.index))
            synchronize(device)
        seconds = time.perf_counter() - begun
        rows.append({"step": name, "arithmetic": arithmetic.name, "peak_mib": peak(device), "seconds": seconds})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backbone", default="resnet-18")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("-o", "--output", type=Path, default=None)
    given = parser.parse_args(arguments)
    device = find_device(given.device)
    results = {
        "environment": describe_environment(device),
        "agreement": agreement(device),
        "memory": step_memory(device, given.backbone, given.batch_size),
    }
    print(json.dumps(results, indent=2))
    if given.output is not None:
        given.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    wrong = [row["what"] for row in results["agreement"] if not row["agrees"]]
    if wrong:
        sys.exit(f"{device} and CPU disagree: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
