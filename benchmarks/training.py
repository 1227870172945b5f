"""What training costs: against the published loops, per stage, and against the least number of bare passes.

    python benchmarks/training.py -o training.json

Everything that is compared runs in turn in this one process, on the same threads, batch and start weights; a round runs
each contestant once, and ratios are taken within a round. Medians over the rounds are shown, with the extremes of
the ratios. The published loops are written plainly from their formulas (float32, eager, clean logits recomputed where
the published code does so). On a shared machine, `--cpu-time` with one thread counts the process's own time.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor, nn

from dualhead.data import Batch
from dualhead.heads import DualHeadClassifier, attach_second_head
from dualhead.models import Normalize, backbones
from dualhead.noise import Streams
from dualhead.runtime import (
    FLOAT32,
    Arithmetic,
    choose_arithmetic,
    describe_environment,
    find_device,
    in_eval_mode,
    synchronize,
)
from dualhead.threat import ThreatModel
from dualhead.training import Program, Stage
from dualhead.training.step import TrainingStep

STEPS, EPS, LENGTH, RATE = 10, 8 / 255, 2 / 255, 0.01
OBJECTIVES: dict[str, Any] = {
    "trades": {"name": "trades", "beta": 6},
    "sat": "sat",
    "mart": {"name": "mart", "beta": 5},
}
PARTS = {
    "stage 1": ("trunk", "head1"),
    "stage 2": ("head2",),
    "stage 3": ("aggregator",),
    "all parts jointly": ("trunk", "head1", "head2", "aggregator"),
}
ART = "adversarial-robustness-toolbox"
Contestant = Callable[[], object]


# ---- the published loops, plainly


def climb(x: Tensor, start: Tensor, gradient_at: Callable[[Tensor], Tensor]) -> Tensor:
    x_adv = start
    for _ in range(STEPS):
        x_adv = x_adv.detach() + LENGTH * gradient_at(x_adv.detach().requires_grad_()).sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0.0, 1.0)
    return x_adv.detach()


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(logits, 1), F.softmax(target, 1), reduction="sum")


def published_trades(model: nn.Module, optimiser: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """39 forward equivalents: clean logits again in every inner step, and a third forward in the loss."""
    model.eval()
    start = x + 0.001 * torch.randn_like(x)
    x_adv = climb(x, start, lambda z: torch.autograd.grad(divergence(model(z), model(x)), z)[0])
    model.train()
    optimiser.zero_grad()
    loss = F.cross_entropy(model(x), y) + 6.0 * divergence(model(x_adv), model(x)) / len(x)
    loss.backward()
    optimiser.step()


def published_sat(model: nn.Module, optimiser: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """33 forward equivalents: `backward()` in the attack differentiates the weights too."""
    model.eval()

    def gradient_at(z: Tensor) -> Tensor:
        F.cross_entropy(model(z), y).backward()
        assert z.grad is not None
        return z.grad

    x_adv = climb(x, x + torch.empty_like(x).uniform_(-EPS, EPS), gradient_at)
    model.train()
    optimiser.zero_grad()
    F.cross_entropy(model(x_adv), y).backward()
    optimiser.step()


def published_mart(model: nn.Module, optimiser: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """26 forward equivalents, the least there can be."""
    model.eval()
    start = x + 0.001 * torch.randn_like(x)
    x_adv = climb(x, start, lambda z: torch.autograd.grad(F.cross_entropy(model(z), y), z)[0])
    model.train()
    optimiser.zero_grad()
    clean, attacked = model(x), model(x_adv)
    p, p_adv = F.softmax(clean, 1), F.softmax(attacked, 1)
    wrong = p_adv.scatter(1, y[:, None], 0.0).amax(1)
    boosted = F.cross_entropy(attacked, y) - torch.log(1.0001 - wrong).mean()
    apart = F.kl_div(F.log_softmax(attacked, 1), p, reduction="none").sum(1)
    loss = boosted + 5.0 * (apart * (1.0 - p.gather(1, y[:, None])[:, 0])).mean()
    loss.backward()
    optimiser.step()


PUBLISHED = {"trades": published_trades, "sat": published_sat, "mart": published_mart}


class TwoNetworks(nn.Module):
    """The aggregate as published: two whole networks, each of which runs the trunk, and no weight is really frozen."""

    def __init__(self, model: DualHeadClassifier) -> None:
        super().__init__()
        self.model = model.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C]."""
        logits = [head(self.model.trunk(x)) for head in (self.model.head1, self.model.head2)]
        return self.model.aggregate(torch.stack(logits, 1))


# ---- what is set up once


class Bench:
    """A backbone, its dual-head form and a batch on a device, and contestants made from copies of them."""

    def __init__(self, backbone: str, batch_size: int, side: int, device: torch.device, precision: Any) -> None:
        torch.manual_seed(0)
        component = backbones.build(backbone)
        shape = (3, side, side)
        base = component.create(10, shape, Normalize([0.49, 0.48, 0.45], [0.25, 0.24, 0.26]))
        x, y = torch.rand(batch_size, *shape), torch.randint(0, 10, (batch_size,))
        self.dual = attach_second_head(base, str(component.attach_at), example=x[:2], aggregator="pairwise_cnn").to(
            device
        )
        self.base = base.to(device)
        self.batch = Batch(torch.arange(batch_size, device=device), x.to(device), y.to(device))
        self.threat = ThreatModel("Linf", EPS)
        self.arithmetic = choose_arithmetic(precision, copy.deepcopy(self.base), self.batch.x)

    def stage(self, parts: tuple[str, ...], objective: Any) -> Stage:
        """A stage of the published settings, with any learning rate."""
        start = "uniform" if objective == "sat" else "gaussian"
        attack = {"name": "pgd", "steps": STEPS, "step_size": LENGTH, "start": start}
        optimiser = {"name": "sgd", "lr": RATE}
        values = {"name": "stage", "train": parts, "objective": objective, "attack": attack, "optimiser": optimiser}
        return Stage.model_validate({**values, "epochs": 1})

    def copied(self, parts: tuple[str, ...], arithmetic: Arithmetic) -> nn.Module:
        """The network that has these parts, for one contestant alone."""
        model = copy.deepcopy(self.base if parts == ("model",) else self.dual)
        arithmetic.lay_out(model)
        return model

    def ours(self, parts: tuple[str, ...], objective: Any, arithmetic: Arithmetic | None = None) -> Contestant:
        """A step of a stage, ready to run."""
        arithmetic = arithmetic or self.arithmetic
        stage = self.stage(parts, objective)
        program = Program(self.copied(parts, arithmetic), parts)
        step = TrainingStep(program, stage, self.threat, stage.optimiser.create(program.parameters()), arithmetic)
        return lambda: step(self.batch, Streams.of(0, self.batch.index))

    def published(self, loop: Any, model: nn.Module) -> Contestant:
        """A published loop on a model of its own, in float32."""
        optimiser = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4)
        return lambda: loop(model, optimiser, self.batch.x, self.batch.y)

    def bare(self, parts: tuple[str, ...]) -> Contestant:
        """The least number of passes of a TRADES step and nothing else, in the same arithmetic."""
        program = Program(self.copied(parts, self.arithmetic), parts)
        x, device = self.arithmetic.images(self.batch.x), self.batch.x.device

        def passes() -> None:
            with in_eval_mode(program.model):
                with torch.no_grad(), self.arithmetic.autocast(device):
                    program.suffix(program.prefix(x))
                for _ in range(STEPS):
                    z = x.detach().requires_grad_()
                    with self.arithmetic.autocast(device):
                        logits = program.logits(z)
                    torch.autograd.grad(logits.float().sum(), z)
            program.model.train()
            with self.arithmetic.autocast(device):
                features = program.constant(x) if parts != ("model",) else x
                logits = program.suffix(features) + program.suffix(features)
            logits.float().sum().backward()
            program.model.zero_grad()

        return passes

    def art(self) -> Contestant | None:
        """The TRADES trainer of the Adversarial Robustness Toolbox on the same network; None if not installed."""
        try:
            import numpy as np
            from art.attacks.evasion import ProjectedGradientDescentPyTorch
            from art.defences.trainer import AdversarialTrainerTRADESPyTorch
            from art.estimators.classification import PyTorchClassifier
        except ImportError:
            return None
        model, (x, y) = copy.deepcopy(self.base), (self.batch.x.cpu().numpy(), self.batch.y.cpu().numpy())
        classifier = PyTorchClassifier(
            model, nn.CrossEntropyLoss(), x.shape[1:], 10, torch.optim.SGD(model.parameters(), RATE, momentum=0.9),
            clip_values=(0.0, 1.0), device_type="cpu" if self.batch.x.device.type == "cpu" else "gpu",
        )  # fmt: skip
        attack = ProjectedGradientDescentPyTorch(
            classifier, norm=np.inf, eps=EPS, eps_step=LENGTH, max_iter=STEPS, num_random_init=1, batch_size=len(x),
            verbose=False,
        )  # fmt: skip
        trainer = AdversarialTrainerTRADESPyTorch(classifier, attack, beta=6.0)
        return lambda: trainer.fit(x, y, batch_size=len(x), nb_epochs=1)


# ---- measuring


def contest(contestants: dict[str, Contestant], rounds: int, device: torch.device, clock: Callable[[], float]) -> Any:
    """Seconds of each contestant in each round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            synchronize(device)
            began = clock()
            run()
            synchronize(device)
            if number:
                seconds[name].append(clock() - began)
    return seconds


def ratios(over: Iterable[float], under: Iterable[float]) -> dict[str, float]:
    paired = [a / b for a, b in zip(over, under, strict=True)]
    return {"median": statistics.median(paired), "lowest": min(paired), "highest": max(paired)}


def show(row: dict[str, Any]) -> None:
    ratio = row["ratio"]
    spread = f"[{ratio['lowest']:.2f}, {ratio['highest']:.2f}]"
    print(f"{row['what']:58s} {row['seconds']:9.3f} s  {row['meaning']} {ratio['median']:5.2f} {spread}", flush=True)


def rows_of(bench: Bench, backbone: str, measure: Callable[[dict[str, Contestant]], Any]) -> Iterable[dict[str, Any]]:
    """All comparisons on a backbone, one after the other."""

    def row(what: str, meaning: str, times: Any, over: str, under: str, shown: str) -> dict[str, Any]:
        seconds = statistics.median(times[shown])
        images = len(bench.batch) / seconds
        ratio = ratios(times[over], times[under])
        return {
            "what": f"{backbone} {what}",
            "meaning": meaning,
            "seconds": seconds,
            "images_per_second": images,
            "ratio": ratio,
        }

    for name, loop in PUBLISHED.items():
        model = copy.deepcopy(bench.base)
        times = measure(
            {
                "published": bench.published(loop, model),
                "ours": bench.ours(("model",), OBJECTIVES[name]),
                "ours in float32": bench.ours(("model",), OBJECTIVES[name], FLOAT32),
            }
        )
        yield row(f"{name}, ours", "times faster than published", times, "published", "ours", "ours")
        yield row(
            f"{name}, ours in float32",
            "times faster than published",
            times,
            "published",
            "ours in float32",
            "ours in float32",
        )
    trades = OBJECTIVES["trades"]
    plain = bench.published(published_trades, TwoNetworks(copy.deepcopy(bench.dual)))
    times = measure({"plain": plain, "ours": bench.ours(PARTS["stage 3"], trades)})
    yield row("DH-AT stage 3, ours", "times faster than plainly written", times, "plain", "ours", "ours")
    contestants = {name: bench.ours(parts, trades) for name, parts in PARTS.items()}
    times = measure({"base": bench.ours(("model",), trades), **contestants})
    for name in PARTS:
        yield row(f"an epoch of {name}", "times that of the base method", times, name, "base", name)
    for name, parts in {"base method": ("model",), **PARTS}.items():
        times = measure({"bare": bench.bare(parts), "ours": bench.ours(parts, trades)})
        yield row(f"{name}: the least bare passes", "of our time", times, "bare", "ours", "bare")
    art = bench.art()
    if art is None:
        print(f"{ART} is not installed, so it is left out; pip install {ART}==1.20.1")
        return
    times = measure({"art": art, "ours": bench.ours(("model",), trades)})
    yield row("trades, ours", f"times faster than {ART}", times, "art", "ours", "ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbones", default="wideresnet-10-2,resnet-18")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--side", type=int, default=32, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "float32"], help="ours")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="the process's own time instead of the wall's")
    parser.add_argument("-o", "--output", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = find_device(given.device)
    if given.cpu_time and (given.threads > 1 or device.type != "cpu"):
        parser.error("--cpu-time counts all threads together; use it with --threads 1 on the CPU")
    clock = time.process_time if given.cpu_time else time.perf_counter
    settings = {key: str(value) for key, value in vars(given).items()}
    results: dict[str, Any] = {"environment": describe_environment(device), "settings": settings, "rows": []}
    for backbone in given.backbones.split(","):
        bench = Bench(backbone, given.batch_size, given.side, device, given.precision)
        print(f"{backbone}, batch {given.batch_size}, {given.threads} threads, ours in {bench.arithmetic.name}")
        for row in rows_of(bench, backbone, lambda contestants: contest(contestants, given.rounds, device, clock)):
            show(row)
            results["rows"].append({**row, "precision": bench.arithmetic.name})
            if given.output:
                given.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
