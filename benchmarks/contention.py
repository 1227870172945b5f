"""How much slower a busy machine makes training and an evaluation, by how threads wait for one another.

    python benchmarks/contention.py benchmarks/results/contention.json --runs 3

Each setting trains `digits` for 4 epochs a stage and attacks what came of it, in processes of its own: alone, and
beside processes that spin on every core. All settings take turns in every round, each turn alone right before its turn
beside the others, so that a ratio is of neighbours in time; whoever began a round is last in the next. The machine must
be quiet otherwise: the benchmark refuses to begin where the load says that it is not. A round takes about 10 minutes on
two cores; what is finished is written after each.

    python benchmarks/contention.py benchmarks/results/contention.json --runs 0 --pairs 6

adds turns alone to a file of the same machine: a difference of a few percent needs more of them than the rounds have.

Two processes that share the cores fairly take twice as long. The aims: at most 2.6 times, and alone no more than 3 %
longer than with the runtime's own way of waiting.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dualhead.system.waiting import CHOICES

OURS, DEFAULT = "as the product sets it", "the runtime's own"
SETTINGS: Mapping[str, Mapping[str, str]] = {
    OURS: {},
    # GNU's runtime does not read it, and LLVM's has it by default: it only keeps the product from setting anything.
    DEFAULT: {"KMP_LIBRARY": "throughput"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=100000": {"GOMP_SPINCOUNT": "100000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
WORK = ("training", "evaluation")
MOST_BUSY, MOST_SLOWER = 2.6, 1.03
"""Aims: beside others over alone, and alone over the runtime's own way."""
QUIET = 0.3
"""Load of the last minute, for each core, above which the machine is not quiet."""


def cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process: without words on waiting and threads but those of the setting."""
    kept = {name: value for name, value in os.environ.items() if name not in (*CHOICES, "OMP_NUM_THREADS")}
    return kept | dict(changes)


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """Keep so many cores busy meanwhile, each by a process that only counts."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
        for other in others:
            other.wait()


def commands(folder: Path, epochs: int) -> dict[str, list[str]]:
    """Return the commands of one turn, whose files lie in a folder of its own."""
    run = str(folder / "run")
    train = ["train", "digits", f"stages.*.epochs={epochs}", "runtime.device=cpu", "evaluate.limit=100"]
    attack = ["evaluate", run, "--attack", "autoattack-fast", "--output", str(folder / "evaluation")]
    return {
        "training": [*train, "evaluate.attacks=[fgsm]", "--run-dir", run, "--quiet"],
        "evaluation": [*attack, "--device", "cpu", "--quiet"],
    }


def turn(changes: Mapping[str, str], epochs: int) -> dict[str, float]:
    """Return the seconds of a training and of an evaluation."""
    taken = {}
    with tempfile.TemporaryDirectory() as folder:
        for work, command in commands(Path(folder), epochs).items():
            begun = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "dualhead", *command], env=environment(changes), check=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
            taken[work] = time.perf_counter() - begun
    return taken


def measure(rounds: int, epochs: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield after each round the seconds of every turn so far, by work, setting and company."""
    seconds: dict[str, Any] = {work: {name: {"alone": [], "beside": []} for name in names} for work in WORK}
    for number in range(rounds):
        for name in [*names[number % len(names) :], *names[: number % len(names)]]:
            alone = turn(SETTINGS[name], epochs)
            with spinning(cores()):
                beside = turn(SETTINGS[name], epochs)
            for work in WORK:
                seconds[work][name]["alone"].append(alone[work])
                seconds[work][name]["beside"].append(beside[work])
            told = ", ".join(f"{work} {alone[work]:.1f} and {beside[work]:.1f} s" for work in WORK)
            print(f"round {number + 1}, {name}: {told}", flush=True)
        yield seconds


def measure_pairs(count: int, epochs: int) -> dict[str, Any]:
    """Return the seconds of further turns alone, by work and setting: the product's and the runtime's own in turns."""
    seconds: dict[str, Any] = {work: {name: [] for name in (OURS, DEFAULT)} for work in WORK}
    for number in range(count):
        for name in (OURS, DEFAULT)[:: 1 if number % 2 == 0 else -1]:
            alone = turn(SETTINGS[name], epochs)
            for work in WORK:
                seconds[work][name].append(alone[work])
            print(
                f"pair {number + 1}, {name}: " + ", ".join(f"{work} {alone[work]:.1f} s" for work in WORK), flush=True
            )
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def compared(seconds: Mapping[str, Any], pairs: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return for each work and setting the medians and the ratios, which are taken round by round, and pair by pair."""
    rows = []
    for work, by_setting in seconds.items():
        own = by_setting[DEFAULT]["alone"]
        for name, taken in by_setting.items():
            beside = [b / a for a, b in zip(taken["alone"], taken["beside"], strict=True)]
            alone = [a / d for a, d in zip(taken["alone"], own, strict=True)]
            if pairs and name in pairs[work]:
                alone += [a / d for a, d in zip(pairs[work][name], pairs[work][DEFAULT], strict=True)]
            row: dict[str, Any] = {"work": work, "setting": name}
            row |= {"alone": spread(taken["alone"]), "beside": spread(taken["beside"])}
            row |= {"beside_over_alone": spread(beside), "alone_over_default": spread(alone)}
            if name == OURS:
                row["met"] = row["beside_over_alone"]["median"] <= MOST_BUSY
                row["met_alone"] = row["alone_over_default"]["median"] <= MOST_SLOWER
            rows.append(row)
    return rows


def table(results: Mapping[str, Any]) -> str:
    """Return the rows as a Markdown table: medians, and lowest to highest of the ratios."""
    lines = ["| work | setting | alone, s | beside, s | beside over alone | alone over the runtime's own |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in results["rows"]:
        ratios = [
            "{median:.2f} ({lowest:.2f} to {highest:.2f})".format(**row[key])
            for key in ("beside_over_alone", "alone_over_default")
        ]
        times = [f"{row[key]['median']:.1f}" for key in ("alone", "beside")]
        lines.append(f"| {' | '.join([row['work'], row['setting'], *times, *ratios])} |")
    return "\n".join(lines) + "\n"


def described() -> dict[str, Any]:
    """Return what determines the speed."""
    import torch

    from dualhead.system.devices import describe_environment

    return {**describe_environment(torch.device("cpu")), "cores": cores()}


def commit() -> str:
    """Return the commit that was measured, with a plus sign if files were changed; empty outside of a checkout."""
    here = Path(__file__).resolve().parent
    asked = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def read_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="?", type=Path, default=None, help="where results are written")
    parser.add_argument("--runs", type=int, default=3, help="rounds; 0 for further pairs alone")
    parser.add_argument(
        "--pairs", type=int, default=0, help="further turns alone of the two settings, after the rounds"
    )
    parser.add_argument("--epochs", type=int, default=4, help="of each stage")
    parser.add_argument("--aims", action="store_true", help="only the two settings that the aims compare")
    parser.add_argument("--anyway", action="store_true", help="measure on a machine that is busy, too")
    return parser.parse_args(given)


def earlier(path: Path | None) -> dict[str, Any]:
    """Read the rounds that further pairs are added to; ends the program where they are of another machine."""
    if path is None or not path.is_file():
        sys.exit("--runs 0: name the file of earlier rounds")
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    here = described()
    if any(results["environment"][key] != here[key] for key in ("cpu", "cores", "torch")):
        sys.exit(f"--runs 0: {path} was measured on another machine, or with another torch; begin with --runs 3")
    return results


def write(results: Mapping[str, Any], path: Path | None) -> None:
    """Write what is known so far, if there is a place for it."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, compare, write."""
    given = read_arguments(arguments)
    if given.runs < 0 or given.pairs < 0 or not given.runs + given.pairs:
        sys.exit(f"--runs and --pairs must be at least 0, and not both 0; got {given.runs} and {given.pairs}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what spins is ended, too
    load = os.getloadavg()[0]
    if load > QUIET * cores() and not given.anyway:
        sys.exit(f"the load is {load:.1f} on {cores()} cores: wait until the machine is quiet, or say --anyway")
    begun = datetime.now(UTC).isoformat(timespec="seconds")
    facts = {"begun": begun, "commit": commit(), "load_before": load, "epochs": given.epochs}
    results = {} if given.runs else earlier(given.json)
    turn(SETTINGS[OURS], given.epochs)  # not counted: it reads and measures what later turns find read and measured
    names = (OURS, DEFAULT) if given.aims else tuple(SETTINGS)
    for number, seconds in enumerate(measure(given.runs, given.epochs, names), start=1):
        rows = compared(seconds)
        results = {**facts, "runs": number, "environment": described(), "seconds": seconds, "rows": rows}
        write(results, given.json)
    if given.pairs:
        pairs = {**facts, "seconds": measure_pairs(given.pairs, given.epochs)}
        results |= {"pairs": pairs, "rows": compared(results["seconds"], pairs["seconds"])}
        write(results, given.json)
    print(table(results), end="")


if __name__ == "__main__":
    main()
