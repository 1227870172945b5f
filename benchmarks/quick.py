"""What cheaper evaluations cost in verdicts: the quick suite, the default precision, PGD that stops at cycles.

    python benchmarks/quick.py --cifar10 FOLDER --tiny-imagenet FOLDER --work FOLDER -o quick.json

On five models of different kinds: `natural`, `mart` and `sat` (200 classes) are trained first, by the recipes in
`benchmarks/quick`; `trades` and `merged` lie in `benchmarks/results/models`. Each is attacked on the same test images
by the whole of AutoAttack and by `autoattack-quick`, both in float32; by AutoAttack with the default precision, and
with queries in bf16 even where that does not pay; and by PGD with and without stopping at cycles. All in this process,
on the same threads. How many targets the quick suite tries was chosen by the check `targets`: verdicts with several
numbers beside those of the whole of AutoAttack, on training images that no model has learnt from.

The same command goes on where it was stopped, and leaves rows alone that the results hold for as many images;
`--models` and `--checks` choose a part of it.

Process seconds are the processor time of an evaluation that was not interrupted; wall seconds are added up over
interruptions, and on a busy machine hold what others took.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualhead.attacks.apgd_malt import APGDMALT
from dualhead.attacks.autoattack import AutoAttackQuick
from dualhead.attacks.base import Search
from dualhead.attacks.pgd import PGD
from dualhead.data import load_split
from dualhead.evaluation import Evaluation, evaluate, wilson, work
from dualhead.runs.run import train
from dualhead.saving.models import load
from dualhead.system.devices import describe_environment
from dualhead.system.files import write_json
from dualhead.system.memory import keep_freed_blocks
from dualhead.threats import Norm
from dualhead.threats.lp import ThreatModel

HERE = Path(__file__).parent
KEPT = {"trades": "trades-base", "merged": "trades-distilled"}
MODELS = ("trades", "merged", "natural", "mart", "sat")
CHECKS = ("targets", "quick", "precision", "cycles")
TARGETS = (1, 3, 5)
"""How many targets are tried to choose from."""
PGD_LONG = {"name": "pgd", "steps": 100, "step_size": "2/255"}
Row = dict[str, Any]


class Bench:
    """One model, its images, and where its results lie.

    Args:
        name: of the model.
        given: the command line.
    """

    def __init__(self, name: str, given: argparse.Namespace) -> None:
        self.name, self.given = name, given
        source = given.tiny_imagenet if name == "sat" else given.cifar10
        self.threat = ThreatModel("Linf", "4/255" if name == "sat" else "8/255")
        self.model = _model(name, source, given.work)
        self.source = source
        self.options: Row = {"image_size": (32, 32)} if name == "sat" else {}
        test = load_split(source, "test", limit=max(given.images, given.pgd_images), **self.options)
        self.test = test.images, test.labels

    @functools.cached_property
    def held_out(self) -> tuple[Tensor, Tensor]:
        """Training images that no model has learnt from: the last ones, where all learn from the first ones."""
        whole = load_split(self.source, "train", **self.options)
        return whole.images[-self.given.images :], whole.labels[-self.given.images :]

    def measure(
        self, label: str, attack: str | Row, precision: str, count: int, *, held_out: bool = False
    ) -> tuple[Evaluation, Row]:
        """Evaluate, or read what was evaluated, and tell what it took."""
        folder = self.given.work / "evaluations" / self.name / f"{label}-{count}"
        took = folder / "took.json"
        if not took.is_file():
            images, labels = self.held_out if held_out else self.test
            begun, fresh = time.process_time(), not folder.exists()
            evaluate(
                self.model, images[:count], labels[:count].long(), threat=self.threat, attacks=[attack],
                precision=precision, batch_size=256, seed=self.given.seed, diagnostics=precision != "float32",
                output_dir=folder,
            )  # fmt: skip
            write_json(took, {"process_seconds": time.process_time() - begun if fresh else None})
        evaluation = Evaluation.load(folder)
        (record,) = evaluation.results["attacks"].values()
        parts = [{k: part[k] for k in ("name", "seconds", "precision", "fooled")} for part in record["parts"]]
        (verdict,) = evaluation.verdicts.values()
        robust = int(verdict.robust.sum())
        return evaluation, {
            "robust": robust,
            "interval": wilson(robust, count),
            "clean": int((evaluation.clean_prediction == evaluation.labels).sum()),
            "seconds": record["seconds"],
            **json.loads(took.read_text(encoding="utf-8")),
            "forward_passes": record["forward_passes"],
            "backward_passes": record["backward_passes"],
            "parts": parts,
            **({"audit": record["audit"]} if "audit" in record else {}),
        }


def _model(name: str, source: str, work: Path) -> nn.Module:
    """The trained classifier, frozen; trained here if need be, going on where that was stopped."""
    if name in KEPT:
        return load(HERE / "results" / "models" / KEPT[name]).requires_grad_(requires_grad=False)
    run = work / "runs" / name
    if not (run / "comparison.json").is_file():
        train(HERE / "quick" / f"{name}.yaml", [f"data.source={source}"], run_dir=run)
    return load(run).requires_grad_(requires_grad=False)


def _robust(evaluation: Evaluation) -> NDArray[np.bool_]:
    (verdict,) = evaluation.verdicts.values()
    return verdict.robust


def _ratio(slow: Row, fast: Row, key: str) -> float | None:
    return slow[key] / fast[key] if slow[key] and fast[key] else None


def targets(bench: Bench) -> Row:
    """The quick suite with several numbers of targets beside the whole one, on held-out images."""
    count, found = bench.given.images, {}
    whole, full = bench.measure("held-out-autoattack", "autoattack", "float32", count, held_out=True)
    suite = AutoAttackQuick.members
    for number in TARGETS:

        def members(self: AutoAttackQuick, norm: Norm = "Linf", number: int = number) -> Sequence[Search]:
            return [replace(part, targets=number) if isinstance(part, APGDMALT) else part for part in suite(self, norm)]

        with patch.object(AutoAttackQuick, "members", members):
            label = f"held-out-quick-{number}"
            short, fast = bench.measure(label, "autoattack-quick", "float32", count, held_out=True)
        found[str(number)] = {
            "robust": fast["robust"],
            "missed": int((_robust(short) & ~_robust(whole)).sum()),
            "process_time_ratio": _ratio(full, fast, "process_seconds"),
        }
    return {"images": count, "robust": full["robust"], "targets": found}


def quick(bench: Bench) -> Row:
    """The quick suite beside the whole one, in the same precision."""
    count = bench.given.images
    whole, full = bench.measure("autoattack-float32", "autoattack", "float32", count)
    short, fast = bench.measure("quick-float32", "autoattack-quick", "float32", count)
    missed = np.flatnonzero(_robust(short) & ~_robust(whole))
    (verdict,) = whole.verdicts.values()
    return {
        "images": count,
        "autoattack": full,
        "autoattack-quick": fast,
        "points_apart": 100 * (fast["robust"] - full["robust"]) / count,
        "missed": [{"index": int(i), "found_by": full["parts"][int(verdict.part[i])]["name"]} for i in missed],
        "found_beyond": [int(i) for i in np.flatnonzero(_robust(whole) & ~_robust(short))],
        "process_time_ratio": _ratio(full, fast, "process_seconds"),
        "wall_time_ratio": _ratio(full, fast, "seconds"),
    }


def precision(bench: Bench) -> Row:
    """AutoAttack with the default precision beside float32."""
    count = bench.given.images
    whole, full = bench.measure("autoattack-float32", "autoattack", "float32", count)
    usual, default = bench.measure("autoattack-auto", "autoattack", "auto", count)
    with patch.object(work, "worth_reducing", lambda *_: True):
        forced, reduced = bench.measure("autoattack-queries-bf16", "autoattack", "auto", count)
    environment = usual.results["environment"]
    return {
        "images": count,
        "float32": full,
        "auto": default,
        "queries_in_bf16": reduced,
        "other_verdicts": [int(i) for i in np.flatnonzero(_robust(usual) != _robust(whole))],
        "other_verdicts_in_bf16": [int(i) for i in np.flatnonzero(_robust(forced) != _robust(whole))],
        "seconds_per_image": environment["seconds_per_image"],
    }


def cycles(bench: Bench) -> Row:
    """PGD that stops at cycles beside PGD that does not."""
    count, rows = bench.given.pgd_images, {}
    for label, attack in (("pgd-40", "pgd-40"), ("pgd-100 of 2/255", PGD_LONG)):
        key = label.replace(" ", "-").replace("/", "-")
        with patch.object(PGD, "stops_at_cycles", new=False):
            whole, full = bench.measure(f"{key}-full", attack, "float32", count)
        stopped, fast = bench.measure(f"{key}-stops", attack, "float32", count)
        rows[label] = {
            "full": full,
            "stops": fast,
            "other_verdicts": [int(i) for i in np.flatnonzero(_robust(whole) != _robust(stopped))],
            "passes_saved": 1 - fast["forward_passes"] / full["forward_passes"],
        }
    return {"images": count, "attacks": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar10", default="uoft-cs/cifar10")
    parser.add_argument("--tiny-imagenet", default="zh-plus/tiny-imagenet")
    parser.add_argument("--work", type=Path, required=True, help="runs and evaluations, to go on from")
    parser.add_argument("--models", default=",".join(MODELS), help="of these")
    parser.add_argument("--checks", default=",".join(CHECKS), help="of these")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--pgd-images", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    keep_freed_blocks()
    torch.set_num_threads(given.threads)
    known: dict[str, Callable[[Bench], Row]] = {check.__name__: check for check in (targets, quick, precision, cycles)}
    results: Row = json.loads(given.output.read_text(encoding="utf-8")) if given.output.is_file() else {}
    results["seed"] = given.seed
    here = describe_environment(torch.device("cpu"))
    for name in given.models.split(","):
        counts = {check: given.pgd_images if check == "cycles" else given.images for check in given.checks.split(",")}
        left = [c for c, count in counts.items() if results.get(c, {}).get(name, {}).get("images") != count]
        bench = Bench(name, given) if left else None
        for check in left:
            assert bench is not None
            row = {**known[check](bench), "environment": here}
            results.setdefault(check, {})[name] = row
            write_json(given.output, results)
            print(name, check, json.dumps({k: v for k, v in row.items() if not isinstance(v, dict)}), flush=True)


if __name__ == "__main__":
    main()
