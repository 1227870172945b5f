"""How long evaluations take here and with the reference: the standard AutoAttack suite, and PGD-20.

    python benchmarks/autoattack.py runs/cifar10_cpu --data uoft-cs/cifar10 --samples 100,500 -o autoattack.json

Ours (float32, and reduced precision) and the reference (`pyautoattack`, at one or more batch sizes) run in turn in this
one process, on the same threads, images and weights. PGD is compared with a loop over batches that has no early exit.
Beside ours stands its floor: what the passes that it made take when nothing but the model runs, in full batches.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyautoattack
import torch
from torch import Tensor, nn

from dualhead.attacks.pgd import PGD
from dualhead.data import load_split
from dualhead.evaluation import evaluate, wilson
from dualhead.evaluation.model import Subject, frozen
from dualhead.noise import Streams
from dualhead.saving.models import load
from dualhead.system.arithmetic import BF16, FLOAT32
from dualhead.system.devices import describe_environment, find_device
from dualhead.system.memory import keep_freed_blocks
from dualhead.threats.lp import ThreatModel

Row = dict[str, Any]


class Counted(nn.Module):
    """A classifier that counts the images it is asked about."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.images = model, 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classifier."""
        self.images += x.shape[0]
        logits: Tensor = self.model(x)
        return logits


class Clock(logging.Handler):
    """Reads from the reference's log when each of its attacks ended and what was robust then."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.ends: list[tuple[str, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the time of lines that end an attack."""
        words = record.getMessage().split()
        if words[:3] == ["robust", "accuracy", "after"]:
            self.ends.append((words[3].lower().rstrip(":"), time.perf_counter()))


def reference(model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, batch_size: int, seed: int) -> Row:
    """`pyautoattack`, standard version, with parameters that ask for gradients, as its users have them."""
    counted, clock = Counted(model), Clock()
    logger = logging.getLogger("auto-attack")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(clock)
    model.requires_grad_(True)
    begun = time.perf_counter()
    try:
        attack = pyautoattack.AutoAttack(counted, eps=threat.eps, norm=threat.norm, seed=seed, device=x.device)
        x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=batch_size)
        seconds = time.perf_counter() - begun
    finally:
        logger.removeHandler(clock)
        model.requires_grad_(False)
    with torch.no_grad():
        robust = torch.cat([model(part).argmax(1) for part in x_adv.split(64)]) == y
    starts = [begun, *(end for _, end in clock.ends)]
    return {
        "seconds": seconds,
        "robust": int(robust.sum()),
        "forward_passes": counted.images,
        "parts": {name: end - start for (name, end), start in zip(clock.ends, starts, strict=False)},
    }


def ours(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, attack: str, precision: str, batch: int, seed: int
) -> Row:
    """`dualhead.evaluate`, all of it: choosing the batch size, the clean pass, verification."""
    begun = time.perf_counter()
    settings: dict[str, Any] = {"precision": precision, "batch_size": batch, "seed": seed, "diagnostics": False}
    evaluation = evaluate(model, x, y, threat=threat, attacks=[attack], **settings)
    seconds, record = time.perf_counter() - begun, evaluation.results["attacks"][attack]
    forward, both = bare_passes(model, x, y, precision)
    backward_passes = record["backward_passes"]
    return {
        "seconds": seconds,
        "floor": both * backward_passes + forward * (record["forward_passes"] - backward_passes),
        "robust": int(evaluation.verdicts[attack].robust.sum()),
        "forward_passes": record["forward_passes"] + record["verification_passes"],
        "backward_passes": backward_passes,
        "parts": {part["name"]: part["seconds"] for part in record["parts"]},
        "environment": evaluation.results["environment"],
    }


def bare_passes(model: nn.Module, x: Tensor, y: Tensor, precision: str) -> tuple[float, float]:
    """Seconds per image of a forward pass, and of one forward and back, each at the best of some batch sizes."""
    with frozen(model):
        subject = Subject(model, None, 256)
        subject.use(BF16 if precision == "bf16" else FLOAT32, x)
        forward, both = (
            min(subject.seconds_per_image(x, y, size, backward=backward, budget=1.0) for size in (64, 128, 256))
            for backward in (False, True)
        )
    return forward, both


def pgd_loop(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, steps: int, batch_size: int, seed: int
) -> Row:
    """PGD as it is commonly written: batch after batch, all steps for every image, one look at the last iterate."""
    attack, robust = PGD(steps), 0
    begun = time.perf_counter()
    for rows in torch.arange(len(x)).split(batch_size):
        images, labels = x[rows], y[rows]
        streams = Streams.of(seed, rows)

        def climb(z: Tensor, labels: Tensor = labels) -> Tensor:
            return nn.functional.cross_entropy(model(z), labels, reduction="none")

        adversarial = attack.maximise(climb, images, threat, streams)
        with torch.no_grad():
            robust += int((model(adversarial).argmax(1) == labels).sum())
    return {
        "seconds": time.perf_counter() - begun,
        "robust": robust,
        "forward_passes": len(x) * (steps + 1),
        "parts": {},
    }


def contest(runs: dict[str, Callable[[], Row]], rounds: int) -> dict[str, Row]:
    """Each in turn, `rounds` times; the fastest round of each counts."""
    best: dict[str, Row] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            row = run()
            print(f"  {name:28s} {row['seconds']:9.1f} s  robust {row['robust']}", flush=True)
            if name not in best or row["seconds"] < best[name]["seconds"]:
                best[name] = row
    return best


def table(title: str, rows: dict[str, Row], base: str, count: int) -> None:
    print(
        f"\n{title}\n{'':28s} {'seconds':>9s} {'faster':>7s} {'robust':>7s} {'passes':>10s} {'floor':>7s}  "
        "share of each part"
    )
    for name, row in rows.items():
        whole = sum(row["parts"].values()) or 1.0
        shares = ", ".join(f"{part} {seconds / whole:.0%}" for part, seconds in row["parts"].items())
        faster, robust = rows[base]["seconds"] / row["seconds"], row["robust"] / count
        floor = f"{row['floor']:7.1f}" if "floor" in row else " " * 7
        numbers = f"{row['seconds']:9.1f} {faster:6.2f}x {robust:7.1%} {row['forward_passes']:10d} {floor}"
        print(f"{name:28s} {numbers}  {shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a run, or an exported model")
    parser.add_argument("--data", default="uoft-cs/cifar10")
    parser.add_argument("--samples", default="100,500")
    parser.add_argument("--norm", default="Linf", choices=["Linf", "L2"])
    parser.add_argument("--eps", default="8/255")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-size", type=int, default=256, help="ours, at most")
    parser.add_argument("--reference-batch-sizes", default="250", help="250 is its default")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attacks", default="autoattack,pgd-20", help="of these two")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--output", type=Path, default=None)
    given = parser.parse_args()
    keep_freed_blocks()  # as the command line does; the reference has it too
    torch.set_num_threads(given.threads)
    device = find_device(given.device)
    threat, model = ThreatModel(given.norm, given.eps), load(given.model).requires_grad_(False).to(device)
    counts = [int(count) for count in given.samples.split(",")]
    test = load_split(given.data, "test", limit=max(counts))
    results: dict[str, Any] = {
        "environment": describe_environment(device),
        "threat": {"norm": threat.norm, "eps": threat.eps},
        "seed": given.seed,
    }
    sizes = [int(size) for size in given.reference_batch_sizes.split(",")]
    for count in counts:
        x, y = test.images[:count].float().to(device) / 255, test.labels[:count].long().to(device)
        own = partial(ours, model, x, y, threat, batch=given.batch_size, seed=given.seed)
        contests = {
            "autoattack": {
                f"reference, batch {b}": partial(reference, model, x, y, threat, b, given.seed) for b in sizes
            },
            "pgd-20": {f"loop, batch {b}": partial(pgd_loop, model, x, y, threat, 20, b, given.seed) for b in sizes},
        }
        for attack in given.attacks.split(","):
            print(f"{attack}, {count} images, {given.threads} threads")
            mine = {f"ours {p}": partial(own, attack=attack, precision=p) for p in ("float32", "bf16")}
            rows = contest({**contests[attack], **mine}, given.rounds)
            table(f"{attack}, {count} images", rows, next(iter(rows)), count)
            results[f"{attack} {count}"] = {
                name: {**row, "interval": wilson(row["robust"], count)} for name, row in rows.items()
            }
            if given.output:
                given.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
