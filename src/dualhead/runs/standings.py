"""Runs side by side at what they cost: accuracies over seeds, the Pareto front, and paired tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualhead.attacks import attacks as registry
from dualhead.errors import UserError
from dualhead.evaluation import (
    MEASURES,
    Evaluation,
    Paired,
    against_specialists,
    balanced,
    interval_over_samples,
    mcnemar,
    mean_std,
    of_specialists,
    paired_shares,
    plasticity,
    refuse_unlike,
    rendered_alike,
    successes,
    wilson,
)
from dualhead.report import MEANS, believable, cost_unit, lights, measured_in, measured_title, other_images
from dualhead.runs.entries import Entry, grouped, labels_of, titled
from dualhead.statistics import paired_t, student, student_reach

TRIGGER_MEASURES = ("trigger withstood", "right on triggered", "robust on triggered")
SAME_COST = 1.05
"""Costs that differ by less than this factor count as equal."""


def standings(entries: Sequence[Entry]) -> dict[str, Any]:
    """Result of `dualhead compare`.

    Returns:
        `rows`: for each output of each group of runs the means over seeds, 95 % intervals (Wilson's for one run,
        Student's over seeds for several), cost in forward passes of one image through the first run's base model, the
        failed and warning `checks` of its runs, and whether it is on the Pareto front: nothing at most as costly has
        more of the one accuracy and no less of the other. A row with a failed check is not ranked. `worst` is over the
        attacks that all of them faced and those that only merged heads can face, such as `multihead`, where it was
        run. `pairs`: for clean accuracy, each common attack, `worst` and corruptions, each group's result against the
        first group's: a paired t-test over the seeds that both have; for one seed McNemar's exact test, or of the mean
        share of corrupted images a paired z-test over images; `believable` unless a check of either has failed. Over
        several seeds `interval` is of other seeds on these images, and `images_interval` of these runs on other
        images. `notes`: what was left out, a sentence each.

    Raises:
        UserError: if the entries were not measured alike.
    """
    groups = grouped(entries)
    labels = labels_of(groups)
    _refuse_unlike(labels, groups)
    attacks, notes = _common_attacks(entries)
    unit = cost_unit((entry.flops, entry.forward_equivalents) for entry in entries)
    rows = [_row(label, members, attacks, unit) for label, members in zip(labels, groups, strict=True)]
    ranked = [row for row in rows if believable(row["checks"])]
    for row in rows:
        row["pareto"] = row in ranked and not any(_dominates(other, row) for other in ranked)
    results = [(label, m) for label, m in zip(labels, groups, strict=True) if m[0].deployed]
    pairs = []
    for label, members in results[1:]:
        found = _pairs(results[0][1], members, attacks)
        sound = all(believable(member.evaluation.checks) for member in (*results[0][1], *members))
        pairs += [{"reference": results[0][0], "name": label, "believable": sound, **pair} for pair in found]
        if not found:
            notes.append(f"{label} and {results[0][0]} have no seed in common, and are not compared in pairs")
        if told := _other_triggers(results[0][1], members):
            notes.append(f"{label} and {results[0][0]}: {told}, and are not compared in pairs")
    notes += [f"{label}: {told}" for label, members in results if (told := _unpaired(members))]
    notes += _of_other_images([(row["name"], members) for row, members in zip(rows, groups, strict=True)])
    return {"rows": rows, "pairs": pairs, "notes": notes}


def _refuse_unlike(labels: Sequence[str], groups: Sequence[Sequence[Entry]]) -> None:
    """Refuse entries that were not measured on the same samples under the same threat model, by their names."""
    named = [
        (f"{titled(label, members)}, seed {member.seed}" if len(members) > 1 else titled(label, members), member)
        for label, members in zip(labels, groups, strict=True)
        for member in members
    ]
    first_name, first = named[0]
    for name, other in named[1:]:
        refuse_unlike(first.evaluation, other.evaluation, first_name, name)


def normalised(entries: Sequence[Entry], specialists: Sequence[Entry]) -> list[dict[str, Any]]:
    """The accuracies of each output as shares of specialists'.

    Args:
        entries: outputs of runs.
        specialists: results of runs that were each made for one of the threats.

    Raises:
        UserError: if they were not measured alike, under several threats.
    """
    made_for_one = _deployed(specialists)
    return [
        {
            "label": entry.label,
            "name": entry.name,
            "seed": entry.seed,
            "shares": against_specialists(entry.evaluation, made_for_one),
        }
        for entry in entries
    ]


def _deployed(entries: Sequence[Entry]) -> list[Evaluation]:
    return [entry.evaluation for entry in entries if entry.deployed]


def sequences(entries: Sequence[Entry], specialists: Sequence[Entry]) -> list[dict[str, Any]]:
    """Say what is left at the end of runs in which threats arrived one after another.

    Args:
        entries: outputs of runs.
        specialists: results of runs that were each made for one of the threats; none: what the runs know of some.

    Returns:
        For each group with a `sequence`, its `name`, `seeds`, `old_attacks`, `order` of the threats, and as means over
        seeds the measures of the last stage, `spread` (half of Student's 95 % interval over seeds, None of one seed;
        seeds that agree more closely than one image do so by chance), and the cost in forward passes. `order` is that
        in which the threats were learnt first.

    Raises:
        UserError: if specialists were not measured by the same attacks under the same threats.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.deployed and entry.evaluation.results.get("sequence"):
            groups.setdefault(entry.group, []).append(entry)
    labels = labels_of(list(groups.values()))
    return [_ends(label, members, specialists) for label, members in zip(labels, groups.values(), strict=True)]


def _ends(label: str, members: Sequence[Entry], specialists: Sequence[Entry]) -> dict[str, Any]:
    told = [member.evaluation.results["sequence"] for member in members]
    threats = list(told[0]["threats"])
    rows = [dict(each["rows"][-1]) for each in told]
    if specialists:
        for member in members:
            against_specialists(member.evaluation, _deployed(specialists))  # refuses others
        reached = of_specialists(_deployed(specialists), threats)
        for row, each in zip(rows, told, strict=True):
            row["plasticity"] = plasticity(each, reached)
    flat = [
        {**{key: row[key] for key in ("clean_accuracy", "union", *MEASURES) if row.get(key) is not None},
         **{f"robust {name}": row["robust_accuracy"][name] for name in threats},
         "forward_equivalents": row["training_cost"]["forward_equivalents"]}
        for row in rows
    ]  # fmt: skip
    names = [key for key in flat[0] if all(key in one for one in flat)]
    values = {key: [float(one[key]) for one in flat] for key in names}
    stages = [row["stage"] for row in told[0]["rows"]]
    floors = {key: 0.0 if key == "forward_equivalents" else 1.0 / members[0].evaluation.num_samples for key in names}
    return {
        "name": label,
        "seeds": sorted(member.seed for member in members),
        "old_attacks": told[0]["old_attacks"],
        "order": sorted(told[0]["arrived"], key=lambda threat: stages.index(told[0]["arrived"][threat])),
        "threats": threats,
        "stages": stages,
        "means": {key: mean_std(of)[0] for key, of in values.items()},
        "spread": {key: student_reach(of, floor=floors[key]) for key, of in values.items()},
    }


def _for_heads(evaluation: Evaluation, attack: str) -> bool:
    """Tell whether an attack that was run can be run on merged heads alone; by its name where results do not say."""
    recorded = evaluation.results.get("attacks", {}).get(attack, {}).get("needs_heads")
    if recorded is not None:
        return bool(recorded)
    attack = attack.partition("@")[0]
    return any(
        registry.get(name).needs_heads and (attack == name or attack.startswith((f"{name}-", f"{name}(")))
        for name in registry.names()
    )


def _common_attacks(entries: Sequence[Entry]) -> tuple[list[str], list[str]]:
    """The attacks that all of them faced, and a sentence for each other one."""
    first = entries[0].evaluation
    common = [name for name in first.verdicts if all(name in entry.evaluation.verdicts for entry in entries)]
    measured = set.intersection(*(set(measured_in(entry.evaluation.results)) for entry in entries))
    if not common and not measured:
        raise UserError("no attack was run on all of them; `dualhead evaluate` each with the same --attack")
    faced = dict.fromkeys(name for entry in entries for name in entry.evaluation.verdicts if name not in common)
    notes = []
    for name in faced:
        tried = [entry.evaluation for entry in entries if name in entry.evaluation.verdicts]
        told = f"{name} was run on {len(tried)} of {len(entries)}"
        counts = "and counts in worst there; an attack that all can face, such as autoattack, compares them alike"
        notes.append(f"{told} {counts}" if _for_heads(tried[0], name) else f"{told} and is left out")
    return common, notes


def _correct(entry: Entry, common: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """Tell which samples are right by measure, in the order of their indices; see `standings` for `worst`."""
    order, faced = np.argsort(entry.evaluation.index), entry.evaluation.verdicts
    for_heads = [name for name in faced if name not in common and _for_heads(entry.evaluation, name)]
    names = ("clean", *common, *for_heads)
    correct = {name: entry.evaluation.correct[name][order] for name in names}
    return {**correct, "worst": np.logical_and.reduce([correct[name] for name in correct])} if names[1:] else correct


def _row(label: str, members: Sequence[Entry], attacks: Sequence[str], unit: float | None) -> dict[str, Any]:
    measured = [_correct(member, attacks) for member in members]
    of_all = [name for name in measured[0] if all(name in correct for correct in measured)]
    values = {name: [float(correct[name].mean()) for correct in measured] for name in of_all}
    means = {name: mean_std(shares)[0] for name, shares in values.items()}
    first = members[0]
    flops = [member.flops for member in members if member.flops is not None]
    seconds = [member.seconds for member in members if member.seconds is not None]
    total = float(np.mean(flops)) if flops else None
    return {
        "name": titled(label, members),
        "seeds": sorted(member.seed for member in members),
        "deployed": first.deployed,
        "checks": _checks(members),
        "clean_accuracy": means.pop("clean"),
        "robust_accuracy": means,
        **_balanced(members, measured, of_all),
        "intervals": {
            "clean_accuracy" if name == "clean" else name: _interval(shares, len(measured[0][name]))
            for name, shares in values.items()
        },
        **_changed(members),
        **_transfer(members),
        **_poison(members),
        "parameters": first.parameters,
        "training_cost": {
            "flops": total,
            "forward_equivalents": round(total / unit, 1) if total is not None and unit else None,
            "seconds": round(float(np.mean(seconds)), 1) if seconds else None,
        },
    }


def _balanced(
    members: Sequence[Entry], measured: Sequence[dict[str, NDArray[np.bool_]]], names: Sequence[str]
) -> dict[str, Any]:
    """Balanced accuracies, means over seeds, and the sizes of the smallest and the largest class."""
    orders = [np.argsort(member.evaluation.index) for member in members]
    found = [
        balanced({name: correct[name] for name in names}, member.evaluation.labels[order])
        for member, correct, order in zip(members, measured, orders, strict=True)
    ]
    means = {name: mean_std([each["balanced_accuracy"][name] for each in found])[0] for name in names}
    return {"balanced_accuracy": means, "class_sizes": found[0]["class_sizes"]}


def _checks(members: Sequence[Entry]) -> list[dict[str, str]]:
    """Return the checks that are not fine in some run, each once; of several seeds the message says which."""
    found: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for member in members:
        for check in member.evaluation.checks:
            found.setdefault((check["name"], check["status"]), []).append((member.seed, check["message"]))
    checks = []
    for (name, status), seen in found.items():
        seeds = ", ".join(str(seed) for seed, _ in seen)
        of_seeds = f"seed {seeds}: " if len(members) > 1 else ""
        checks.append({"name": name, "status": status, "message": of_seeds + seen[0][1]})
    return lights(checks)


def _transfer(members: Sequence[Entry]) -> dict[str, Any]:
    """Return what `results.json` says of transferred images, as the mean over seeds; empty if not for all."""
    told = [member.evaluation.results["transfer"] for member in members if "transfer" in member.evaluation.results]
    if len(told) < len(members) or len({_made_by(each) for each in told}) > 1:
        return {}
    if len(told) == 1:
        return {"transfer": told[0]}
    shares = [float(each["accuracy"]) for each in told]
    whole = {"accuracy": mean_std(shares)[0], "interval": _interval(shares, members[0].evaluation.num_samples)}
    return {"transfer": {"from": told[0]["from"], **whole, "note": told[0]["note"]}}


def _made_by(transfer: Mapping[str, Any]) -> str:
    """Tell which attacks made transferred images, and against which network."""
    return f"{', '.join(sorted(transfer.get('attacks', ())))} against {transfer['from']}"


def _of_other_images(groups: Sequence[tuple[str, Sequence[Entry]]]) -> list[str]:
    """Return a sentence on each measurement, or transfer, whose images are not the same for all, by their names."""
    seen: dict[str, dict[str, tuple[str, list[str]]]] = {}
    for label, members in groups:
        for results in (member.evaluation.results for member in members):
            told = {
                name: (str(_rendering(of)), f"{measured_title(of)}, {len(of['kinds'])} kinds")
                for name, of in measured_in(results).items()
            }
            if "transfer" in results:
                told["transfer"] = (_made_by(results["transfer"]),) * 2
            for name, (key, words) in told.items():
                seen.setdefault(name, {}).setdefault(key, (words, []))[1].append(label)
    return [
        f"{name}: not of the same images, and not to be compared: "
        + "; ".join(f"{', '.join(dict.fromkeys(labels))}: {words}" for words, labels in found.values())
        for name, found in seen.items()
        if len(found) > 1
    ]


def _rendering(told: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the facts of a measurement and its kinds: what must be equal for two to be of the same images."""
    return {key: value for key, value in told.items() if key not in MEANS}, list(told["kinds"])


def _changed(members: Sequence[Entry]) -> dict[str, Any]:
    """Return what `results.json` says of measurements that all had on the same images: means over seeds."""
    told = [measured_in(member.evaluation.results) for member in members]
    names = [
        name
        for name, first in told[0].items()
        if all(name in each and _rendering(each[name]) == _rendering(first) for each in told)
    ]
    if len(told) == 1:
        return {name: told[0][name] for name in names}
    count = members[0].evaluation.num_samples

    def over_seeds(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        shares = [float(entry["accuracy"]) for entry in entries]
        levels = [entry["severities"] for entry in entries if "severities" in entry]
        means = {"severities": np.mean(levels, 0).tolist()} if len(levels) == len(entries) else {}
        return {"accuracy": mean_std(shares)[0], "interval": _interval(shares, count), **means}

    found = {}
    for name in names:
        each = [one[name] for one in told]
        facts = {key: value for key, value in each[0].items() if key not in MEANS}
        kinds = {kind: over_seeds([one["kinds"][kind] for one in each]) for kind in each[0]["kinds"]}
        found[name] = {**facts, **over_seeds(each), "kinds": kinds}
    return found


def _poison(members: Sequence[Entry]) -> dict[str, Any]:
    """Return what `results.json` says of a poison, as the mean over seeds; empty where it was not measured for all."""
    told = [member.evaluation.results["poison"] for member in members if "poison" in member.evaluation.results]
    if len(told) < len(members):
        return {}
    found: dict[str, Any] = {"name": told[0]["name"]}
    if all("attack_success_rate" in each for each in told):
        rates = [float(each["attack_success_rate"]) for each in told]
        robust = {
            name: [float(each["robust_accuracy_on_triggered"][name]) for each in told]
            for name in told[0]["robust_accuracy_on_triggered"]
            if all(name in each["robust_accuracy_on_triggered"] for each in told)
        }
        count = told[0]["num_triggered"]
        found |= {
            "target": told[0]["target"],
            "num_triggered": count,
            "attack_success_rate": mean_std(rates)[0],
            "robust_accuracy_on_triggered": {name: mean_std(shares)[0] for name, shares in robust.items()},
            "intervals": {
                "attack_success_rate": _interval(rates, count),
                **{name: _interval(shares, count) for name, shares in robust.items()},
            },
        }
    if all("training" in each for each in told):
        keys, count = ("by_given_label", "by_true_label"), told[0]["training"]["num_samples"]
        shares = {key: [float(each["training"][key]) for each in told] for key in keys}
        found["training"] = {
            **{key: mean_std(values)[0] for key, values in shares.items()},
            "intervals": {key: _interval(values, count) for key, values in shares.items()},
        }
    return {"poison": found}


def _unpaired(members: Sequence[Entry]) -> str:
    """Say why measurements of results are in no pair; empty where all is kept."""
    lacking = {name for m in members for name in measured_in(m.evaluation.results) if name not in m.evaluation.measured}
    return (
        f"its results do not hold which changed images are right, so that {', '.join(sorted(lacking))} are not "
        "compared in pairs; measure them again by the same `dualhead evaluate`, which goes on from what is kept"
    ) if lacking else ""  # fmt: skip


def _together(first: Sequence[Entry], second: Sequence[Entry]) -> list[tuple[Entry, Entry]]:
    """Return the entries of two groups by seed, as far as both have it; of one run each, those of whatever seed."""
    if len(first) == len(second) == 1:
        return [(first[0], second[0])]
    a, b = ({entry.seed: entry for entry in group} for group in (first, second))
    return [(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]


def _other_triggers(first: Sequence[Entry], second: Sequence[Entry]) -> str:
    """Say in which way triggered images of two groups differ; empty where they are the same, or one has none.

    The names of poisons do not decide: a control has the trigger of the poison that it is like.
    """
    for pair in _together(first, second):
        a, b = (entry.triggered for entry in pair)
        if a is None or b is None:
            continue
        target, other = (int(entry.evaluation.results["poison"]["target"]) for entry in pair)
        if target != other:
            return f"their triggers have different targets (class {target} and class {other})"
        if not np.array_equal(np.sort(a.index), np.sort(b.index)) or other_images(a.results, b.results):
            return "their triggered images are not the same"
    return ""


def _shares(entry: Entry) -> dict[str, NDArray[np.float64]]:
    """Return by measurement the share of each image's changed renderings that are right, in the order of indices."""
    order = np.argsort(entry.evaluation.index)
    return {name: shares[order] for name, shares in entry.evaluation.shares.items()}


def _withstood(entry: Entry, attacks: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """Return what is right on triggered images, in the order of their indices; empty where none were measured.

    `trigger withstood` are those that are not taken for the target, so that more is better here too.
    """
    if entry.triggered is None:
        return {}
    order, found = np.argsort(entry.triggered.index), entry.triggered
    target = int(entry.evaluation.results["poison"]["target"])
    told = {"trigger withstood": ~successes(found, target)[order], "right on triggered": found.correct["clean"][order]}
    robust = [found.verdicts[name].robust[order] for name in attacks if name in found.verdicts]
    return told | ({"robust on triggered": np.logical_and.reduce(robust)} if len(robust) == len(attacks) > 0 else {})


def _robust(row: dict[str, Any]) -> float:
    """Robust accuracy under all attacks; where there was none, that on changed images, of the first measurement."""
    changed = next((float(told["accuracy"]) for told in measured_in(row).values()), 0.0)
    return float(row["robust_accuracy"].get("worst", changed))


def _interval(shares: Sequence[float], images: int) -> list[float]:
    """Return the interval of a share: Wilson's over images for one seed, Student's over several."""
    ends = student(shares, floor=1.0 / images)
    if ends is None:
        return list(wilson(round(shares[0] * images), images))
    return [max(ends[0], 0.0), min(ends[1], 1.0)]


def _dominates(row: dict[str, Any], other: dict[str, Any]) -> bool:
    mine, theirs = row["training_cost"]["flops"], other["training_cost"]["flops"]
    if (mine is None) != (theirs is None):  # which is dearer nobody knows
        return False
    if mine is not None and theirs is not None and mine > SAME_COST * theirs:
        return False
    a = (row["clean_accuracy"], _robust(row))
    b = (other["clean_accuracy"], _robust(other))
    return a != b and a[0] >= b[0] and a[1] >= b[1]


def _rendered_alike(entries: Sequence[Entry]) -> list[str]:
    """Return the measurements that all entries hold image by image, of the same renderings."""
    one, *others = (entry.evaluation for entry in entries)
    return [
        name
        for name in one.measured
        if one.num_samples > 1 and all(name in o.measured and rendered_alike(one, o, name) for o in others)
    ]


def _paired(first: NDArray[Any], second: NDArray[Any]) -> tuple[Paired, str]:
    """Return the test over images of verdicts or of shares, and its name."""
    if first.dtype == np.bool_:
        return mcnemar(first, second), "McNemar, exact"
    return paired_shares(first, second), "paired z, over images"


def _pairs(first: Sequence[Entry], second: Sequence[Entry], attacks: Sequence[str]) -> list[dict[str, Any]]:
    together = _together(first, second)
    if not together:
        return []
    a, b = (
        [{**_correct(entry, attacks), **_withstood(entry, attacks), **_shares(entry)} for entry in side]
        for side in zip(*together, strict=True)
    )
    measures = ["clean", *attacks, "worst"] if attacks else ["clean"]
    triggers = () if _other_triggers(first, second) else TRIGGER_MEASURES
    for name in (*triggers, *_rendered_alike((*first, *second))):
        found_by = [found.get(name) for found in (*a, *b)]
        if all(found is not None and len(found) == len(found_by[0]) for found in found_by):  # type: ignore[arg-type]  # none is None
            measures.append(name)
    if len(together) == 1:
        of_seed = "" if len(first) == len(second) == 1 else f", seed {together[0][0].seed}"
        found = {name: _paired(a[0][name], b[0][name]) for name in measures}
        return [
            {"accuracy": name, "difference": pair.difference, "interval": list(pair.interval), "p_value": pair.p_value,
             "verdict": pair.verdict, "test": test + of_seed}
            for name, (pair, test) in found.items()
        ]  # fmt: skip
    pairs = []
    for name in measures:
        first_correct, second_correct = ([found[name] for found in side] for side in (a, b))
        differences = [float(y.mean() - x.mean()) for x, y in zip(first_correct, second_correct, strict=True)]
        mean, ends, p_value = paired_t(differences, floor=1.0 / len(first_correct[0]))
        verdict = "gain" if ends[0] > 0 else "loss" if ends[1] < 0 else "undecided"
        pairs.append(
            {"accuracy": name, "difference": mean, "interval": ends, "p_value": p_value, "verdict": verdict,
             "test": f"paired t, {len(together)} seeds",
             "images_interval": list(interval_over_samples(first_correct, second_correct))}
        )  # fmt: skip
    return pairs
