"""Training curves, and what they say of overfitting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dualhead.report.figures import SERIES, Figure, Series, lines, slug
from dualhead.report.sources import Source
from dualhead.report.text import attack_text, component_text, duration, large, percent
from dualhead.statistics import chance_drop, overfits_single_steps

NOT_LOSSES = {
    "stage", "epoch", "step", "learning_rate", "train_accuracy", "validation_clean", "validation_robust",
    "validation_largest_answer", "watched_fgsm", "watched_pgd", "seconds", "dropped_steps",
}  # fmt: skip
"""Keys of a line of metrics besides the loss and its terms."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run, for the page.

    Args:
        name: name of the stage.
        facts: its work, in words.
        cost: epochs, time and arithmetic.
        verdict: verdict of the best and the last epoch.
        overfits: robust accuracy fell after the best epoch by more than chance explains, or single steps overfitted.
        figures: its curves; empty if no epoch is finished.
    """

    name: str
    facts: str
    cost: str
    verdict: str
    overfits: bool
    figures: list[Figure]


def stages(source: Source) -> list[Stage]:
    """Return the stages of a run, in order."""
    return [_stage(source, recipe) for recipe in source.stages]


def _stage(source: Source, recipe: Mapping[str, Any]) -> Stage:
    name = str(recipe["name"])
    found = source.lines(recipe["name"])
    choices = {"fit": "fits the aggregator", "interpolate": "interpolates weights"}
    choice = next((words for key, words in choices.items() if recipe.get(key) is not None), None)
    if choice is not None:
        return Stage(name, f"trains nothing: {choice}", _cost(source, recipe, found), _chosen(found), False, [])
    best, last = best_line(found), next((line for line in reversed(found) if _validated(line)), None)
    verdict, overfits = _verdict(source, best, last) if best and last else ("", False)
    if not found and recipe.get("epochs") == 0:
        verdict = "Not trained: the weights that it starts from are kept."
    elif not found:
        verdict = "No epoch is logged."
    elif not verdict and any("validation_robust" in line for line in found):
        verdict = "No accuracy on held-out images is a number."
    elif not verdict:
        verdict = "There were no held-out images: the last epoch was kept, and overfitting cannot be seen."
    alone = [line for line in found if _watched(line) and overfits_single_steps(*_watched(line))]
    if alone:
        fgsm, pgd = (percent(value) for value in _watched(alone[-1]))
        verdict = (
            f"Catastrophic overfitting, last in epoch {alone[-1]['epoch']}: of a few images {fgsm} % stay right under "
            f"one step of FGSM, {pgd} % under a few of PGD. {verdict}"
        )
    return Stage(
        name, _facts(source, recipe), _cost(source, recipe, found), verdict, overfits or bool(alone),
        _figures(source, name, found, best) if found else [],
    )  # fmt: skip


def _chosen(found: Sequence[Mapping[str, Any]]) -> str:
    """Describe the choice of a stage that fits."""
    line = found[-1] if found else None
    if line is None or not _validated(line):
        return "Nothing is logged."
    told = ", ".join(
        f"{key} {_number(line, key):g}" for key in line if not _is_no_loss(key) and _number(line, key) is not None
    )
    robust, clean = percent(line["validation_robust"]), percent(line["validation_clean"])
    return f"Chosen on the held-out images: {told}. There: robust {robust} %, clean {clean} %."


def _is_no_loss(key: str) -> bool:
    return key in NOT_LOSSES or key.startswith("validation_")


def _validated(line: Mapping[str, Any]) -> bool:
    return all(_number(line, f"validation_{kind}") is not None for kind in ("clean", "robust"))


def _watched(line: Mapping[str, Any]) -> tuple[float, ...]:
    """Accuracies under one step and several, of a stage that trains on single steps; else nothing."""
    found = [_number(line, f"watched_{attack}") for attack in ("fgsm", "pgd")]
    return tuple(value for value in found if value is not None) if None not in found else ()


def _number(line: Mapping[str, Any], key: str) -> float | None:
    value = line.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def best_line(found: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the epoch with the highest robust, then clean accuracy on held-out images; the first of several."""
    validated = [line for line in found if _validated(line)]
    return max(validated, key=lambda line: (line["validation_robust"], line["validation_clean"]), default=None)


def _verdict(source: Source, best: Mapping[str, Any], last: Mapping[str, Any]) -> tuple[str, bool]:
    def told(line: Mapping[str, Any]) -> str:
        robust, clean = percent(line["validation_robust"]), percent(line["validation_clean"])
        return f"epoch {line['epoch']}: robust {robust} %, clean {clean} %"

    held_out = source.held_out
    drop = best["validation_robust"] - last["validation_robust"]
    if drop <= 0:
        return f"The last epoch is as robust as any: {told(last)}. No robust overfitting.", False
    words = f"Best {told(best)}. Last {told(last)}."
    words += f" The last is {100 * drop:.1f} points less robust than the best"
    if held_out is None:
        return f"{words}.", False
    if drop > chance_drop(best["validation_robust"], last["validation_robust"], held_out):
        return f"{words}, more than {held_out} held-out images explain by chance: robust overfitting.", True
    return f"{words}, which {held_out} held-out images explain by chance.", False


def _facts(source: Source, recipe: Mapping[str, Any]) -> str:
    parts = []
    threat = source.recipe.get("threat")
    norm = threat.get("norm") if isinstance(threat, Mapping) else None
    if isinstance(recipe.get("train"), list):
        parts.append(f"trains {', '.join(map(str, recipe['train']))}")
    for key, word in (("objective", ""), ("attack", "attack "), ("optimiser", ""), ("schedule", "schedule ")):
        component = recipe.get(key)
        if isinstance(component, Mapping) and "name" in component:
            told = attack_text(recipe, norm) if key == "attack" else component_text(component)
            parts += [f"{word}{told}"] if told else []
    return "; ".join(parts)


def _cost(source: Source, recipe: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> str:
    summary = source.summaries.get(recipe["name"])
    planned = recipe.get("epochs", "?")
    if summary is None:
        if not found:
            return f"{planned} epochs, not begun"
        return f"{found[-1]['epoch']} of {planned} epochs, {duration(_number(found[-1], 'seconds'))}; not finished"
    if planned == 0:
        return "no epochs"
    words = f"{summary.get('epochs', planned)} epochs, {duration(summary.get('seconds'))}"
    return f"{words}, {large(summary.get('flops'))}FLOP; kept: {summary.get('kept', 'not recorded')}"


def _figures(
    source: Source, stage: str, found: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None
) -> list[Figure]:
    marks = []
    if best is not None:
        marks.append((float(best["epoch"]), f"best: {best['epoch']}"))
    if best is None or found[-1]["epoch"] - best["epoch"] > 0.25 * len(found):  # else the words would collide
        marks.append((float(found[-1]["epoch"]), f"last: {found[-1]['epoch']}"))
    elif found[-1] is not best:
        marks = [(marks[0][0], f"best: {best['epoch']}, last: {found[-1]['epoch']}"), (float(found[-1]["epoch"]), "")]
    terms = list(dict.fromkeys(key for line in found for key in line if not _is_no_loss(key) and _is_term(found, key)))
    accuracy = {
        "validation_robust": "robust",
        "validation_clean": "clean",
        "train_accuracy": "training batches",
        "watched_fgsm": "a few images, FGSM",
        "watched_pgd": "a few images, PGD-5",
    }
    curves = [
        Series(name, style, _points(found, key))
        for (key, name), style in zip(accuracy.items(), SERIES, strict=False)
        if _has(found, key)
    ]
    losses = [Series(term, SERIES[n % len(SERIES)], _points(found, term)) for n, term in enumerate(terms)]
    rate = [Series("learning rate", SERIES[0], _points(found, "learning_rate"))]
    figures = []
    for title, series, share in (
        ("Accuracy, percent", curves, True),
        ("Loss", losses, False),
        ("Learning rate", rate, False),
    ):
        if series:
            name = slug(source.label, stage, title.split(",")[0])
            told = "; ".join(_told(entry, share=share) for entry in series)
            figures.append(lines(name, title, series, x_label="epoch", share=share, marks=marks, describe=told))
    return figures


def _is_term(found: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Whether a metric holds numbers, or what stands for one that is not finite."""
    return all(line.get(key) is None or isinstance(line[key], int | float) for line in found)


def _has(found: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(_number(line, key) is not None for line in found)


def _points(found: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return epochs and values, NaN for values not finite; epochs without the key (no validation) are left out."""
    values = [(line["epoch"], _number(line, key)) for line in found if key in line]
    return [(float(epoch), math.nan if value is None else value) for epoch, value in values]


def _told(entry: Series, *, share: bool) -> str:
    seen = [y for _, y in entry.points if math.isfinite(y)]
    if not seen:
        return f"{entry.name} has no finite value"
    first, last, low, high = (
        percent(value) if share else f"{value:.4g}" for value in (seen[0], seen[-1], min(seen), max(seen))
    )
    return f"{entry.name} from {first} to {last}, lowest {low}, highest {high}"
