"""The part of the report that sets classifiers side by side: verdict, table, bars, curves and what differs."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualhead.report.differences import broken_later, comparable, difference, repeats, same_model, worn_difference
from dualhead.report.figures import SERIES, Entry, Figure, Series, bars, lines, scatter
from dualhead.report.lights import believable, lights
from dualhead.report.sources import Estimate, Measured, Source, measured_in, measured_title
from dualhead.report.table import MISSING, Cell, Table, accuracy_columns, described, estimate_cell, page_table
from dualhead.report.text import duration, eps_texts, large, percent, points, threat_name, threat_text, times_text
from dualhead.report.training import best_line
from dualhead.statistics import Paired

MOST_DIFFERENCES = 60
"""Lines in the table of what differs between recipes."""

FEW_RUNS = 4
"""Runs of which each is compared with each."""

ROUNDING = 1e-3
"""By which margins and distances of one model may differ where it is computed beside another head."""

STANDARD = {"autoattack", "autoattack-plus", "autoattack-rand"}
"""Attacks after which the verdict need not ask for stronger ones."""


@dataclass(frozen=True)
class Verdict:
    """Verdict, the first words of the page.

    Args:
        sentence: the result with its interval.
        caveats: what limits it.
        light: `ok` if all checks are fine and the model is right under attack more often than a guess is; `warning`
            or `failed` as its checks say, and where an attack that was run later found more, or the model only
            guesses; `none` where nothing was measured or checked.
    """

    sentence: str
    caveats: list[str]
    light: str = "none"


# ---- the verdict


def verdict(sources: Sequence[Source]) -> Verdict:
    """The result in one sentence, and what limits it."""
    measured = [row for source in sources if (row := source.deployed or _last(source)) and row.worst]
    if not measured:
        return _unmeasured(sources)
    peers = [row for row in measured if _met(row) == _met(measured[0])]
    best = max(peers, key=lambda row: (_is_believable(row), _robust(row)))
    sentence = _result(best)
    home = next(source for source in sources if best in source.rows)
    if len(peers) > 1:
        second = max((row for row in peers if row is not best), key=lambda row: (_is_believable(row), _robust(row)))
        sentence += _against(best, second, f"the next, {second.title}")
    else:
        base = next((row for row in home.rows if row.role == "base" and row is not best), None)
        sentence += _against(best, base, "its base model") if base else ""
    caveats = [*_doubts(best), *_limits(best, home)]
    doubted = [row.title for row in peers if not _is_believable(row)]
    if _is_believable(best) and doubted:
        caveats.append(f"Not ranked, since a check has failed: {', '.join(doubted)}.")
    if len(peers) < len(measured):
        caveats.append(
            "The runs were measured under different threat models or attacks. Only those that share them are ranked: "
            + ", ".join(row.title for row in peers) + "."
        )  # fmt: skip
    elif any(not comparable(best, row) for row in peers):
        caveats.append("The runs were not measured on the same samples: compare intervals, not images.")
    if _guesses(best):
        caveats.insert(0, "Under attack the model is right no more often than a guess among its classes would be.")
    return Verdict(sentence, caveats, _light(best, home))


def _light(row: Measured, source: Source) -> str:
    statuses = {check["status"] for check in lights(row.results.get("diagnostics"))}
    if "failed" in statuses or _guesses(row):
        return "failed"
    broken = broken_later(row, later) if (later := _later(row, source)) else None
    if statuses or broken:
        return "warning"
    return "ok" if findings(row) else "none"


def _guesses(row: Measured) -> bool:
    """Whether its robust accuracy cannot be told from guessing; a single class cannot be guessed wrongly."""
    classes = row.results.get("per_class")
    count = len(classes) if isinstance(classes, list) else 0
    return row.worst is not None and row.worst.low <= (1 / count if count > 1 else 0.0)


def _later(row: Measured, source: Source) -> list[Measured]:
    return [other for other in source.further if row.deployed and repeats(row, other)]


def _is_believable(row: Measured) -> bool:
    return believable(lights(row.results.get("diagnostics")))


def _met(row: Measured) -> tuple[str, frozenset[str]]:
    """Threat model and attacks of which every classifier can face all: what must be the same for two to be ranked."""
    return json.dumps(row.threat, sort_keys=True, default=str), frozenset(row.common_attacks)


def _named_attacks(rows: Sequence[Measured]) -> str:
    """All attacks of classifiers that met the same, and which of them only merged heads can face."""
    every = list(dict.fromkeys(name for row in rows for name in row.attacks))
    common = {name for row in rows for name in row.common_attacks}
    return ", ".join(name if name in common else f"{name} (merged heads alone)" for name in every)


def _last(source: Source) -> Measured | None:
    return source.rows[-1] if source.rows else None


def _robust(row: Measured) -> float:
    return row.worst.value if row.worst else 0.0


def _unmeasured(sources: Sequence[Source]) -> Verdict:
    rows = [(row, source) for source in sources if (row := source.deployed or _last(source))]
    if rows:
        seen = {_light(row, source) for row, source in rows}
        light = next((light for light in ("failed", "warning") if light in seen), "none")
        sentence = "No attack has been run on test images. " + " ".join(_without_attack(row) for row, _ in rows)
        return Verdict(sentence, [doubt for row, _ in rows for doubt in _doubts(row)], light)
    told = []
    for source in sources:
        trained = [stage for stage in source.stages if best_line(source.lines(stage["name"]))]
        line = best_line(source.lines(trained[-1]["name"])) if trained else None
        if line is not None:
            told.append(
                f"{source.label}: stage {line['stage']} reached {percent(line['validation_robust'])} % robust and "
                f"{percent(line['validation_clean'])} % clean accuracy on held-out training images (epoch "
                f"{line['epoch']}); this chose the checkpoint and is no test result."
            )
    return Verdict("Nothing has been measured on test images yet.", told)


def _without_attack(row: Measured) -> str:
    clean = row.clean
    return (
        f"Without one, {row.title} gets {percent(clean.value)} % right (95 % interval {percent(clean.low)} to "
        f"{percent(clean.high)})."
    )


def _result(row: Measured) -> str:
    worst = row.worst
    assert worst is not None
    images = f"{row.num_samples:,} test images" if row.num_samples else "the test images"
    attack = row.attacks[0] if len(row.attacks) == 1 else f"the worst of {len(row.attacks)} attacks"
    return (
        f"Under {attack} ({threat_text(row.threat)}), {row.title} still gets {percent(worst.value)} % of {images} "
        f"right (95 % interval {percent(worst.low)} to {percent(worst.high)}), and {percent(row.clean.value)} % "
        "without attack."
    )


def _against(row: Measured, other: Measured, called: str) -> str:
    found = difference(row, other, "worst")
    if found is None:
        return f" Under attack, {called} keeps {percent(_robust(other))} %."
    interval = "(interval {} to {})".format(*map(points, found.interval))
    if found.difference == 0:
        return f" Under attack that is as much as {called} {interval}."
    size = points(abs(found.difference)).lstrip("+")
    size = f"{size} points {'less' if found.difference < 0 else 'more'} than {called} {interval}"
    decided = (
        "too little to tell from chance" if found.verdict == "undecided" else "more than the images' choice explains"
    )
    return f" Under attack that is {size}, {decided}."


def findings(row: Measured) -> list[Mapping[str, Any]]:
    """The diagnostics of an evaluation, each check once; one that was made twice counts at its worst."""
    found = row.results.get("diagnostics")
    entries: dict[str, Mapping[str, Any]] = {}
    for entry in found if isinstance(found, list) else []:
        if isinstance(entry, Mapping) and "name" in entry:
            before = entries.setdefault(str(entry["name"]), entry)
            if _badness(entry) > _badness(before):
                entries[str(entry["name"])] = entry
    return list(entries.values())


def _badness(check: Mapping[str, Any]) -> int:
    return {"ok": 0, "failed": 2}.get(str(check.get("status")), 1)


def _doubts(row: Measured) -> list[str]:
    words = {"failed": "This result cannot be believed", "warning": "Take care"}
    told = lights(row.results.get("diagnostics"))
    return [f"{words[check['status']]}: {check['message']}." for check in told if check["status"] in words]


def _limits(row: Measured, source: Source) -> list[str]:
    """Name the limits of the number: later measurements, and attacks that were not tried."""
    later = _later(row, source)
    breaking = [other for other in later if broken_later(row, [other])]
    told = []
    found = breaking and (broken_later(row, breaking) or broken_later(row, breaking := breaking[:1]))
    if found:
        fooled, robust, shared = found
        named = ", ".join(dict.fromkeys(attack for other in breaking for attack in other.attacks))
        told.append(
            f"Measured later: {named} fooled {fooled:,} of the {robust:,} images that count as robust here. Of the "
            f"{shared:,} images that all attacks met, {percent((robust - fooled) / shared)} % withstand all; "
            "trust that number."
        )
    faced = list(dict.fromkeys(attack for each in (row, *later) for attack in each.attacks))
    under = [name.partition("@") for name in faced]  # under one of several threats it is ATTACK@THREAT
    if any(not STANDARD & {name for name, _, at in under if at == threat} for _, _, threat in under):
        told.append(
            f"Attacked by {', '.join(faced)} only. Robust accuracy is an upper bound: a stronger attack, such as "
            "AutoAttack, finds as many adversarial examples or more."
        )
    return told


# ---- rows that are one model


def once(source: Source) -> Source:
    """A source with each model in one row, such as head 1 that later stages leave as the base model was.

    Two rows are one model if they cost the same to train and all that is stored of their images is equal, margins but
    for rounding; what is deployed stays, and the names of both stand in its row.
    """
    kept: list[Measured] = []
    for row in source.rows:
        twin = next((number for number, other in enumerate(kept) if _one_model(other, row)), None)
        if twin is None:
            kept.append(row)
            continue
        stays, goes = (row, kept[twin]) if row.deployed else (kept[twin], row)
        kept[twin] = replace(stays, name=f"{stays.name} = {goes.name}", title=f"{stays.title} = {goes.name}")
    return replace(source, rows=sorted(kept, key=lambda row: row.deployed))


def _one_model(first: Measured, second: Measured) -> bool:
    a, b = first.samples, second.samples
    told = any(name.startswith("margin_") for name in a)
    return (
        told
        and (first.threat, first.parameters, first.flops) == (second.threat, second.parameters, second.flops)
        and a.keys() == b.keys()
        and all(a[key].shape == b[key].shape and bool(np.all(_same(a[key], b[key]))) for key in a)
    )


def _same(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    return np.isclose(a, b, ROUNDING, ROUNDING, equal_nan=True) if a.dtype.kind == "f" else np.asarray(a == b)


# ---- figures and tables


def accuracy_figures(sources: Sequence[Source]) -> list[Figure]:
    """Bars of clean accuracy and of robust accuracy for each attack and threat model."""
    panels: dict[str, list[Entry]] = {}
    for row in _rows(sources):
        panels.setdefault("Clean accuracy", []).append((row, row.clean))
        for attack in row.attacks:
            panels.setdefault(f"Under {attack}, {threat_text(row.threat)}", []).append((row, row.robust[attack]))
    for rows in _groups(sources):
        if any(len(row.attacks) > 1 for row in rows):
            title = f"Under the worst of {_named_attacks(rows)}, {threat_text(rows[0].threat)}"
            panels[title] = [(row, row.worst) for row in rows if row.worst]
    return [bars(title, entries) for title, entries in panels.items()]


def _rows(sources: Sequence[Source]) -> Iterator[Measured]:
    for source in sources:
        yield from source.rows


def _groups(sources: Sequence[Source]) -> list[list[Measured]]:
    """Classifiers that were attacked, by what they met."""
    groups: dict[tuple[str, frozenset[str]], list[Measured]] = {}
    for row in _rows(sources):
        if row.worst:
            groups.setdefault(_met(row), []).append(row)
    return list(groups.values())


def trade_offs(sources: Sequence[Source]) -> list[Figure]:
    """Clean against robust accuracy, a figure for each group that met the same threat model and attacks."""
    return [
        scatter(
            f"Clean against robust accuracy, {_named_attacks(rows)}, {threat_text(rows[0].threat)}",
            [(row, row.worst) for row in rows if row.worst],
        )
        for rows in _groups(sources)
        if len(rows) > 1
    ]


def eps_figures(sources: Sequence[Source]) -> list[Figure]:
    """Robust accuracy over eps, a figure for each norm or other threat."""
    groups: dict[str, list[Series]] = {}
    for source in sources:
        for row in [*source.rows, *source.further]:
            curve = _curve(row)
            if len(curve) > 1 and row.threat:
                series = groups.setdefault(threat_name(row.threat), [])
                attacked = f"{_called(source, row)}, {', '.join(row.attacks)}"
                series.append(
                    Series(
                        attacked,
                        SERIES[len(series) % len(SERIES)],
                        [(eps, estimate.value) for eps, estimate in curve],
                        [(estimate.low, estimate.high) for _, estimate in curve],
                    )
                )
    figures = []
    for norm, series in groups.items():
        radii = sorted({x for entry in series for x, _ in entry.points})
        marked = radii if len(radii) <= 7 else radii[:: -(-len(radii) // 6)]
        told = "; ".join(
            f"{entry.name}: " + ", ".join(f"{x:g} {percent(y)}" for x, y in entry.points) for entry in series
        )
        figures.append(
            lines(
                f"robustness-over-eps-{norm}", f"Accuracy over eps, {norm}, percent", series, x_label=f"eps ({norm})",
                share=True, describe=told, x_ticks=list(zip(marked, eps_texts(marked, norm), strict=True)),
                caption="The shade is the 95 % interval. A curve that does not fall to zero at large eps, or that "
                "rises, is a sign of an attack that fails.",
            )
        )  # fmt: skip
    return figures


def _called(source: Source, row: Measured) -> str:
    """Return the label of a curve: for a later evaluation the output that it fits, not the name of its folder."""
    known = sorted(source.rows, key=lambda known: not known.deployed)
    return next((other.title for other in known if other is row or same_model(other, row)), row.title)


def _curve(row: Measured) -> list[tuple[float, Estimate]]:
    try:
        return [
            (float(p["eps"]), Estimate(float(p["robust_accuracy"]["worst"]), *map(float, p["intervals"]["worst"])))
            for p in row.results.get("curve", [])
        ]
    except (KeyError, TypeError, ValueError):
        return []


def accuracy_table(rows: Sequence[Measured]) -> Table:
    """Every number of the comparison; what is the same for all of them is left to `conditions`."""
    told = {"model": [Cell(row.title) for row in rows]}
    if not conditions(rows):
        told["threat model"] = [Cell(threat_text(row.threat)) for row in rows]
        told["images"] = [Cell(large(row.num_samples), row.num_samples) for row in rows]
    return page_table(told, accuracy_columns([described(row) for row in rows]))


def changed_tables(rows: Sequence[Measured]) -> dict[str, Table]:
    """Return accuracies on changed images by kind, the mean over levels: under a title for people.

    Classifiers that one measurement showed other images, as those of another size, have a table for each.
    """
    tables = {}
    titles = [{name: measured_title(measured_in(row.results)[name]) for name in row.worn} for row in rows]
    for name, title in dict.fromkeys(pair for told in titles for pair in told.items()):
        known = [row for row, told in zip(rows, titles, strict=True) if told.get(name) == title]
        found = [row.worn_kinds(name) for row in known]
        cells = [
            [Cell(kind.replace("_", " ")), *(estimate_cell(each.get(kind)) for each in found)]
            for kind in dict.fromkeys(kind for each in found for kind in each)
        ]
        if cells:
            tables[title] = Table(["kind", *(f"{row.title} %" for row in known)], cells)
    return tables


def conditions(rows: Sequence[Measured]) -> str:
    """Threat model and number of images, if all classifiers share them; else nothing."""
    met = {(threat_text(row.threat), row.num_samples) for row in rows}
    if len(met) != 1:
        return ""
    threat, count = met.pop()
    return threat if count is None else f"{threat}, {count:,} test images"


def cost_table(rows: Sequence[Measured]) -> Table:
    """Parameters and what training cost, of the classifiers for which it is recorded, in one unit for all of them."""
    unit = cost_unit((row.flops, row.forward_equivalents) for row in rows)
    first = next((row for row in rows if row.flops), None)
    cells = [
        [
            Cell(row.title),
            Cell(large(row.parameters), row.parameters),
            *([Cell(times_text(times) if (times := _times(row, first)) else "n/a", times or -1.0)] if first else []),
            Cell(large(cost := _cost(row, unit)), cost),
            Cell(duration(row.training_seconds), row.training_seconds),
        ]
        for row in rows
        if row.forward_equivalents is not None
    ]
    multiples = ["training cost"] if first else []
    return Table(["model", "parameters", *multiples, "in forward passes", "training time"], cells)


def cost_unit(costs: Iterable[tuple[float | None, float | None]]) -> float | None:
    """Return the floating-point operations of a forward pass of an image through the first base model that says so.

    Args:
        costs: of each classifier's training, in floating-point operations and in forward passes of its own base model.

    Returns:
        More than 0; None if no classifier has both recorded.
    """
    return next((flops / passes for flops, passes in costs if flops and passes), None)


def _cost(row: Measured, unit: float | None) -> float | None:
    """Return the cost of training in a unit; in forward passes of its own base model if operations are not recorded."""
    return row.flops / unit if row.flops is not None and unit else row.forward_equivalents


def difference_table(sources: Sequence[Source]) -> Table:
    """Paired differences, with the training cost of each model as a multiple of the other's where both are known.

    Results of runs come first: a few runs each with each, those of the most equal cost in front; each of many runs with
    the first. Then each row of a run with its base model.
    """
    deployed = [row for source in sources if (row := source.deployed)]
    if len(deployed) <= FEW_RUNS:
        pairs = sorted(((b, a) for a, b in combinations(deployed, 2)), key=_inequality)
    else:
        pairs = [(row, deployed[0]) for row in deployed[1:]]
    for source in sources:
        base = next((row for row in source.rows if row.role == "base"), None)
        pairs += [(row, base) for row in source.rows if base and row is not base]
    told = any(_times(*pair) for pair in pairs)
    measured = list(dict.fromkeys(name for pair in pairs for name in pair[0].worn if name in pair[1].worn))
    worn = [{name: found for name in measured if (found := worn_difference(*pair, name))} for pair in pairs]
    measured = [name for name in measured if any(name in found for found in worn)]
    cells = []
    for number, (row, other) in enumerate(pairs):
        clean, robust = difference(row, other, "clean"), difference(row, other, "worst")
        if clean and robust:
            times = _times(row, other)
            cost = [Cell(times_text(times) if times else "n/a", times or -1.0)] if told else []
            differences = [_difference_cell(clean), _difference_cell(robust)]
            changed = worn[number]
            differences += [_difference_cell(changed[n]) if n in changed else MISSING for n in measured]
            cells.append([Cell(row.title), Cell(other.title), *differences, *cost])
    costs = ["training cost"] if told else []
    more = [f"{name}, points" for name in measured]
    return Table(["model", "compared with", "clean, points", "robust, points", *more, *costs], cells)


def _times(row: Measured, other: Measured) -> float | None:
    """Training cost of a row as a multiple of another's; None where either is not recorded."""
    return row.flops / other.flops if row.flops and other.flops else None


def _inequality(pair: tuple[Measured, Measured]) -> float:
    times = _times(*pair)
    return math.inf if times is None else abs(math.log(times))


def _difference_cell(found: Paired) -> Cell:
    words = {"gain": "more", "loss": "less", "undecided": "undecided"}[found.verdict]
    low, high = map(points, found.interval)
    return Cell(points(found.difference), found.difference, f"[{low}, {high}] {words}")


# ---- downloads


def as_records(rows: Sequence[Measured]) -> list[dict[str, Any]]:
    """The numbers of the comparison, a flat record for each classifier; fractions, not percent."""
    records = []
    for row in rows:
        record: dict[str, Any] = {
            "run": row.run, "model": row.name, "norm": threat_name(row.threat) if row.threat else None,
            "eps": row.threat.get("eps") if row.threat else None, "num_samples": row.num_samples,
        }  # fmt: skip
        for name, value in {"clean": row.clean, **row.robust, **row.worn}.items():
            record |= {name: value.value, f"{name} low": value.low, f"{name} high": value.high}
        record |= {
            "parameters": row.parameters,
            "training_flops": row.flops,
            "training_forward_equivalents": row.forward_equivalents,
            "training_seconds": row.training_seconds,
        }
        records.append(record)
    return records


def as_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as comma-separated values."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def download(kind: str, text: str) -> str:
    """A data URI that a browser saves as a file."""
    return f"data:{kind};base64,{base64.b64encode(text.encode('utf-8', 'replace')).decode()}"


def downloads(rows: Sequence[Measured]) -> dict[str, str]:
    """File names and data URIs of the comparison's numbers."""
    records = as_records(rows)
    return {
        "results.csv": download("text/csv", as_csv(records)),
        "results.json": download("application/json", json.dumps(records, indent=2)),
    }


# ---- recipes


def recipe_differences(sources: Sequence[Source]) -> Table | None:
    """The keys in which the recipes of several runs differ; None for fewer than two recipes."""
    runs = [source for source in sources if source.recipe]
    if len(runs) < 2:
        return None
    flat = [dict(_flat(source.recipe, "")) for source in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    different = [key for key in keys if len({values.get(key, "-") for values in flat}) > 1]
    rows = [[Cell(key), *(Cell(values.get(key, "-")) for values in flat)] for key in different[:MOST_DIFFERENCES]]
    if len(different) > MOST_DIFFERENCES:
        rows.append([Cell(f"and {len(different) - MOST_DIFFERENCES} more"), *(Cell("") for _ in flat)])
    return Table(["key", *(source.label for source in runs)], rows)


def _flat(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Dotted keys and values; stages go by their names."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value and all(isinstance(inner, Mapping) for inner in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{key}.{inner.get('name', number)}")
    else:
        yield key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
