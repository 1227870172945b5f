"""What benchmarks/continual/run.sh has finished: each seed in a small file of its own, and all of them in one answer.

    python benchmarks/continual/collect.py keep RUN FILE STATIC [FIRST]
    python benchmarks/continual/collect.py tell KEPT JSON   # KEPT/ORDER/METHOD/seed=N.json and KEPT/bounds/...

Kept is what a finished run reached and cost. STATIC is an evaluation of another network with its attacked images, FIRST
the run of the first stage, whose cost belongs to this one. Numbers are means over seeds with Student's 95 % interval
over seeds, none of one seed. README.md beside it is the protocol; its questions are answered once every method has
its three seeds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dualhead
from dualhead.evaluation import Evaluation, plasticity
from dualhead.system.files import write_json
from dualhead.system.flops import CountFlops

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kept import difference, holm, over_seeds, packed, runs_in

KNOWN = ("union", "average_seen", "forgetting", "backward_transfer", "clean_drop")
"""Measures of the last stage."""
SPECIALISTS = {"Linf": "specialist-linf", "L2": "specialist-l2", "L1": "specialist-l1"}
ORDERS = ("forward", "reverse")
METHODS = (
    "finetune", "lwf", "alr", "ewc", "air", "interpolate-lost", "routed-lost",
    "seen", "replay", "derpp", "agem", "ramp", "interpolate-kept", "routed-kept",
)  # fmt: skip
LEVEL = 0.05
Runs = Mapping[int, Mapping[str, Any]]
"""Records by seed."""
Kept = Mapping[str, Mapping[str, Runs]]
"""Records by place, which is an order or `bounds`, by method and seed."""


def deployed(run: Path) -> dict[str, Any]:
    """Row of `comparison.json` of what a run deploys."""
    found: dict[str, Any] = json.loads((run / "comparison.json").read_text(encoding="utf-8"))["rows"][-1]
    return found


def on_static(run: Path, static: Path) -> dict[str, Any]:
    """Judge images that were made once, against another network: the field's static protocol.

    Args:
        run: whose deployed model judges.
        static: an evaluation of the other network under several threats, with one attack and its images. An image
            that fooled nobody is left clean.

    Returns:
        Share of images that are right, by threat and, as `union`, under all of them; and by threat the share of images
        that `fooled` the network that they were made against.
    """
    clean = Evaluation.load(run / "evaluation")
    order = np.argsort(clean.index)
    right = {"clean": clean.correct["clean"][order]}
    fooled, model = {}, dualhead.load(run).eval()
    for folder in sorted((static / "threats").iterdir()):
        made = Evaluation.load(folder)
        (verdict,) = made.verdicts.values()
        assert verdict.adversarial is not None and verdict.adversarial_rows is not None, f"{folder} kept no images"
        if not np.array_equal(made.index, clean.index[order]):
            sys.exit(f"{folder} is not of the images of {run}")
        rows = verdict.adversarial_rows
        with torch.no_grad():
            answers = [model(part) for part in torch.split(torch.from_numpy(verdict.adversarial), 64)]
        found = torch.cat([getattr(each, "logits", each) for each in answers]).argmax(1).numpy() == made.labels[rows]
        right[folder.name] = right["clean"].copy()
        right[folder.name][rows] &= found
        fooled[folder.name] = len(rows) / len(made.labels)
    together = np.logical_and.reduce(list(right.values()))
    shares = {name: float(column.mean()) for name, column in {**right, "union": together}.items() if name != "clean"}
    return {**shares, "fooled": fooled}


def answer_cost(run: Path, row: Mapping[str, Any]) -> float:
    """Return what one answer of the deployed model costs, in forward passes through the base network.

    Args:
        run: its folder.
        row: that of `comparison.json`, which knows the operations of such a pass.
    """
    model = dualhead.load(run).eval()
    counter = CountFlops()
    with counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    cost = row["training_cost"]
    return round(counter.total * float(cost["forward_equivalents"]) / float(cost["flops"]), 3)


def record(run: Path, static: Path, first: Path | None = None) -> dict[str, Any]:
    """All that is told of a finished run: nothing else of it has to be kept.

    Args:
        run: a sequence, or a network that knew its threats from the start.
        static: see `on_static`.
        first: the run that a sequence goes on from; None: it has its first stage itself.
    """
    evaluation, row = Evaluation.load(run / "evaluation"), deployed(run)
    order = np.argsort(evaluation.index)
    cost = row["training_cost"]["forward_equivalents"]
    before = deployed(first)["training_cost"]["forward_equivalents"] if first is not None else 0.0
    told: dict[str, Any] = {
        "environment": json.loads((run / "environment.json").read_text(encoding="utf-8")),
        "images": evaluation.num_samples,
        "clean": evaluation.clean_accuracy,
        "threats": {name: each["robust_accuracy"] for name, each in evaluation.results["threats"].items()},
        "union": evaluation.results["robust_accuracy"]["worst"],
        "passes": cost + before,
        "parameters": row["parameters"],
        "answer": answer_cost(run, row),
        "transfer": on_static(run, static),
        "correct": {what: packed(right[order]) for what, right in evaluation.correct.items()},
    }
    if "sequence" in evaluation.results:
        told["sequence"] = evaluation.results["sequence"]
    routers = run / "evaluations" / "routers" / "routers.json"
    if routers.is_file():
        told["routers"] = json.loads(routers.read_text(encoding="utf-8"))
    return told


def made_for(specialists: Mapping[str, Runs]) -> dict[str, float]:
    """Return for each threat the robust accuracy of the network that was made for it, as the mean over seeds.

    Args:
        specialists: records of those networks by name and seed; while one has none, nothing is returned.
    """
    if not all(specialists.get(name) for name in SPECIALISTS.values()):
        return {}
    found = {threat: specialists[name].values() for threat, name in SPECIALISTS.items()}
    return {threat: float(np.mean([run["threats"][threat] for run in runs])) for threat, runs in found.items()}


def shares(runs: Runs, specialists: Mapping[str, float]) -> dict[str, Any]:
    """Return mean and least of what a method reaches under each threat as a share of its specialist, over seeds."""
    found = [[run["threats"][threat] / value for threat, value in specialists.items()] for run in runs.values()]
    return {
        "mean_share": over_seeds([float(np.mean(each)) for each in found]),
        "least_share": over_seeds([min(each) for each in found]),
    }


def of_sequence(runs: Runs, specialists: Mapping[str, float]) -> dict[str, Any]:
    """Describe a method in one order.

    Args:
        runs: records by seed.
        specialists: robust accuracy of the network that was made for a threat; empty while there are none.
    """
    told = [each["sequence"] for each in runs.values()]
    rows = [each["rows"][-1] for each in told]
    threats, images = told[0]["threats"], next(iter(runs.values()))["images"]
    made = {
        "seeds": list(runs),
        "old_attacks": told[0]["old_attacks"],
        "clean": over_seeds([row["clean_accuracy"] for row in rows], images),
        **{name: over_seeds([row["robust_accuracy"][name] for row in rows], images) for name in threats},
        **{key: over_seeds([row[key] for row in rows], images) for key in KNOWN},
        "passes": over_seeds([each["passes"] for each in runs.values()]),
        "parameters": next(iter(runs.values()))["parameters"],
        "answer": next(iter(runs.values()))["answer"],
        "transfer": transferred(list(runs.values())),
        "matrix": [
            {"stage": row["stage"], "clean": row["clean_accuracy"], **row["robust_accuracy"], "union": row["union"]}
            for row in told[0]["rows"]
        ],
        "matrix_seed": next(iter(runs)),
    }
    if "routers" in next(iter(runs.values())):
        made["routers"] = of_routers([each["routers"] for each in runs.values()])
    if specialists:
        found = [plasticity(each, specialists) for each in told]
        made["plasticity"] = over_seeds([value for value in found if value is not None], images)
        made |= shares(runs, specialists)
    return made


def transferred(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return over seeds the shares of images that are right of those made against another network."""
    return {
        name: over_seeds([each["transfer"][name] for each in found], found[0]["images"])
        for name in found[0]["transfer"]
        if name != "fooled"
    }


def of_routers(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Describe what the sentinel reaches beside its controls, each attacked by itself: unions over seeds."""
    names = ("deployed", "uniform", "best_fixed", "oracle")
    unions = {name: [each[name]["union"] for each in found] for name in names}
    gains = {
        f"over_{name}": [a - b for a, b in zip(unions["deployed"], unions[name], strict=True)]
        for name in ("uniform", "best_fixed")
    }
    images = found[0]["num_samples"]
    return {**{name: over_seeds(each, images) for name, each in {**unions, **gains}.items()}, "images": images}


def of_bound(runs: Runs, specialists: Mapping[str, float]) -> dict[str, Any]:
    """Describe a network that knew its threats from the start."""
    found = list(runs.values())
    images = found[0]["images"]
    return {
        "seeds": list(runs),
        "clean": over_seeds([each["clean"] for each in found], images),
        **{name: over_seeds([each["threats"][name] for each in found], images) for name in found[0]["threats"]},
        "union": over_seeds([each["union"] for each in found], images),
        "passes": over_seeds([each["passes"] for each in found]),
        "parameters": found[0]["parameters"],
        "answer": found[0]["answer"],
        "transfer": transferred(found),
        **(shares(runs, specialists) if specialists else {}),
    }


def tested(of: Mapping[str, Mapping[int, float]], images: int) -> dict[str, Any]:
    """Return what is known of differences from 0, with p-values corrected for as many as there are.

    Args:
        of: paired differences by method and seed.
        images: how many they were measured on.
    """
    found = {name: {**difference(list(each.values()), images), "seeds": dict(each)} for name, each in of.items()}
    corrected = holm({name: each["p_value"] for name, each in found.items()})
    for name, each in found.items():
        decided = corrected[name] < LEVEL
        each |= {
            "corrected_p_value": corrected[name],
            "answer": ("loss", "gain")[each["mean"] > 0] if decided else "undecided",
        }
    return found


Differences = dict[str, dict[int, float]]
"""Of a method from what it is set beside, by name and seed; more is what one would wish for."""


def differences(runs: Mapping[str, Runs], joint: Runs, specialists: Mapping[str, float]) -> dict[str, Differences]:
    """Return what the questions of README.md ask about, in one order of the threats.

    Args:
        runs: records of all methods.
        joint: of the network that knew all threats.
        specialists: robust accuracy of the network that was made for a threat.
    """

    def forgetting(run: Mapping[str, Any]) -> float:
        return -float(run["sequence"]["rows"][-1]["forgetting"])

    def learning(run: Mapping[str, Any]) -> float:
        found = plasticity(run["sequence"], specialists)
        assert found is not None
        return found

    def union(run: Mapping[str, Any]) -> float:
        return float(run["union"])

    def less(name: str, other: Runs, what: Callable[[Mapping[str, Any]], float]) -> dict[int, float]:
        return {seed: what(run) - what(other[seed]) for seed, run in runs[name].items() if seed in other}

    lost = [name for name in runs if old(runs[name]) == "lost" and name != "finetune"]
    seen = [name for name in runs if old(runs[name]) == "kept" and name != "seen"]
    routed = {
        name: {seed: run["routers"] for seed, run in runs[name].items()} for name in runs if has_routers(runs[name])
    }
    return {
        "forgets_less_than_finetune": {name: less(name, runs["finetune"], forgetting) for name in lost},
        "learns_more_than_finetune": {name: less(name, runs["finetune"], learning) for name in lost},
        "union_beyond_seen": {name: less(name, runs["seen"], union) for name in seen},
        "union_beyond_joint": {name: less(name, joint, union) for name in runs},
        **{
            f"routing_beyond_{control}": {
                name: {seed: each["deployed"]["union"] - each[control]["union"] for seed, each in found.items()}
                for name, found in routed.items()
            }
            for control in ("best_fixed", "uniform")
        },
    }


def questions(kept: Kept, specialists: Mapping[str, float]) -> dict[str, Any]:
    """Answer the questions of README.md, for each order and for `both`, where a seed counts by the mean of its orders.

    Args:
        kept: records of all methods.
        specialists: robust accuracy of the network that was made for a threat.
    """
    of = {order: differences(kept[order], kept["bounds"]["joint"], specialists) for order in ORDERS}
    first, second = of.values()
    of["both"] = {
        question: {
            name: {
                seed: (value + second[question][name][seed]) / 2
                for seed, value in by_seed.items()
                if seed in second[question][name]
            }
            for name, by_seed in methods.items()
        }
        for question, methods in first.items()
    }
    images = next(iter(kept["bounds"]["joint"].values()))["images"]
    runs = [run for each in kept["forward"].values() for run in each.values()]
    fewer = next((run["routers"]["num_samples"] for run in runs if "routers" in run), images)
    made: dict[str, Any] = {
        order: {
            question: tested(methods, fewer if question.startswith("routing") else images)
            for question, methods in asked.items()
        }
        for order, asked in of.items()
    }
    made["forward_beyond_reverse"] = tested(
        {
            name: {
                seed: run["union"] - kept["reverse"][name][seed]["union"]
                for seed, run in runs.items()
                if seed in kept["reverse"][name]
            }
            for name, runs in kept["forward"].items()
        },
        images,
    )
    return made


def old(runs: Runs) -> str:
    """Return whether old attacks were `kept` or `lost`."""
    return str(next(iter(runs.values()))["sequence"]["old_attacks"])


def has_routers(runs: Runs) -> bool:
    """Tell whether a method has routers that were measured."""
    return "routers" in next(iter(runs.values()))


def tell(kept: Path, wanted: int = 3) -> dict[str, Any]:
    """Return everything that is kept, put together.

    Args:
        kept: its folder.
        wanted: seeds of every method; as long as one has fewer the answer is `under_way`, and no question is answered.
    """
    known: Kept = {place: runs_in(kept / place) for place in ("bounds", *ORDERS)}
    specialists = made_for(known["bounds"])
    counts = [len(known[order].get(name, {})) for order in ORDERS for name in METHODS]
    counts += [len(known["bounds"].get(name, {})) for name in ("joint", *SPECIALISTS.values())]
    whole = min(counts) >= wanted
    return {
        "under_way": not whole,
        "bounds": {name: of_bound(runs, specialists) for name, runs in known["bounds"].items()},
        **{order: {name: of_sequence(runs, specialists) for name, runs in known[order].items()} for order in ORDERS},
        "questions": questions(known, specialists) if whole else None,
    }


def main() -> None:
    """Keep a run, or tell what is kept."""
    match sys.argv[1:]:
        case ["keep", run, file, static, *first] if len(first) < 2:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            write_json(Path(file), record(Path(run), Path(static), *map(Path, first)))
        case ["tell", kept, target]:
            Path(target).write_text(json.dumps(tell(Path(kept)), indent=1) + "\n", encoding="utf-8")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
