"""The part of the report that belongs to one run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualhead.report import figures, generation, poisoning, routes, sequence, training
from dualhead.report.comparison import accuracy_table, conditions, findings
from dualhead.report.figures import Figure
from dualhead.report.gallery import Album, Gallery
from dualhead.report.lights import CHECKS
from dualhead.report.sources import Estimate, Measured, Source
from dualhead.report.table import Cell, Table, estimate_cell
from dualhead.report.text import duration, large, unequal


@dataclass(frozen=True)
class Check:
    """A diagnostic over the classifiers of a run.

    Args:
        name: name of the check.
        meaning: its purpose.
        lights: status for each classifier: `ok`, `warning`, `failed`, or empty where it was not made.
        messages: observations that are not fine: classifiers and words.
    """

    name: str
    meaning: str
    lights: list[str]
    messages: list[tuple[str, str]]


@dataclass(frozen=True)
class Details:
    """The page's section on one run; lists and texts are empty where there is nothing to say."""

    label: str
    notes: list[str]
    stages: list[training.Stage]
    classes: Figure | None
    class_table: Table | None
    confusion: Figure | None
    confusion_table: Table | None
    confusion_note: str
    judged: list[str]
    checks: list[Check]
    all_fine: str
    attacks: Table
    further: Table | None
    further_conditions: str
    routes: list[routes.Routes]
    sequence: sequence.Course | None
    poisoning: poisoning.Poisoning | None
    samples: list[generation.Samples]
    galleries: list[Gallery]
    gallery_command: str
    recipe: str
    environment: list[tuple[str, str]]
    commands: list[tuple[str, str]]


def details(source: Source, album: Album) -> Details:
    """Gather everything that the page says of one run.

    Args:
        source: the run.
        album: makes galleries until the page is full.
    """
    notes = list(source.notes)
    shown = source.deployed or (source.rows[-1] if source.rows else None)
    entries = _class_entries(shown, notes) if shown else []
    everything = [*source.rows, *source.further]
    class_names = {**{label: name for label, name, *_ in entries}, **source.class_names}
    by_weight = sorted(everything, key=lambda row: not row.deployed)  # what is deployed comes first, and has most room
    judged = [row for row in everything if findings(row)]
    checks = _checks(judged)
    galleries = [g for row in by_weight for g in album.galleries(row, class_names, notes)]
    confusion, listed, why = _confusion(shown, class_names)
    return Details(
        label=source.label,
        notes=notes,
        stages=training.stages(source),
        classes=_class_figure(shown, entries) if shown and entries else None,
        class_table=_class_table(entries) if entries else None,
        confusion=confusion,
        confusion_table=listed,
        confusion_note=why,
        judged=[row.name for row in judged],
        checks=checks,
        all_fine=_all_fine(checks, len(judged)),
        attacks=_attack_table(everything),
        further=accuracy_table(source.further) if source.further else None,
        further_conditions=conditions(source.further),
        routes=routes.sections(source, notes),
        sequence=sequence.section(source, notes),
        poisoning=poisoning.section(source, notes),
        samples=generation.samples(everything, notes),
        galleries=galleries,
        gallery_command="" if galleries else _gallery_command(source),
        recipe=source.recipe_text,
        environment=_environment(source, shown),
        commands=_commands(source, shown),
    )


# ---- classes


ClassEntry = tuple[int, str, int, Estimate, Estimate]
"""Label, name, number of samples, clean accuracy, accuracy under all attacks."""


def _class_entries(row: Measured, notes: list[str]) -> list[ClassEntry]:
    entries: list[ClassEntry] = []
    if row.worst is None:  # without attacks, no class is the least robust one
        return entries
    try:
        for entry in row.results.get("per_class") or []:
            ends = entry["intervals"]
            worst = next(name for name in ("worst", *entry["robust_accuracy"]) if name in entry["robust_accuracy"])
            clean = Estimate(float(entry["clean_accuracy"]), *map(float, ends["clean_accuracy"]))
            robust = Estimate(float(entry["robust_accuracy"][worst]), *map(float, ends[worst]))
            entries.append((int(entry["label"]), str(entry["class"]), int(entry["num_samples"]), clean, robust))
    except (KeyError, TypeError, ValueError, StopIteration):
        notes.append(f"{row.name}: accuracies of classes cannot be read.")
        return []
    return entries


def _class_figure(row: Measured, entries: Sequence[ClassEntry]) -> Figure:
    worst_first = sorted(entries, key=lambda entry: (entry[4].value, entry[3].value))
    drawn = worst_first[: figures.MOST_CLASSES]
    title = f"Classes, {row.name}"
    caption = "The class that withstands attacks least comes first."
    sizes = [count for _, _, count, _, _ in entries]
    if unequal([min(sizes), max(sizes)]):
        clean = sum(entry[3].value for entry in entries) / len(entries)
        robust = sum(entry[4].value for entry in entries) / len(entries)
        caption += (
            f" They have {min(sizes):,} to {max(sizes):,} images; with equal weight for each (balanced accuracy) clean "
            f"accuracy is {clean:.1%}, robust accuracy {robust:.1%}."
        )
    if len(drawn) < len(entries):
        title = f"The {len(drawn)} least robust of {len(entries):,} classes, {row.name}"
        caption += " The table below holds all of them."
    return figures.classes(title, [(name, clean, robust) for _, name, _, clean, robust in drawn], caption)


def _class_table(entries: Sequence[ClassEntry]) -> Table:
    rows = [
        [
            Cell(name),
            Cell(str(count), count),
            estimate_cell(clean),
            estimate_cell(robust),
        ]
        for _, name, count, clean, robust in entries
    ]
    return Table(["class", "images", "clean %", "attacked %"], rows)


def _confusion(row: Measured | None, names: Mapping[int, str]) -> tuple[Figure | None, Table | None, str]:
    """Show confusion under attack as a figure, or as a list where there are many classes, or why there is neither."""
    if row is None:
        return None, None, ""
    stored = [name for name in row.attacks if f"prediction_{name}" in row.samples]
    attack = min(stored, key=lambda name: row.robust[name].value, default=None)
    if attack is None:
        return None, None, (
            "Confusion under attack is not shown: the evaluation stores whether an attacked image was misclassified, "
            "but not as what."
        )  # fmt: skip
    labels, predictions = row.samples["label"], row.samples[f"prediction_{attack}"]
    seen = predictions >= 0
    count = max(len(names), int(labels.max()) + 1, int(predictions.max()) + 1)
    called = [names.get(label, str(label)) for label in range(count)]
    counts = np.zeros((count, count), np.int64)
    np.add.at(counts, (labels[seen], predictions[seen]), 1)
    title = f"Confusion under {attack}, {row.name}"
    if count <= figures.MOST_CLASSES:
        caption = (
            "Rows are labels, columns what attacked images are taken for; the stronger the colour, the more of them."
        )
        return figures.confusion(title, counts, called, caption), None, ""
    listed = [[Cell(a), Cell(b), Cell(str(n), n)] for a, b, n in figures.confusions(counts, called, 20)]
    return None, Table(["class", f"taken for, under {attack}", "images"], listed), ""


# ---- diagnostics and cost


def _checks(rows: Sequence[Measured]) -> list[Check]:
    found = [(row.name, {str(entry["name"]): entry for entry in findings(row)}) for row in rows]
    checks = []
    for name in dict.fromkeys(check for _, entries in found for check in entries):
        seen = [(model, entries.get(name, {})) for model, entries in found]
        lights = [str(entry.get("status", "")) for _, entry in seen]
        messages: dict[str, list[str]] = {}
        for model, entry in seen:
            if entry and entry.get("status") != "ok":
                messages.setdefault(str(entry.get("message", "no message")), []).append(model)
        told = [(", ".join(models), message) for message, models in messages.items()]
        checks.append(Check(name, CHECKS.get(name, ""), lights, told))
    return checks


def _all_fine(checks: Sequence[Check], models: int) -> str:
    """Say that all is fine where no light is yellow or red; else nothing."""
    if not checks or any(status not in ("ok", "") for check in checks for status in check.lights):
        return ""
    told = f"All {len(checks)} checks are" if len(checks) > 1 else "The check is"
    return f"{told} fine" + (f", in each of {models} evaluations." if models > 1 else ".")


def _attack_table(rows: Sequence[Measured]) -> Table:
    cells = []
    for row in rows:
        attacks = row.results.get("attacks")
        for name, record in attacks.items() if isinstance(attacks, Mapping) else ():
            if isinstance(record, Mapping):
                cells.append([Cell(row.name), Cell(str(name)), *_spent(record)])
                parts = record.get("parts") or []
                if len(parts) > 1:
                    cells += [[Cell(row.name), Cell(f"{name}: {part.get('name')}"), *_spent(part)] for part in parts]
    return Table(["model", "attack", "fooled", "forward passes", "backward passes", "time"], cells)


def _spent(record: Mapping[str, Any]) -> list[Cell]:
    counts = [record.get(key) for key in ("fooled", "forward_passes", "backward_passes")]
    return [
        *(Cell(large(count), count) for count in counts),
        Cell(duration(record.get("seconds")), record.get("seconds")),
    ]


# ---- the rest


def _gallery_command(source: Source) -> str:
    """Return the command that makes a gallery; empty where nothing has been evaluated yet."""
    if not source.rows and not source.further:
        return ""
    model = source.folder.as_posix() if source.is_run else "MODEL"
    return f"dualhead gallery {shlex.quote(model)}"


def _environment(source: Source, row: Measured | None) -> list[tuple[str, str]]:
    measured = row.results.get("environment") if row else None
    found: list[tuple[str, str]] = []
    for title, facts in (("training", source.environment), ("evaluation", measured)):
        if isinstance(facts, Mapping):
            found += [
                (f"{title}: {key}".replace("_", " "), str(value))
                for key, value in facts.items()
                if value not in (None, {})
            ]
    return found


def _commands(source: Source, row: Measured | None) -> list[tuple[str, str]]:
    """Return commands that repeat the run or the evaluation, with what each does."""
    commands = []
    recorded = row.results.get("command") if row else None
    if recorded:
        commands.append(("What was typed", str(recorded)))
    if source.is_run:
        config = shlex.quote((source.folder / "config.yaml").as_posix())
        commands.append(("The same again, in a new folder", f"dualhead train {config} --run-dir runs/again"))
    return commands
