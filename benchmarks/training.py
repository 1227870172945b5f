"""What training costs: against the published loops, per stage, and against the least number of bare passes.

    python benchmarks/training.py --backbones wideresnet-10-2,resnet-18 -o benchmarks/results/training.json

Everything that is compared runs in turn in this one process, on the same threads, batch and start weights; a round runs
each contestant once, and ratios are taken within a round. Medians over the rounds are shown, with the extremes of
the ratios. The published loops are written plainly from their formulas (float32, eager, clean logits recomputed where
the published code does so); ours run as `dualhead train` would: number format, layout and lanes are measured at the
start. Every backbone meets the published loops and the trainer of adversarial-robustness-toolbox; the first one is
measured in float32 and stage by stage besides. Results are written after every contest. On a shared machine,
`--cpu-time` with one thread counts the process's own time.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # the field's name for it
from torch import Tensor, nn

from dualhead.data import Batch
from dualhead.heads import DualHeadClassifier, attach_second_head
from dualhead.models import Normalize, backbones
from dualhead.noise import Streams
from dualhead.objectives import Logits
from dualhead.system.arithmetic import Arithmetic, choose_arithmetic, with_lanes
from dualhead.system.devices import describe_environment, find_device, synchronize
from dualhead.system.modes import in_eval_mode
from dualhead.system.replicas import pool, twins
from dualhead.threats.lp import ThreatModel
from dualhead.training import Passes, Stage
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
LEAST_ROUNDS = 3
"""However short the time."""
WARM = 15.0
"""Seconds of a first round beside which allocation and the choice of kernels are nothing, so that it counts."""
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
        self.arithmetic = self.as_a_run_would(precision)

    def as_a_run_would(self, precision: Any) -> Arithmetic:
        """The arithmetic that a run chooses at its start for the base model."""
        model = copy.deepcopy(self.base)
        return with_lanes(choose_arithmetic(precision, model, self.batch.x), model, self.batch.x)

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
        passes = Passes(self.copied(parts, arithmetic), parts)
        step = TrainingStep(passes, stage, self.threat, stage.optimiser.create(passes.parameters()), arithmetic)
        return lambda: step(self.batch, Streams.of(0, self.batch.index))

    def published(self, loop: Any, model: nn.Module) -> Contestant:
        """A published loop on a model of its own, in float32."""
        optimiser = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4)
        return lambda: loop(model, optimiser, self.batch.x, self.batch.y)

    def bare(self, parts: tuple[str, ...]) -> Contestant:
        """The least number of passes of a TRADES step and nothing else, in the same arithmetic and lanes."""
        through, lanes = Passes(self.copied(parts, self.arithmetic), parts), self.arithmetic.lanes
        x, device = self.arithmetic.images(self.batch.x), self.batch.x.device
        in_lanes = [Passes(copied.eval(), parts) for copied in twins(through.model, lanes)] if lanes > 1 else [through]

        looks = {id(each): each.look({"": Logits()}) for each in (through, *in_lanes)}
        look = looks[id(through)]

        def attack(through: Passes, x: Tensor) -> None:
            with self.arithmetic.reuse_casts(device):
                with torch.no_grad(), self.arithmetic.autocast(device):
                    looks[id(through)]({"clean": through.prefix(x)})
                for _ in range(STEPS):
                    z = x.detach().requires_grad_()
                    with self.arithmetic.autocast(device):
                        logits = through.logits(z)
                    torch.autograd.grad(logits.float().sum(), z)

        def passes() -> None:
            with in_eval_mode(through.model):
                if lanes > 1:
                    list(pool(lanes).map(attack, in_lanes, x.tensor_split(lanes)))
                else:
                    attack(through, x)
            through.model.train()
            with self.arithmetic.autocast(device):
                crossing = {"clean": through.constant(x)}
                logits = look(crossing)[""] + look(crossing)[""]
            logits.float().sum().backward()
            through.model.zero_grad()

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

        def fit() -> None:
            with contextlib.redirect_stderr(io.StringIO()):  # its bar of progress
                trainer.fit(x, y, batch_size=len(x), nb_epochs=1)

        return fit


# ---- measuring


@dataclass(frozen=True)
class Comparison:
    """A ratio of two contestants of a contest, paired by round.

    Args:
        what: the line's name.
        over: whose time is divided.
        under: by whose.
        meaning: of the ratio.
        aim: what the ratio should be, `>= 2.5` or `<= 1.4`; empty for none.
    """

    what: str
    over: str
    under: str
    meaning: str
    aim: str = ""

    def met(self, ratio: float) -> bool | None:
        """Whether the aim is; None without one."""
        if not self.aim:
            return None
        sign, number = self.aim.split()
        return ratio >= float(number) if sign == ">=" else ratio <= float(number)


@dataclass(frozen=True)
class Contest:
    """Who runs in turn, and what is read off."""

    contestants: dict[str, Contestant]
    comparisons: list[Comparison]

    def measure(self, rounds: int, seconds: float, device: torch.device, clock: Callable[[], float]) -> Any:
        """Seconds of each contestant in each round; the first round does not count unless it was long.

        Args:
            rounds: that count, at most.
            seconds: after which no further round begins, if there are `LEAST_ROUNDS`.
            device: where they run.
            clock: in seconds.
        """
        taken: dict[str, list[float]] = {name: [] for name in self.contestants}
        names, least, began, number = list(self.contestants), min(LEAST_ROUNDS, rounds), time.monotonic(), 0
        while (done := len(taken[names[0]])) < rounds and (done < least or time.monotonic() - began < seconds):
            start = number % len(names)  # nobody always follows the same one
            for name in names[start:] + names[:start]:
                synchronize(device)
                beginning = clock()
                self.contestants[name]()
                synchronize(device)
                taken[name].append(clock() - beginning)
            if number == 0 and time.monotonic() - began < WARM:
                taken = {name: [] for name in names}
            number += 1
        return taken


def ratios(over: Iterable[float], under: Iterable[float]) -> dict[str, float]:
    paired = [a / b for a, b in zip(over, under, strict=True)]
    return {"median": statistics.median(paired), "lowest": min(paired), "highest": max(paired)}


def methods(bench: Bench, *, in_full: bool) -> Iterator[Contest]:
    """Base methods against the published loops and the toolbox's TRADES; in full: ours in float32 too."""
    float32 = bench.as_a_run_would("float32") if in_full else None
    for name, loop in PUBLISHED.items():
        contestants = {
            "published": bench.published(loop, copy.deepcopy(bench.base)),
            "ours": bench.ours(("model",), OBJECTIVES[name]),
        }
        aim = ">= 2.5" if name == "trades" else ""
        found = [Comparison(f"{name}, ours", "published", "ours", "times faster than published", aim)]
        if float32 is not None:
            ours = f"{name}, ours in float32"
            contestants["float32"] = bench.ours(("model",), OBJECTIVES[name], float32)
            found.append(Comparison(ours, "published", "float32", "times faster than published"))
        art = bench.art() if name == "trades" else None
        if art is not None:
            contestants["art"] = art
            found.append(Comparison(f"{name}, ours", "art", "ours", f"times faster than {ART}", ">= 2.0"))
        yield Contest(contestants, found)


def stages(bench: Bench) -> Contest:
    """What stages cost beside the base method, beside their bare passes, and stage 3 beside its plain loop."""
    trades, on_cpu = OBJECTIVES["trades"], bench.batch.x.device.type == "cpu"
    plain = bench.published(published_trades, TwoNetworks(copy.deepcopy(bench.dual)))
    contestants: dict[str, Contestant] = {"plain": plain}
    found = [
        Comparison("DH-AT stage 3, ours", "plain", "stage 3", "times faster than plainly written", ">= 4.0"),
    ]
    most = {"stage 2": "<= 1.0", "stage 3": "<= 1.4", "all parts jointly": "<= 1.8"}
    limit = f">= {0.85 if on_cpu else 0.8}"
    for name, parts in {"base method": ("model",), **PARTS}.items():
        contestants |= {name: bench.ours(parts, trades), f"bare {name}": bench.bare(parts)}
        if name in PARTS:
            meaning = "times that of the base method"
            found.append(Comparison(f"an epoch of {name}", name, "base method", meaning, most.get(name, "")))
        found.append(Comparison(f"{name}: the least bare passes", f"bare {name}", name, "of our time", limit))
    return Contest(contestants, found)


def contests(bench: Bench, *, in_full: bool) -> Iterator[Contest]:
    """All on a backbone; each is made when the one before it is over, so that not all networks are held at once."""
    yield from methods(bench, in_full=in_full)
    if in_full:
        yield stages(bench)


def rows_of(contest: Contest, backbone: str, images: int, times: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
    """What is read off a contest's times."""
    for comparison in contest.comparisons:
        ours = comparison.over if comparison.meaning == "times that of the base method" else comparison.under
        seconds = statistics.median(times[ours])
        ratio = ratios(times[comparison.over], times[comparison.under])
        yield {
            "backbone": backbone,
            **asdict(comparison),
            "seconds": seconds,
            "steps_per_second": 1.0 / seconds,
            "images_per_second": images / seconds,
            "ratio": ratio,
            "rounds": len(times[ours]),
            "met": comparison.met(ratio["median"]),
        }


def show(row: dict[str, Any]) -> None:
    ratio = row["ratio"]
    spread = f"[{ratio['lowest']:.2f}, {ratio['highest']:.2f}]"
    verdict = {None: "", True: f"aim {row['aim']}: met", False: f"aim {row['aim']}: short"}[row["met"]]
    print(
        f"{row['backbone'] + ' ' + row['what']:58s} {row['seconds']:9.3f} s  {row['images_per_second']:8.1f} images/s  "
        f"{ratio['median']:5.2f} {spread:14s} {row['meaning']}  {verdict}",
        flush=True,
    )


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbones", default="wideresnet-10-2,resnet-18", help="the first one is measured in full")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--side", type=int, default=32, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=5, help="that count, at most")
    parser.add_argument("--minutes", type=float, default=20.0, help="about; a contest has at least 3 rounds")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "float32"], help="ours")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="the process's own time instead of the wall's")
    parser.add_argument("-o", "--output", type=Path, default=None)
    given = parser.parse_args()
    if given.cpu_time and (given.threads > 1 or find_device(given.device).type != "cpu"):
        parser.error("--cpu-time counts all threads together; use it with --threads 1 on the CPU")
    return given


def main() -> None:
    given = read_arguments()
    torch.set_num_threads(given.threads)
    device = find_device(given.device)
    clock = time.process_time if given.cpu_time else time.perf_counter
    environment = describe_environment(device)
    results: dict[str, Any] = {"environment": environment, "settings": {k: str(v) for k, v in vars(given).items()}}
    results["arithmetic"], results["rows"] = {}, []
    names, end = given.backbones.split(","), time.monotonic() + 60.0 * given.minutes
    left = len(PUBLISHED) * len(names) + 1
    if importlib.util.find_spec("art") is None:
        print(f"{ART} is not installed, so it is left out; pip install -c constraints.txt -e '.[benchmark]'")
    for number, backbone in enumerate(names):
        bench = Bench(backbone, given.batch_size, given.side, device, given.precision)
        results["arithmetic"][backbone] = asdict(bench.arithmetic)
        print(
            f"{backbone}, batch {given.batch_size}, {environment['accelerator'] or environment['cpu']}, "
            f"{given.threads} threads; ours in {bench.arithmetic.name}, {bench.arithmetic.lanes} lanes"
        )
        for contest in contests(bench, in_full=number == 0):
            share = max(0.0, end - time.monotonic()) / left
            times = contest.measure(given.rounds, share, device, clock)
            left -= 1
            for row in rows_of(contest, backbone, given.batch_size, times):
                show(row)
                results["rows"].append(row)
            if given.output:
                given.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print("\nAll of it:")
    for row in results["rows"]:
        show(row)


if __name__ == "__main__":
    main()
