"""Finished runs and evaluations as entries of a comparison, and which of them are one run under several seeds."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dualhead.errors import UserError
from dualhead.evaluation import TRIGGERED, Evaluation
from dualhead.names import id_of_row
from dualhead.runs.folder import RunFolder, read_recipe, without_how

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One output of one run.

    Args:
        group: runs that differ in nothing but the seed and in how the work was done share it.
        label: of the group.
        name: of the output, as the run's tables call it; empty for an evaluation that belongs to no run.
        deployed: it is the run's result.
        seed: of the run.
        evaluation: what was measured.
        parameters: of the modules that the output runs; None if unknown.
        flops: floating-point operations of its training; None if unknown.
        forward_equivalents: the same in forward passes of its own run's base model.
        seconds: of its training; None if unknown.
        where: the folder after which it is called, absolute.
        triggered: what was measured of test images with the trigger of a poison; None if nothing was.
        folder: that holds the evaluation.
    """

    group: str
    label: str
    name: str
    deployed: bool
    seed: int
    evaluation: Evaluation
    parameters: int | None = None
    flops: float | None = None
    forward_equivalents: float | None = None
    seconds: float | None = None
    where: Path = Path()
    triggered: Evaluation | None = None
    folder: Path = Path()


def read_entries(places: Sequence[Path]) -> list[Entry]:
    """All outputs of runs, of folders that hold runs (as `sweep` leaves them), and of evaluations.

    An evaluation that lies in a run, as `dualhead evaluate RUN` leaves it, and is of what the run made stands for the
    run: with its seed, at its cost. One of another output of the run, as `--output-of head2` makes it, stands for that
    output.

    Raises:
        UserError: if nothing finished is found, naming what is missing.
    """
    entries = []
    for place in places:
        inside = sorted(path.parent for path in place.glob("*/config.yaml")) if place.is_dir() else []
        if RunFolder(place).begun or not inside:
            entries += _entries(place)
            continue
        finished = [run for run in inside if _is_finished(run)]
        if not finished:
            raise UserError(f"{place}: holds no finished run of {len(inside)}; `dualhead train` goes on with them")
        if len(finished) < len(inside):
            named = ", ".join(run.name for run in inside if run not in finished)
            _log.warning("%s: left out what is not finished: %s", place, named)
        for run in finished:
            entries += _entries(run)
    return entries


def _entries(place: Path) -> list[Entry]:
    run = next((folder for folder in (place, *place.absolute().parents[:2]) if _is_finished(folder)), None)
    chosen = None if run in (None, place) else _chosen(place)
    if run is None or (run != place and chosen is None):
        inside = RunFolder(place).evaluation
        folder = inside if inside.is_dir() else place
        return [_alone(place, folder)]
    folder = RunFolder(run).evaluation if run == place else place
    recipe = _recipe(run)
    seed = recipe["runtime"].pop("seed")
    recipe_name = recipe.pop("name")
    where = run.absolute()
    if run.name == f"seed={seed}":  # of a sweep over nothing but seeds: its folder says what it is
        where = where.parent
        label = where.name
    else:
        label = run.name.replace(f",seed={seed}", "").replace(f"seed={seed}", recipe_name)
    group = json.dumps(without_how(recipe), sort_keys=True)
    rows = json.loads(RunFolder(run).comparison.read_text(encoding="utf-8"))["rows"]
    entries = []
    if chosen and chosen.output:
        named = [row for row in rows if id_of_row(row) == chosen.output]
        if not named:
            return [_alone(place, place)]
        rows, group, label = named, f"{group} {chosen.output}", f"{label}, {named[0]['name']}"
    if chosen and chosen.rule:
        group, label = f"{group} {chosen.rule}", f"{label}, {chosen.rule}"
    for row in rows if run == place else rows[-1:]:
        last = row is rows[-1]
        cost = row["training_cost"]
        evaluated = folder if last else RunFolder(run).row(row["name"])
        entries.append(
            Entry(
                group, label, "" if chosen and chosen.output else row["name"], last, seed,
                Evaluation.load(evaluated),
                row["parameters"], cost.get("flops"), cost["forward_equivalents"], cost["seconds"], where,
                Evaluation.load(evaluated / TRIGGERED) if (evaluated / TRIGGERED / "results.json").is_file() else None,
                evaluated,
            )
        )  # fmt: skip
    return entries


def _alone(place: Path, folder: Path) -> Entry:
    """Return an evaluation that stands for no run."""
    return Entry(str(place), str(place), "", True, 0, Evaluation.load(folder), where=place.absolute(), folder=folder)


def _recipe(run: Path) -> dict[str, Any]:
    """As `config.yaml` holds it, with defaults for options that did not exist yet when it was written.

    A folder of images that is there is named by its absolute path, however the run was told of it.
    """
    try:
        recipe = read_recipe(run).resolved()
    except UserError:  # of a version whose recipes were others
        old: dict[str, Any] = yaml.safe_load(RunFolder(run).config.read_text(encoding="utf-8"))
        return old
    for images in filter(None, (recipe["data"], recipe["data"]["extra"])):
        folder = Path(images["source"]).expanduser()
        if folder.exists():
            images["source"] = str(folder.resolve())
    return recipe


def _is_finished(run: Path) -> bool:
    return RunFolder(run).begun and RunFolder(run).comparison.is_file()


@dataclass(frozen=True)
class _Chosen:
    """The subject of an evaluation: an output, empty for the run's own, and the rule that chose its checkpoint."""

    output: str
    rule: str


def _chosen(place: Path) -> _Chosen | None:
    """Return what an evaluation in a run is of; None if of another stage, or of a checkpoint that somebody chose."""
    try:
        results = json.loads((place / "results.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    chosen = results.get("subject")
    if not chosen or chosen.get("stage") or (chosen.get("checkpoint") and not chosen.get("chosen")):
        return None
    return _Chosen(str(chosen.get("output") or ""), str(chosen.get("chosen") or ""))


def by_output(entries: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    """Return the entries by output and group of runs, each group under the name that tables give it.

    Raises:
        UserError: if a run is named twice.
    """
    groups = grouped(entries)
    named = zip(labels_of(groups), groups, strict=True)
    return [(titled(label, members), members) for label, members in named]


def titled(label: str, members: Sequence[Entry]) -> str:
    """Return the name that tables give an output of a group of runs."""
    return f"{label}: {members[0].name}" if members[0].name else label


def grouped(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Return the entries of each output of each group of runs.

    Raises:
        UserError: if a run is named twice.
    """
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.group, entry.name), []).append(entry)
    for members in groups.values():
        if len({member.seed for member in members}) < len(members):
            raise UserError(f"{members[0].label}: two runs have the same recipe and seed; compare each run once")
    return list(groups.values())


def labels_of(groups: Sequence[Sequence[Entry]]) -> list[str]:
    """Return the name of each group in tables: its label, after as many folders as tell it from its namesakes."""

    def told(entry: Entry, folders: int) -> str:
        return "/".join((*entry.where.parent.parts[len(entry.where.parent.parts) - folders :], entry.label))

    labels = []
    for first, *_ in groups:
        rivals = [other for other, *_ in groups if other.group != first.group and other.label == first.label]
        depths = range(len(first.where.parts))
        names = [told(first, n) for n in depths if all(told(first, n) != told(rival, n) for rival in rivals)]
        labels.append(names[0] if names else first.label)
    return labels
