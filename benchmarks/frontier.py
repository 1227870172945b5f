"""Robust accuracy over training cost: cheap adversarial training, SAT, TRADES and guided distillation side by side.

    python benchmarks/frontier.py DATA OUT [--seeds 3] [--only PATTERN] [-o benchmarks/results/frontier.json]

Each method trains WRN-10-1 (stem stride 2) on the 2,250 images of `benchmarks/strongest`, for several lengths at
eps 8/255, and those on single steps at 16/255 too, where FGSM from a uniform start overfits catastrophically. Every run
keeps its last epoch, with averaged weights, and is attacked by APGD-CE and APGD-T on test images that none of them has
seen. Settings are the published ones, scaled to the length; nothing is chosen on test images.

The same command goes on where it was stopped. Seeds are done one after another, all methods in each, cheap ones first;
what is finished is written to the results after each run. A run whose row stands in the results is not done again, also
where its folder is gone; take the row out to repeat it. DATA: CIFAR-10 as `dualhead train` takes it.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dualhead.statistics import overfits_single_steps, student

HERE = Path(__file__).resolve().parent
ATTACK = "autoattack-fast"
WIDE_STEP = "{{name: fgsm, step_size: {step}/255, start: uniform}}"
TWO_STEPS = "{{name: pgd, steps: 2, step_size: {half}/255, start: clean}}"
FIVE_STEPS = "{{name: pgd, steps: 5, step_size: {half}/255, start: uniform}}"
LARGE = 16
"""In 1/255: the eps at which FGSM from a uniform start is known to overfit catastrophically."""


@dataclass(frozen=True)
class Method:
    """A way to train, at several lengths.

    Args:
        name: in the results.
        title: what people read.
        settings: overrides of the base recipe's only stage; `{eps}` and `{step}`, 1.25 times that, are in 1/255.
        epochs: lengths at 8/255; at other radii the longest one counts.
        large: whether it trains at the large eps too.
        recipe: beside `benchmarks/strongest/`.
    """

    name: str
    title: str
    settings: tuple[str, ...]
    epochs: tuple[int, ...]
    large: bool = False
    recipe: str = "cpu_base"

    def overrides(self, eps: int, epochs: int) -> list[str]:
        """Return the settings of a run."""
        made = [setting.format(eps=eps, half=eps / 2, step=1.25 * eps) for setting in self.settings]
        if self.recipe == "cpu_distilled":  # as long as half of it, in the proportion of its two stages
            return [*made, f"stages.guided.epochs={round(epochs * 136 / 150)}", f"stages.distilled.epochs={epochs}"]
        return [*made, f"stages.base.epochs={epochs}"]


def on_sat(attack: str, objective: str = "sat") -> tuple[str, ...]:
    """Return the overrides of training on cross-entropy with an attack."""
    return f"stages.base.objective={objective}", f"stages.base.attack={attack}"


METHODS = (  # the longest run of each takes about 300 forward equivalents an image
    Method("fgsm_rs", "FGSM-RS", on_sat(WIDE_STEP), (15, 30, 60), large=True),
    Method("n_fgsm", "N-FGSM", on_sat("{{name: n_fgsm}}"), (15, 30, 60), large=True),
    Method("pgd_2", "PGD-2", on_sat(TWO_STEPS), (11, 22, 43), large=True),
    # A replay is an update: as many passes through the images as epochs times replays.
    Method("free", "Free AT", ("stages.base.objective=sat", "stages.base.free={{replays: 8}}"), (3, 6, 12)),
    Method("grad_align", "GradAlign", on_sat("{{name: fgsm}}", "{{name: grad_align, weight: 0.2}}"), (6, 12, 23)),
    Method("elle", "ELLE-A", on_sat("{{name: fgsm}}", "{{name: elle}}"), (5, 11, 22)),
    Method("sat", "SAT", on_sat(FIVE_STEPS), (6, 12, 23)),
    Method("trades", "TRADES", (), (4, 9, 18)),
    Method("distilled", "guided distillation (TRADES)", (), (2, 4, 8), recipe="cpu_distilled"),
)


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    method: Method
    eps: int
    epochs: int
    seed: int

    @property
    def place(self) -> str:
        """Folder below OUT."""
        return f"{self.method.name}/eps={self.eps}/epochs={self.epochs}/seed={self.seed}"

    def is_of(self, row: dict[str, Any], images: int) -> bool:
        """Return whether a row of the results is of this run, evaluated on so many images."""
        ours = (self.method.name, self.eps, self.epochs, self.seed, images)
        return ours == tuple(row[key] for key in ("method", "eps", "epochs", "seed", "images"))


def runs(seeds: int, pattern: str, scale: float = 1.0, first: int = 0) -> Iterator[Run]:
    """Return all runs, seed by seed: first those at the large eps, then the longest of every method, then the rest."""
    chosen = [method for method in METHODS if fnmatch.fnmatch(method.name, pattern)]
    for seed in range(first, first + seeds):
        lengths = [(method, LARGE, method.epochs[-1]) for method in chosen if method.large]
        lengths += [(method, 8, method.epochs[-1]) for method in chosen]
        lengths += [(method, 8, epochs) for method in chosen for epochs in method.epochs[:-1]]
        for method, eps, epochs in lengths:
            yield Run(method, eps, max(1, round(epochs * scale)), seed)


def do(command: Sequence[str]) -> None:
    """Run a command of the product in a process of its own; what it says goes to stderr."""
    subprocess.run([sys.executable, "-m", "dualhead", *command], check=True, stdout=subprocess.DEVNULL)


def train(run: Run, data: str, folder: Path, extra: Sequence[str]) -> None:
    """Train a run, or go on with it."""
    recipe = HERE / "strongest" / f"{run.method.recipe}.yaml"
    kept = [f"data.source={data}", f"threat.eps={run.eps}/255", "validation.every=1000", "evaluate.attacks=[fgsm]"]
    settings = [
        *kept,
        "evaluate.limit=100",
        "runtime.precision=float32",
        *run.method.overrides(run.eps, run.epochs),
        *extra,
    ]
    do(["train", str(recipe), *settings, "--seed", str(run.seed), "--run-dir", str(folder), "--quiet"])


def evaluate(folder: Path, images: int) -> None:
    """Attack what a run deploys."""
    attacked = ["--attack", ATTACK, "--attack", "pgd-10", "--attack", "fgsm", "--limit", str(images)]
    do(["evaluate", str(folder), *attacked, "--output", str(folder / "evaluations" / "frontier"), "--quiet"])


def row(run: Run, folder: Path) -> dict[str, Any]:
    """Read what a finished run gave."""
    found = json.loads((folder / "evaluations" / "frontier" / "results.json").read_text())
    rows = json.loads((folder / "comparison.json").read_text())["rows"]
    cost = rows[-1]["training_cost"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    watched = [(line["watched_fgsm"], line["watched_pgd"]) for line in lines if "watched_fgsm" in line]
    return {
        "method": run.method.name,
        "title": run.method.title,
        "eps": run.eps,
        "epochs": run.epochs,
        "seed": run.seed,
        "images": found["num_samples"],
        "clean": found["clean_accuracy"],
        **{name: found["robust_accuracy"][name] for name in ("fgsm", "pgd-10", ATTACK)},
        "forward_equivalents": cost["forward_equivalents"],
        "flops": cost["flops"],
        "seconds": cost["seconds"],
        "overfitted_epochs": [n + 1 for n, pair in enumerate(watched) if overfits_single_steps(*pair)],
        "environment": {key: found["environment"][key] for key in ("cpu", "cpu_capability", "threads", "torch")},
    }


def place_in_plan(row: dict[str, Any]) -> tuple[int, int, int, int]:
    """Return what rows are sorted by: whichever run ended first, the results look the same."""
    return [method.name for method in METHODS].index(row["method"]), row["eps"], row["epochs"], row["seed"]


def summarised(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return means over seeds, with Student's 95 % interval where there are several."""
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for each in rows:
        groups.setdefault((each["method"], each["eps"], each["epochs"]), []).append(each)
    told = []
    for (method, eps, epochs), group in groups.items():
        entry: dict[str, Any] = {"method": method, "title": group[0]["title"], "eps": eps, "epochs": epochs}
        entry |= {"seeds": [each["seed"] for each in group], "images": group[0]["images"]}
        entry["forward_equivalents"] = float(np.mean([each["forward_equivalents"] for each in group]))
        entry["flops"] = float(np.mean([each["flops"] for each in group]))
        for name in ("clean", "fgsm", "pgd-10", ATTACK):
            values = [each[name] for each in group]
            entry[name] = {"mean": float(np.mean(values)), "interval": student(values, floor=1.0 / group[0]["images"])}
        entry["seeds_overfitted"] = sum(bool(each["overfitted_epochs"]) for each in group)
        told.append(entry)
    return told


def read_arguments(given: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; further KEY=VALUE go to every training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="CIFAR-10: a folder of parquet files, or a name of the Hub")
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="seeds from this one on")
    parser.add_argument("--only", default="*", help="methods by a pattern, such as 'n_*'")
    parser.add_argument("--images", type=int, default=1000, help="test images of each evaluation")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all lengths, for a trial")
    parser.add_argument("-o", "--output", type=Path, default=None, help="OUT/frontier.json if left out")
    return parser.parse_known_args(given)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, evaluate, write."""
    given, extra = read_arguments(arguments)
    wrong = [word for word in extra if "=" not in word or word.startswith("-")]
    if wrong:
        sys.exit(f"{wrong[0]}: neither an option nor KEY=VALUE; --help tells the options")
    output = given.output or given.out / "frontier.json"
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"] if output.is_file() else []
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    for run in runs(given.seeds, given.only, given.scale, given.first_seed):
        if any(run.is_of(each, given.images) for each in rows):
            continue
        folder = given.out / run.place
        if not (folder / "evaluations" / "frontier" / "results.json").is_file():
            print(run.place, flush=True)
            train(run, given.data, folder, extra)
            evaluate(folder, given.images)
        rows = sorted([*rows, row(run, folder)], key=place_in_plan)
        output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"rows": rows, "summary": summarised(rows)}, indent=2) + "\n"
        output.with_suffix(".part").write_text(text, encoding="utf-8")
        output.with_suffix(".part").replace(output)


if __name__ == "__main__":
    main()
