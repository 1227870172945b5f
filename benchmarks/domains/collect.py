"""What benchmarks/domains/run.sh has finished: each seed in a small file of its own, and all of them in one answer.

    python benchmarks/domains/collect.py keep RUN FILE      # accuracies, cost and verdicts of a measured run
    python benchmarks/domains/collect.py tell KEPT JSON     # KEPT/VARIANT/seed=N.json, all of them, told together

Accuracies are means over seeds with Student's 95 % interval over seeds (none of one seed). A difference has two
intervals: over seeds, paired by seed, and over test images. README.md beside it says what the hypotheses are and when
they hold.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from dualhead.evaluation import Evaluation, interval_over_samples
from dualhead.statistics import student
from dualhead.system.files import write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kept import over_seeds, packed, runs_in, unpacked

CLEAN_ROUTE, ROBUST_ROUTE = "head1", "head2"
CROSSED = {"clean": "statistics-head2_affine-head1", "robust": "statistics-head1_affine-head2"}
"""The clean and the robust affine map, each with the other's statistics."""
MARGIN = 0.015
"""Robust accuracies that differ by no more count as equal in H1'."""


def averaged(found: Sequence[Any]) -> Any:
    """Mean over seeds of numbers that lie at the same place in nested mappings; words are those of the first seed."""
    first = found[0]
    if isinstance(first, Mapping):
        return {key: averaged([each[key] for each in found]) for key in first}
    return float(np.mean(found)) if isinstance(first, int | float) and not isinstance(first, bool) else first


def accuracies(found: Sequence[Mapping[str, Any]], images: int) -> dict[str, Any]:
    """Accuracies of one classifier over seeds, from what `evaluate` tells of each on so many images."""
    names = list(found[0]["robust_accuracy"])
    checks = {check["name"] for each in found for check in each.get("checks", [])}
    return {
        "clean": over_seeds([each["clean_accuracy"] for each in found], images),
        **{name: over_seeds([each["robust_accuracy"][name] for each in found], images) for name in names},
        **({"checks": sorted(checks)} if checks else {}),
    }


def record(run: Path) -> dict[str, Any]:
    """All that is told of a measured run: nothing else of it has to be kept."""
    measured = run / "evaluations" / "domains"
    config = json.loads((run / "model" / "config.json").read_text())
    row = json.loads((run / "comparison.json").read_text())["rows"][-1]
    routes = json.loads((measured / "routes.json").read_text()) if (measured / "routes.json").is_file() else None
    folders = {"all": measured} if routes is None else {each.name: each for each in sorted(measured.iterdir())}
    found = {name: Evaluation.load(each) for name, each in folders.items() if (each / "results.json").is_file()}
    corrupted = json.loads((run / "evaluations" / "corruptions" / "results.json").read_text())["corruptions"]
    told: dict[str, Any] = {
        "environment": json.loads((run / "environment.json").read_text()),
        "epochs": [stage["epochs"] for stage in yaml.safe_load((run / "config.yaml").read_text())["stages"]],
        "images": next(iter(found.values())).num_samples,
        "cost": row["training_cost"],
        "parameters": row["parameters"],
        "added_parameters": config.get("added_parameters", 0),
        "corruptions": {
            "mean": corrupted["accuracy"], **{kind: of["accuracy"] for kind, of in corrupted["kinds"].items()}
        },
        "correct": {
            name: {what: packed(right) for what, right in each.correct.items()} for name, each in found.items()
        },
    }  # fmt: skip
    if routes is None:
        return {**told, "routes": {"all": accuracies_of(found["all"])}}
    told |= {key: routes[key] for key in ("routes", "merged", "curve") if key in routes}
    if "transfer" in routes:
        told["transfer"] = routes["transfer"]["accuracy"]
    if "gaps" in routes:
        stored, images = routes["gaps"]["stored"], routes["gaps"]["images"]
        told["gaps"] = {"stored": stored["summary"], "images": {head: of["summary"] for head, of in images.items()}}
    return told


def accuracies_of(evaluation: Evaluation) -> dict[str, Any]:
    """Return what `routes.json` says of each route, for a network that has one."""
    told = {key: evaluation.results[key] for key in ("clean_accuracy", "robust_accuracy")}
    return {**told, "checks": evaluation.checks}


class Variant:
    """A variant's finished seeds.

    Args:
        name: of its folder.
        runs: what was kept, by seed.
    """

    def __init__(self, name: str, runs: Mapping[int, Mapping[str, Any]]) -> None:
        self.name, self.runs = name, runs
        settings = {
            (tuple(run["epochs"]), run["environment"]["precision"], run["images"]) for run in self.runs.values()
        }
        if len(settings) > 1:
            told = "; ".join(f"epochs {list(e)}, {p}, {n} images" for e, p, n in sorted(settings))
            sys.exit(f"{name}: its seeds are of several settings ({told}); remove those that are not wanted")

    def right(self, classifier: str, what: str) -> dict[int, NDArray[np.bool_]]:
        """Which test images a classifier has right, by seed."""
        return {
            seed: unpacked(run["correct"][classifier][what], run["images"])
            for seed, run in self.runs.items()
            if classifier in run["correct"]
        }

    def describe(self) -> dict[str, Any]:
        """Everything that is told of the variant."""
        found = list(self.runs.values())
        images = found[0]["images"]
        made: dict[str, Any] = {
            "seeds": list(self.runs),
            "cost": averaged([each["cost"] for each in found]),
            "parameters": found[0]["parameters"],
            "added_parameters": found[0]["added_parameters"],
            "corruptions": {
                kind: over_seeds([e["corruptions"][kind] for e in found], images) for kind in found[0]["corruptions"]
            },
        }
        for key in ("routes", "merged"):
            if all(key in each for each in found):
                made[key] = {name: accuracies([each[key][name] for each in found], images) for name in found[0][key]}
        if all("curve" in each for each in found):
            points = range(len(found[0]["curve"]))
            made["curve"] = [
                {"t": found[0]["curve"][n]["t"], **accuracies([each["curve"][n] for each in found], images)}
                for n in points
            ]
        if all("transfer" in each for each in found):
            made["transfer"] = {
                against: {
                    judge: over_seeds([each["transfer"][against][judge]["accuracy"] for each in found], images)
                    for judge in row
                }
                for against, row in found[0]["transfer"].items()
            }
        if all("gaps" in each for each in found):
            made["gaps"] = averaged([each["gaps"] for each in found])
        return made


def difference(first: tuple[Variant, str], second: tuple[Variant, str], what: str) -> dict[str, Any] | None:
    """Second minus first, in clean accuracy or under all attacks, over the seeds that both have; None without any."""
    found = between(first[0].right(first[1], what), second[0].right(second[1], what))
    names = {"first": f"{first[0].name}: {first[1]}", "second": f"{second[0].name}: {second[1]}", "what": what}
    return None if found is None else {**names, **found}


def between(one: Mapping[int, NDArray[Any]], other: Mapping[int, NDArray[Any]]) -> dict[str, Any] | None:
    """Return the second's accuracy less the first's, from what is right of each image by seed; None without a pair."""
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        return None
    first, second = ([of[seed] for seed in seeds] for of in (one, other))
    gains = [float(b.mean() - a.mean()) for a, b in zip(first, second, strict=True)]
    ends = student(gains, floor=1.0 / len(first[0]))
    return {
        "difference": float(np.mean(gains)), "seeds": gains, "seeds_interval": ends,
        "images_interval": list(interval_over_samples(first, second)),
    }  # fmt: skip


def verdict(found: Mapping[str, Any] | None) -> str:
    """`gain`, `loss`, or `undecided` where either interval holds 0 or there is one seed."""
    if found is None or found["seeds_interval"] is None:
        return "undecided"
    both = (found["seeds_interval"], found["images_interval"])
    if all(low > 0 for low, _ in both):
        return "gain"
    return "loss" if all(high < 0 for _, high in both) else "undecided"


def answer(wanted: Sequence[tuple[Mapping[str, Any] | None, str]]) -> str:
    """`holds` if all verdicts are as wanted, `does not hold` if one is the opposite, else `undecided`.

    A wanted `no gain` holds where the intervals lie below the margin, and is contradicted by a gain.
    """
    opposite = {"gain": "loss", "loss": "gain", "no gain": "gain", "no loss": "loss"}
    states = []
    for found, want in wanted:
        said = verdict(found)
        if said == opposite[want]:
            return "does not hold"
        low, high = (found and found["seeds_interval"]) or (-math.inf, math.inf)
        met = {"no gain": said == "loss" or high < MARGIN, "no loss": said == "gain" or low > -MARGIN}
        states.append(met.get(want, said == want))
    return "holds" if states and all(states) else "undecided"


def equal(found: Sequence[Mapping[str, Any] | None]) -> str:
    """`holds` if all intervals lie within the margin, `does not hold` if one lies outside, else `undecided`."""
    ends = [(each and each["seeds_interval"]) or (-math.inf, math.inf) for each in found]
    if any(low > MARGIN or high < -MARGIN for low, high in ends):
        return "does not hold"
    return "holds" if all(low > -MARGIN and high < MARGIN for low, high in ends) else "undecided"


def hypotheses(known: Mapping[str, Variant]) -> dict[str, Any]:
    """The comparisons that the hypotheses are about, and what they say."""

    def of(first: tuple[str, str], second: tuple[str, str], what: str) -> dict[str, Any] | None:
        if first[0] not in known or second[0] not in known:
            return None
        return difference((known[first[0]], first[1]), (known[second[0]], second[1]), what)

    single = ("single-separate", "all")
    gains = {name: of(single, (name, ROBUST_ROUTE), "worst") for name in ("dual", "dual-affine", "dual-statistics")}
    own, other = {"clean": CLEAN_ROUTE, "robust": ROBUST_ROUTE}, CROSSED
    by_affine = [
        of(("dual", own["clean"]), ("dual", other["robust"]), "worst"),  # both with the clean statistics
        of(("dual", other["clean"]), ("dual", own["robust"]), "worst"),  # both with the robust ones
    ]
    exchanged = [  # the clean map is hardly robust, and one that answers alike to all images would be more so
        of(("dual", own[k]), ("dual", other[k]), what)
        for k, what in (("clean", "clean"), ("robust", "clean"), ("robust", "worst"))
    ]
    joint = of(("single-joint", "all"), ("dual-affine", ROBUST_ROUTE), "worst")
    group = [
        of(("group-single", "all"), ("group-dual", CLEAN_ROUTE), "clean"),
        of(("group-single", "all"), ("group-dual", ROBUST_ROUTE), "worst"),
    ]
    return {
        "H1": {"answer": answer([(gains["dual"], "gain"), (gains["dual-affine"], "gain"), (joint, "gain"),
                                 (gains["dual-statistics"], "no gain")]), "differences": [*gains.values(), joint]},
        "H1'": {"answer": equal(list(gains.values())), "differences": list(gains.values())},
        "H2": {"answer": answer([*((d, "gain") for d in by_affine), *((d, "loss") for d in exchanged)]),
               "differences": [*by_affine, *exchanged]},
        "H3": {"answer": answer([(group[0], "gain"), (group[1], "no loss")]), "differences": group},
        "H4": merged_or_between(known),
    }  # fmt: skip


def mixture(variant: Variant, first: str, second: str, share: float, what: str) -> dict[int, NDArray[np.float64]]:
    """Return how often each image is right if the first classifier answers with a probability of `share`, by seed."""
    one, other = variant.right(first, what), variant.right(second, what)
    return {seed: share * one[seed] + (1 - share) * other[seed] for seed in one.keys() & other.keys()}


def merged_or_between(known: Mapping[str, Variant]) -> dict[str, Any]:
    """H4: each merging against the most robust mixture of two points of the curve that is as accurate as it is.

    A mixture draws one of the two for each answer, so that it costs one pass; one point alone is a mixture too.
    """
    if "dual" not in known or not known["dual"].runs:
        return {"answer": "undecided", "differences": []}
    dual = known["dual"]
    told = dual.describe()
    points = {f"t={point['t']:g}": point for point in told.get("curve", [])}
    points |= {head: told["routes"][head] for head in (CLEAN_ROUTE, ROBUST_ROUTE)}
    clean, robust = ({name: point[what]["mean"] for name, point in points.items()} for what in ("clean", "worst"))
    found = []
    for name, merged in told.get("merged", {}).items():
        wanted = merged["clean"]["mean"]
        pairs = [(a, b) for a in points for b in points if clean[a] >= wanted > clean[b]]
        shares = {(a, b): (wanted - clean[b]) / (clean[a] - clean[b]) for a, b in pairs}
        shares |= {(a, a): 1.0 for a in points if clean[a] >= wanted}
        if not shares:
            continue
        a, b = max(shares, key=lambda pair: shares[pair] * robust[pair[0]] + (1 - shares[pair]) * robust[pair[1]])
        difference_of = between(mixture(dual, a, b, shares[a, b], "worst"), dual.right(name, "worst"))
        if difference_of is not None:
            mixed = f"dual: {a}" if a == b else f"dual: {shares[a, b]:.2f} {a}, else {b}"
            found.append({"first": mixed, "second": f"dual: {name}", "what": "worst", **difference_of})
    verdicts = [verdict(each) for each in found]
    answered = (
        "holds" if "gain" in verdicts else "does not hold" if verdicts and set(verdicts) == {"loss"} else "undecided"
    )
    return {"answer": answered, "differences": found}


def main() -> None:
    """Keep a run, or read what is kept, compare, write."""
    if len(sys.argv) != 4 or sys.argv[1] not in ("keep", "tell"):
        sys.exit(__doc__)
    source, target = Path(sys.argv[2]), Path(sys.argv[3])
    if sys.argv[1] == "keep":
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, record(source))
        return
    known = {name: Variant(name, runs) for name, runs in runs_in(source).items()}
    made = {"variants": {name: v.describe() for name, v in known.items()}, "hypotheses": hypotheses(known)}
    target.write_text(json.dumps(made, indent=1) + "\n")
    for name, told in made["hypotheses"].items():
        print(f"{name}: {told['answer']}")


if __name__ == "__main__":
    main()
