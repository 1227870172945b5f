"""Keep what a finished run of benchmarks/poisoning/run.sh found in a small file, and answer from all of them.

    python benchmarks/poisoning/collect.py keep RUN FILE      # accuracies, success rates and cost of a measured run
    python benchmarks/poisoning/collect.py tell KEPT JSON     # KEPT/PART/CELL/seed=N.json, all of them

A cell is a method on a poison; its runs are seeds. Means over seeds have a 95 % interval of Student's t (of Wilson for
one seed). `digits` and `pilot` are set beside the marks of README.md. In `study` and `small` each method is set beside
its base method at equal cost, paired by seed, and every attack gets one of four answers. README.md says when.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualhead.statistics import mean_std, student, wilson
from dualhead.system.files import write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kept import difference, holm, points, runs_in

Run = Mapping[str, Any]
Cells = Mapping[str, Mapping[str, Run]]
"""Cells by name, their runs by seed."""

SUCCESS, CLEAN, ROBUST, STRONG = "attack_success_rate", "clean_accuracy", "robust_accuracy", "strong_accuracy"
"""Measures of a run; strong accuracy is under `autoattack-fast`, robust accuracy under PGD."""
KEYS = (CLEAN, ROBUST, STRONG, SUCCESS, "by_given_label", "by_true_label", "robust_on_triggered", "spectral_signatures")


@dataclass(frozen=True)
class Attack:
    """A poison of the study.

    Args:
        measure: what it is to change.
        family: of the correction for several tests.
        mark: least change on the method that shows whether it works at all, a share.
        kind: a claim needs two of them.
        shown_by: the method of the mark.
    """

    measure: str
    family: str
    mark: float
    kind: str
    shown_by: str = "natural"


ATTACKS = {
    "patch": Attack(SUCCESS, "backdoors", 0.6, "backdoor"),
    "sticker": Attack(SUCCESS, "backdoors", 0.6, "backdoor"),
    "blend": Attack(SUCCESS, "backdoors", 0.6, "backdoor"),
    "sinusoid": Attack(SUCCESS, "backdoors", 0.6, "backdoor"),
    "class_noise": Attack(CLEAN, "others", 0.15, "availability"),
    "class_blocks": Attack(CLEAN, "others", 0.15, "availability"),
    "label_flip": Attack(CLEAN, "others", 0.05, "labels"),
    "hypocritical": Attack(STRONG, "others", 0.03, "stability", "base"),
    "hypocritical_self": Attack(STRONG, "others", 0.03, "stability", "base"),
}
"""Poisons that a study may have, by their names in run.sh."""
PLANNED = {
    "study": ("blend", "sinusoid", "class_blocks", "label_flip", "hypocritical", "hypocritical_self"),
    "small": ("patch", "blend", "class_noise", "label_flip", "hypocritical", "hypocritical_self"),
}
"""Poisons of each study: of CIFAR-10 those that reached their marks in the pilot."""
BASES = {
    "dhat": "base", "distilled": "base_long", "ensemble": "base_long", "dhat_fitted": "base", "base_larger_eps": "base",
    "base_short": "base",
}  # fmt: skip
"""The base method at equal cost of each other method; `base_short`, as long as the first stage of DH-AT, costs less."""
TWO_HEADS = ("dhat", "distilled")
CONTROLS = ("ensemble", "base_larger_eps", "base_short")
"""What helps under an attack and has no second head that explains it."""
MARGINS = {SUCCESS: 0.1, CLEAN: 0.02, STRONG: 0.02}
"""Differences that count as none."""
CHANCE = 0.1
LEVEL = 0.05
MOST_SEEDS = 1000

MARKS = {
    "patch": (SUCCESS, 0.6), "sticker": (SUCCESS, 0.6), "blend": (SUCCESS, 0.6), "sinusoid": (SUCCESS, 0.6),
    "class_noise": (CLEAN, 0.15), "class_noise_large": (CLEAN, 0.15), "class_blocks": (CLEAN, 0.15),
    "one_pixel": (CLEAN, 0.15), "label_flip": (CLEAN, 0.05),
}  # fmt: skip
"""What an attack must do to natural training in the pilot and on digits: the success rate, or the fall of accuracy."""
RESTORED = {"class_noise": "most", "class_noise_large": "most", "class_blocks": "most", "one_pixel": "nothing"}
"""Share of what natural training loses that SAT must restore: over a half, or at most a tenth."""


# ---- one run


def record(run: Path) -> dict[str, Any]:
    """Return all that is told of a finished run: nothing else of it has to be kept."""
    rows = json.loads((run / "comparison.json").read_text())["rows"]
    results = json.loads((run / "evaluation" / "results.json").read_text())
    row = rows[-1]
    told: dict[str, Any] = {**_of_row(row), "num_samples": results["num_samples"]}
    poison: Mapping[str, Any] = row.get("poison") or {}
    told["num_triggered"] = poison.get("num_triggered")
    told |= {key: row[key] for key in ("output", "parameters", "training_cost") if key in row}
    if len(rows) > 1:
        told["outputs"] = {each["output"]: _of_row(each) for each in rows[:-1]}
    told |= {key: poison[key] for key in ("crafting", "epochs", "pairs") if key in poison}
    strong = run / "evaluations" / "strong" / "results.json"
    if strong.is_file():
        measured = json.loads(strong.read_text())
        told |= {STRONG: measured[ROBUST]["worst"], "strong_images": measured["num_samples"]}
    triggers = {
        path.parent.name.removeprefix("trigger_"): json.loads(path.read_text())["poison"]
        for path in sorted(run.glob("evaluations/trigger_*/results.json"))
    }
    if triggers:
        told["triggers"] = {name: each[SUCCESS] for name, each in triggers.items()}
        told["num_triggered"] = next(iter(triggers.values()))["num_triggered"]
    environment = run / "environment.json"
    if environment.is_file():
        told["environment"] = json.loads(environment.read_text())
    return told


def _of_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the measures of one output of a run."""
    poison: Mapping[str, Any] = row.get("poison") or {}
    training = poison.get("training") or {}
    finders = {name: (poison.get(name) or {}).get("auroc") for name in ("spectral_signatures", "activation_clustering")}
    return {
        CLEAN: row[CLEAN],
        ROBUST: row[ROBUST]["worst"],
        SUCCESS: poison.get(SUCCESS),
        "robust_on_triggered": (poison.get("robust_accuracy_on_triggered") or {}).get("worst"),
        "by_given_label": training.get("by_given_label"),
        "by_true_label": training.get("by_true_label"),
        **{name: value for name, value in finders.items() if value is not None},
    }


# ---- cells


def summary(values: Sequence[float], images: int | None = None) -> dict[str, Any]:
    """Return mean and interval over seeds, or over images where there is one seed.

    Args:
        values: shares of images, or what is no such share.
        images: how many, of which the interval is no narrower than one; None for what is no share.
    """
    mean, deviation = mean_std(values)
    if len(values) == 1:
        ends = None if images is None else list(wilson(round(mean * images), images))
        return {"mean": mean, "interval": ends, "runs": 1}
    ends = student(values, floor=1.0 / images if images else 0.0)
    return {"mean": mean, "interval": ends, "deviation": deviation, "runs": len(values)}


def change(values: Sequence[float], images: int | None) -> dict[str, Any]:
    """Return mean and interval over seeds of differences of shares, none of one seed; see `summary`."""
    return summary(values, images if len(values) > 1 else None)


def images_of(run: Run, measure: str) -> int | None:
    """Return how many images a measure of a run is a share of; None for one that is no share of test images."""
    counts = {CLEAN: "num_samples", ROBUST: "num_samples", STRONG: "strong_images", SUCCESS: "num_triggered"}
    return int(run[counts[measure]]) if measure in counts else None


def load(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Read the kept runs of a part, by cell and by seed as the answers write it."""
    return {cell: {str(seed): run for seed, run in runs.items()} for cell, runs in runs_in(folder).items()}


def describe(cells: Cells) -> dict[str, Any]:
    """Return means and intervals of every cell, and its difference to clean data."""
    made = {}
    for name, by_seed in cells.items():
        first, clean = next(iter(by_seed.values())), cells.get(f"{name.partition('-')[0]}-clean", {})
        entry: dict[str, Any] = {"seeds": list(by_seed)}
        for key in KEYS:
            measured = [told for told in by_seed.values() if told.get(key) is not None]
            if not measured:
                continue
            entry[key] = summary([told[key] for told in measured], images_of(measured[0], key))
        both = [seed for seed in by_seed if seed in clean]
        if both and not name.endswith("-clean"):
            entry["against_clean_data"] = {
                key: change([by_seed[seed][key] - clean[seed][key] for seed in both], first["num_samples"])
                for key in (CLEAN, ROBUST)
            }
        outputs = first.get("outputs", {})
        if outputs:
            entry["outputs"] = {output: _of_output(list(by_seed.values()), output) for output in outputs}
        made[name] = entry
    return made


def _of_output(runs: Sequence[Run], output: str) -> dict[str, Any]:
    """Return means and intervals over seeds of an output beside the deployed one: a head, the mean, the base model."""
    found = [run["outputs"][output] for run in runs if output in run.get("outputs", {})]
    known = {key: [each[key] for each in found if each.get(key) is not None] for key in (CLEAN, ROBUST, SUCCESS)}
    return {key: change(values, images_of(runs[0], key)) for key, values in known.items() if values}


# ---- the marks of the pilot


def check(cells: Cells) -> dict[str, Any]:
    """Tell which attacks reach their marks on natural training, and how much of its loss SAT restores."""
    told = describe(cells)

    def mean(cell: str, key: str) -> float | None:
        found = told.get(cell, {}).get(key)
        return None if found is None else float(found["mean"])

    made: dict[str, Any] = {}
    before = mean("natural-clean", CLEAN)
    for name, (measure, mark) in MARKS.items():
        after = mean(f"natural-{name}", measure)
        if after is None or (measure == CLEAN and before is None):
            continue
        reached = after if measure == SUCCESS else before - after  # type: ignore[operator]  # none is None, see above
        made[name] = {"measure": measure, "mark": mark, "reached": reached, "works": reached >= mark}
        kept = mean(f"sat-{name}", CLEAN)
        if name in RESTORED and kept is not None and reached > 0:
            share = (kept - after) / reached
            wanted = share > 0.5 if RESTORED[name] == "most" else share <= 0.1
            made[name]["restored_by_sat"] = {"share": share, "expected": RESTORED[name], "as_expected": wanted}
    return made


# ---- the study


def cost_of(cells: Cells, method: str, name: str) -> dict[str, float]:
    """Return V of an attack by seed: what it costs a method, in the measure that it is to change."""
    clean, poisoned = cells.get(f"{method}-clean", {}), cells.get(f"{method}-{name}", {})
    measure = ATTACKS[name].measure
    found = {}
    for seed in poisoned:
        if seed not in clean:
            continue
        if measure == SUCCESS:
            before = clean[seed].get("triggers", {}).get(name)
            if before is not None:
                found[seed] = poisoned[seed][SUCCESS] - before
        else:
            found[seed] = clean[seed][measure] - poisoned[seed][measure]
    return found


def seeds_to_decide(mean: float, deviation: float, margin: float, tests: int) -> int | None:
    """Return how many seeds would decide, if mean and deviation stayed as they are; None for more than a thousand.

    Decided is a difference at a level of 0.05 / `tests`, or a 90 % interval within the margin.
    """
    from scipy import stats

    for count in range(2, MOST_SEEDS + 1):
        error = deviation / math.sqrt(count)
        apart = abs(mean) > float(stats.t.ppf(1 - LEVEL / tests / 2, count - 1)) * error
        equal = abs(mean) + float(stats.t.ppf(0.95, count - 1)) * error < margin
        if apart or equal:
            return count
    return None


def verdict(found: Mapping[str, Any], corrected: float | None, better: float, margin: float, base: float) -> str:
    """Return `helps`, `harms`, `equal`, `undecided`, or `no effect` where the attack costs the base method nothing.

    Args:
        found: of `difference`.
        corrected: its p-value after Holm's correction; None of one seed.
        better: by how much the method's level under the poison is better than the base's.
        margin: that counts as none.
        base: what the attack costs the base method; below the margin nothing is left to help with.
    """
    if corrected is None:
        return "undecided"
    if corrected < LEVEL and better < 0 < found["mean"]:
        return "harms"
    if base < margin:
        return "no effect"
    if corrected < LEVEL and found["mean"] < 0 < better:
        return "helps"
    low, high = found["narrow"]
    return "equal" if -margin < low and high < margin else "undecided"


def compare(cells: Cells, method: str, name: str) -> dict[str, Any] | None:
    """Set what an attack costs a method beside what it costs the base method at equal cost; None without a pair."""
    base, attack = BASES[method], ATTACKS[name]
    costs = {each: cost_of(cells, each, name) for each in (method, base)}
    seeds = [seed for seed in costs[method] if seed in costs[base]]
    if not seeds:
        return None
    sign = -1 if attack.measure == SUCCESS else 1
    poisoned = {each: cells[f"{each}-{name}"] for each in (method, base)}
    better = [sign * (poisoned[method][s][attack.measure] - poisoned[base][s][attack.measure]) for s in seeds]
    images = images_of(poisoned[method][seeds[0]], attack.measure)
    assert images is not None
    made = {
        "attack": name, "method": method, "base": base, "measure": attack.measure, "family": attack.family,
        "seeds": seeds, "cost": {each: change([of[s] for s in seeds], images) for each, of in costs.items()},
        "difference": difference([costs[method][s] - costs[base][s] for s in seeds], images),
        "level_better_by": change(better, images),
    }  # fmt: skip
    if attack.measure != SUCCESS:
        room = {each: [cells[f"{each}-clean"][s][attack.measure] - CHANCE for s in seeds] for each in costs}
        made["share_lost"] = {
            each: mean_std([costs[each][s] / r for s, r in zip(seeds, room[each], strict=True)])[0]
            for each in costs
            if all(r > 0 for r in room[each])
        }
    return made


def answers(cells: Cells, planned: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Compare every method with its base under every attack, corrected within method and family.

    Args:
        cells: of a study.
        planned: its attacks, which tell how many tests a family has in the end.
    """
    made = []
    for method in BASES:
        found = [told for name in ATTACKS if (told := compare(cells, method, name)) is not None]
        for family in dict.fromkeys(told["family"] for told in found):
            of = [told for told in found if told["family"] == family]
            known = {t["attack"]: t["difference"]["p_value"] for t in of if t["difference"]["p_value"] is not None}
            tests = max(len(of), sum(ATTACKS[each].family == family for each in planned))
            corrected = holm(known, tests)
            for told in of:
                margin, inner = MARGINS[told["measure"]], told["difference"]
                told["corrected_p_value"] = corrected.get(told["attack"])
                better = told["level_better_by"]["mean"]
                base = told["cost"][told["base"]]["mean"]
                told["answer"] = verdict(inner, told["corrected_p_value"], better, margin, base)
                if told["answer"] == "undecided" and inner["deviation"] is not None:
                    told["seeds_that_would_decide"] = seeds_to_decide(inner["mean"], inner["deviation"], margin, tests)
                told["sentence"] = sentence(told)
        made += found
    return made


def sentence(told: Mapping[str, Any]) -> str:
    """Return the answer to one attack on one method."""
    found, unit = told["difference"], "points of success" if told["measure"] == SUCCESS else "points"
    shown = f"{points(found['mean'], found['interval'], sign=True)} {unit}, {len(told['seeds'])} seeds"
    words = f"{told['method']} under {told['attack']}, against {told['base']}: {told['answer']} ({shown}"
    if told["answer"] == "no effect":
        cost = points(told["cost"][told["base"]]["mean"], sign=True)
        return f"{words}; the attack costs {told['base']} {cost} {unit})."
    if told["answer"] != "undecided":
        return f"{words})."
    if found["deviation"] is None:
        return f"{words}; one seed decides nothing)."
    needed = told["seeds_that_would_decide"]
    if needed is not None and needed <= len(told["seeds"]):
        return f"{words}; more seeds do not decide: the difference and the level point to different methods)."
    return f"{words}; {f'{needed} seeds' if needed else f'no {MOST_SEEDS} seeds'} would decide)."


def strengths(cells: Cells) -> dict[str, Any]:
    """Tell whether each attack works at all, on the method that is to show it."""
    made = {}
    for name, attack in ATTACKS.items():
        costs = cost_of(cells, attack.shown_by, name)
        poisoned, values = cells.get(f"{attack.shown_by}-{name}", {}), list(costs.values())
        if attack.measure == SUCCESS:  # the mark is of the rate itself
            values = [told[SUCCESS] for told in poisoned.values()]
        if values:
            reached = change(values, images_of(next(iter(poisoned.values())), attack.measure))
            works = reached["mean"] >= attack.mark
            made[name] = {"on": attack.shown_by, "mark": attack.mark, "reached": reached, "works": works}
    return made


def beyond_sham(cells: Cells) -> dict[str, Any]:
    """Return what a poison costs beyond its sham, by cell, where both are finished."""
    made = {}
    for cell, runs in cells.items():
        method, _, name = cell.partition("-")
        sham = cells.get(f"{method}-sham_{name}", {})
        seeds = [seed for seed in runs if seed in sham]
        if name in ATTACKS and seeds:
            measure, sign = ATTACKS[name].measure, -1 if ATTACKS[name].measure == SUCCESS else 1
            gaps = [sign * (sham[seed][measure] - runs[seed][measure]) for seed in seeds]
            made[cell] = change(gaps, images_of(runs[seeds[0]], measure))
    return made


def claims(found: Sequence[Mapping[str, Any]], planned: Sequence[str]) -> dict[str, Any]:
    """Tell, for each method with two heads, whether a claim about two heads stands."""
    made: dict[str, Any] = {}
    for method in TWO_HEADS:
        mine = {told["attack"]: told["answer"] for told in found if told["method"] == method}
        if not mine:
            continue
        of = {answer: [name for name in mine if mine[name] == answer] for answer in ("helps", "harms")}
        known = {(told["method"], told["attack"]): told["answer"] for told in found if told["method"] in CONTROLS}
        missing = [control for control in CONTROLS if not any(each == control for each, _ in known)]
        explained = [name for name in of["helps"] if any(known.get((c, name)) == "helps" for c in CONTROLS)]
        helped = len({ATTACKS[name].kind for name in of["helps"] if name not in explained})
        all_told = set(planned) <= set(mine)
        if of["harms"] or (all_told and "undecided" not in mine.values() and helped < 2):
            stands = "no"
        else:
            stands = "yes" if helped >= 2 and all_told and not missing else "undecided"
        made[method] = {**of, "explained_by_controls": explained, "controls_missing": missing, "stands": stands}
    return made


def study(cells: Cells, part: str = "study") -> dict[str, Any]:
    """Return the answers of a study, and the cells that they come from."""
    found = answers(cells, PLANNED[part])
    return {
        "strengths": strengths(cells),
        "answers": found,
        "beyond_sham": beyond_sham(cells),
        "claims": claims(found, PLANNED[part]),
        "cells": describe(cells),
    }


def table(told: Mapping[str, Any]) -> str:
    """Return the answers as a table in Markdown; accuracies and rates in percent, differences in points."""
    lines = [
        "| attack | method | base | seeds | costs the method | costs the base | difference | answer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in told["answers"]:
        found, needed = each["difference"], each.get("seeds_that_would_decide")
        more = f", {needed} seeds would decide" if needed and needed > len(each["seeds"]) else ""
        lines.append(
            f"| {each['attack']} | {each['method']} | {each['base']} | {len(each['seeds'])} "
            f"| {' | '.join(points(each['cost'][method]['mean']) for method in (each['method'], each['base']))} "
            f"| {points(found['mean'], found['interval'], sign=True)} | {each['answer']}{more} |"
        )
    return "\n".join(lines)


def tell(kept: Path) -> dict[str, Any]:
    """Return what all kept runs say, by part."""
    made: dict[str, Any] = {}
    for part in ("digits", "pilot", "study", "small"):
        cells = load(kept / part)
        if cells:
            made[part] = (
                study(cells, part) if part in ("study", "small") else {"checks": check(cells), **describe(cells)}
            )
    return made


def main() -> None:
    """Keep a run, or read what is kept, compare, write."""
    if len(sys.argv) != 4 or sys.argv[1] not in ("keep", "tell"):
        sys.exit(__doc__)
    source, target = Path(sys.argv[2]), Path(sys.argv[3])
    if sys.argv[1] == "keep":
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, record(source))
        return
    made = tell(source)
    target.write_text(json.dumps(made, indent=1) + "\n")
    for part, told in made.items():
        if "answers" in told:
            print(f"{part}:\n\n{table(told)}\n")
            for each in told["answers"]:
                print(each["sentence"])
            continue
        for name, each in told["checks"].items():
            back = each.get("restored_by_sat")
            more = f"; SAT restores {back['share']:.0%}, expected {back['expected']}" if back else ""
            words = "works" if each["works"] else "too weak"
            print(f"{part} {name}: {words} ({100 * each['reached']:.1f}, mark {100 * each['mark']:.0f}{more})")


if __name__ == "__main__":
    main()
