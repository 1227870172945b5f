"""What each way to share adds: parameters, passes and time of a training step.

    python benchmarks/domains/cost.py [STEPS]

WRN-10-1 with `stem_stride: 2`, batches of 64 random images of 32x32, PGD-5, one thread, float32. Passes are counted in
operations, in forward passes of one batch through the network; time is processor time, the median over STEPS (20).
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch

from dualhead.data import Batch
from dualhead.heads import attach_second_head
from dualhead.models import Normalize, backbones, count_parameters
from dualhead.noise import Streams
from dualhead.system.arithmetic import FLOAT32
from dualhead.system.flops import CountFlops
from dualhead.threats import ThreatModel
from dualhead.training import Passes, Stage
from dualhead.training.step import TrainingStep

NETWORK = {"name": "wideresnet", "depth": 10, "width": 1, "stem_stride": 2}
ROUTES = {"clean": "head1", "robust": "head2"}
VARIANTS: dict[str, dict[str, Any]] = {
    "SAT": {"objective": "sat"},
    "TRADES": {"objective": {"name": "trades"}},
    "hybrid, one batch norm, two forwards": {},
    "hybrid, one batch norm, joint forward": {"forward": "joint"},
    "hybrid, statistics of the clean half": {"forward": "joint_clean"},
    "dual batch norm": {"own": ["batch_norm"]},
    "own statistics (Setup 1)": {"own": ["statistics"]},
    "own affine, statistics of the union (Setup 2)": {"own": ["affine"], "forward": "joint"},
    "own affine, statistics of the clean half": {"own": ["affine"], "forward": "joint_clean"},
    "sandwich": {"own": ["sandwich"], "norm": "sandwich"},
    "dual, first stage": {"own": ["batch_norm@block1"]},
    "dual, last stage": {"own": ["batch_norm"], "at": "block2"},
    "group norm, own affine": {"own": ["affine"], "norm": "group"},
    "TRADES, dual batch norm": {"own": ["batch_norm"], "objective": {"name": "trades", **ROUTES}},
    "MART, dual batch norm": {"own": ["batch_norm"], "objective": {"name": "mart", **ROUTES}},
}


def measured(
    steps: int,
    own: list[str] | None = None,
    norm: str | None = None,
    at: str = "input",
    forward: str = "separate",
    objective: Any = None,
) -> tuple[int, float, float]:
    """Added parameters, forward equivalents of a step, and milliseconds of one."""
    torch.manual_seed(0)
    spec = NETWORK if norm is None else {"name": "with_norm", "backbone": NETWORK, "norm": norm}
    base = backbones.build(spec).create(10, (3, 32, 32), Normalize.identity(3))
    x, y = torch.rand(64, 3, 32, 32), torch.arange(64) % 10
    with CountFlops() as unit, torch.no_grad():
        base(x)
    model, parts = base, ["model"]
    if own is not None:
        model = attach_second_head(base, at, example=x[:2], init="tied", own=own, aggregator="mean")
        parts = ["trunk", "head1", "head2"]
    stage = Stage.model_validate({
        "name": "cost", "train": parts, "epochs": 1, "forward": forward,
        "objective": objective or {"name": "hybrid", **(ROUTES if own else {})},
        "attack": {"name": "pgd", "steps": 5, "step_size": 4 / 255, "start": "uniform"},
    })  # fmt: skip
    passes = Passes.of(model, stage)
    step = TrainingStep(
        passes, stage, ThreatModel("Linf", 8 / 255), stage.optimiser.create(passes.parameters()), FLOAT32
    )
    batch, streams = Batch(torch.arange(64), x, y), Streams.of(0, torch.arange(64))
    with CountFlops() as counted:
        step(batch, streams, one_thread=True)
    times = []
    for _ in range(steps):
        begun = time.process_time()
        step(batch, streams)
        times.append(1000 * (time.process_time() - begun))
    return count_parameters(model) - count_parameters(base), counted.total / unit.total, statistics.median(times)


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    print("| variant | added parameters | forward equivalents | ms a step |\n|---|---|---|---|")
    for name, settings in VARIANTS.items():
        added, passes, milliseconds = measured(steps, **settings)
        print(f"| {name} | {added} | {passes:.1f} | {milliseconds:.0f} |")


if __name__ == "__main__":
    main()
