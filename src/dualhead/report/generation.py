"""The report's section on samples, and on images out of distribution."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dualhead.report.figures import SERIES, Figure, Series, lines
from dualhead.report.gallery import picture, sheet
from dualhead.report.sources import Measured
from dualhead.report.table import Cell, Table
from dualhead.report.text import threat_text

PICTURES: Final = "generation.npz"
OTHERS: Final = "ood.npz"
ROWS: Final = (
    ("Frechet distance", "frechet_distance", "{:.3g}"),
    ("kernel distance", "kernel_distance", "{:.3g}"),
    ("classification accuracy score", "classification_accuracy_score", "{:.1%}"),
    ("precision", "precision", "{:.2f}"),
    ("recall", "recall", "{:.2f}"),
    ("density", "density", "{:.2f}"),
    ("coverage", "coverage", "{:.2f}"),
)
"""Measures of samples that training images have too: name, key and form."""
BINS: Final = 40


@dataclass(frozen=True)
class Sheet:
    """A picture of many images.

    Args:
        title: above it.
        caption: its content.
        data: data URI.
    """

    title: str
    caption: str
    data: str


@dataclass(frozen=True)
class Samples:
    """Section of the page on one evaluation's samples and on images out of distribution.

    Args:
        name: of the classifier.
        lead: how samples were drawn and judged; empty where there are none.
        measures: against test images, beside training images.
        others: AUROC by source and score.
        others_lead: what was attacked, and how.
        checks: observations that are not fine.
        figures: quality over steps, and energies.
        sheets: pictures.
    """

    name: str
    lead: str
    measures: Table | None
    others: Table | None
    others_lead: str
    checks: list[str]
    figures: list[Figure]
    sheets: list[Sheet] = field(repr=False)


def samples(measured: Sequence[Measured], notes: list[str]) -> list[Samples]:
    """Return a section for each evaluation that has samples or images out of distribution.

    Args:
        measured: the evaluations.
        notes: told what cannot be read.
    """
    found = []
    for row in measured:
        told, others = row.results.get("generation"), row.results.get("ood")
        if not (told or others):
            continue
        try:
            pictures = _arrays(row.folder, PICTURES) if told else {}
            outside = _arrays(row.folder, OTHERS) if others else {}
            found.append(_section(row, told or {}, others or {}, pictures, outside))
        except (OSError, KeyError, TypeError, ValueError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error):
            notes.append(f"{row.name}: its samples cannot be read; they are left out.")
    return found


def _section(
    row: Measured,
    told: Mapping[str, Any],
    others: Mapping[str, Any],
    pictures: Mapping[str, NDArray[Any]],
    outside: Mapping[str, NDArray[Any]],
) -> Samples:
    figures = [_quality(told)] if told else []
    if pictures:
        figures.append(_energies(pictures, outside))
    return Samples(
        name=row.name,
        lead=_lead(told) if told else "",
        measures=measure_table(told) if told else None,
        others=ood_table(others) if others else None,
        others_lead=(
            f"{others['test_images']} test images against others; attacked: {others['attack']}, "
            f"{threat_text(others['threat'])}" if others else ""
        ),
        checks=[str(each["message"]) for each in told.get("checks", []) if each["status"] != "ok"],
        figures=figures,
        sheets=_sheets(told, pictures) if pictures else [],
    )  # fmt: skip


def _lead(told: Mapping[str, Any]) -> str:
    judge = told["judge"]
    return (
        f"{told['samples']:,} samples of all classes in turn, {told['steps']} steps of {told['step_size']:g} from "
        f"seeds ({told['seeds']}); the number of steps{_checkpoint(told)} chosen on {told['chosen_on']}. A sample "
        f"costs {told['passes']['forward']} forward and as many backward passes. The judge is {judge_name(judge)}"
        + (f", trained apart on {judge['training_images']:,} images" if "training_images" in judge else ", as given")
        + f", {judge['accuracy']:.1%} right on test images; distances can be compared only under the same judge and as "
        "many samples."
    )


def judge_name(judge: Mapping[str, Any]) -> str:
    """Return what people read for a judge: its backbone, or the name of the folder that was given, and its digest."""
    return f"{judge['backbone'] if 'backbone' in judge else Path(judge['folder']).name} ({judge['digest']})"


def _checkpoint(told: Mapping[str, Any]) -> str:
    """Return the words for what held-out images chose beside the steps, and the verb."""
    checkpoint = told.get("checkpoint")
    return f" and the checkpoint ({checkpoint['chosen']}) were" if checkpoint else " was"


def measure_table(told: Mapping[str, Any]) -> Table:
    """Return the measures of samples, beside those of as many training images."""
    near = told["nearest"]
    rows = [[Cell(name), _cell(told, key, form), _cell(told["floor"], key, form)] for name, key, form in ROWS]
    alone = (
        ("distance to nearest training image", f"{near['samples']:.3g}", f"test images: {near['test']:.3g}"),
        ("diversity within classes, of that of test images", f"{told['diversity']:.2f}", ""),
        ("judge names the class", f"{told['judge_agreement']:.1%}", ""),
    )
    rows += [[Cell(name), Cell(value, note=note), Cell("-")] for name, value, note in alone]
    return Table(["against test images", "samples", "training images"], rows)


def _cell(told: Mapping[str, Any], key: str, form: str) -> Cell:
    ends = told.get(f"{key}_interval")
    note = f"[{form.format(ends[0])}, {form.format(ends[1])}]" if ends else ""
    return Cell(form.format(told[key]), float(told[key]), note)


def ood_table(told: Mapping[str, Any]) -> Table:
    """Return AUROCs by source and score, clean and attacked."""
    rows = []
    for source, found in told["sources"].items():
        for score, each in found["scores"].items():
            cells = [
                Cell(
                    f"{each[f'auroc{end}']:.3f}",
                    each[f"auroc{end}"],
                    "[{:.3f}, {:.3f}]".format(*each[f"interval{end}"]),
                )
                for end in ("", "_attacked")
            ]
            rows.append([Cell(f"{source} ({found['images']})"), Cell(score), *cells])
    return Table(["images", "score", "AUROC", "AUROC, attacked"], rows)


def _quality(told: Mapping[str, Any]) -> Figure:
    curve = [point for point in told["curve"] if point["steps"] > 0] or told["curve"]
    series = [
        Series("samples, test images", "series1", [(p["steps"], p["test"]) for p in curve]),
        Series("samples, held-out images", "series2", [(p["steps"], p["held_out"]) for p in curve]),
        Series("training images", "series4", [(p["steps"], told["floor"]["frechet_distance"]) for p in curve]),
    ]
    return lines(
        "quality-over-steps", "Frechet distance over steps", series, x_label="steps of the ascent",
        marks=[(told["steps"], "chosen")],
        caption="Held-out images choose the number of steps; the floor is that of as many training images.",
        describe="; ".join(f"{p['steps']} steps: {p['test']:.3g}" for p in curve),
    )  # fmt: skip


def _energies(pictures: Mapping[str, NDArray[Any]], outside: Mapping[str, NDArray[Any]]) -> Figure:
    named = [(key.removeprefix("energy_"), values) for key, values in pictures.items() if key.startswith("energy_")]
    named += [(str(name), outside[f"energy_{place}"]) for place, name in enumerate(outside.get("sources", ()))][:2]
    finite = [(name, values[np.isfinite(values)]) for name, values in named]
    every = np.concatenate([values for _, values in finite])
    edges = np.histogram_bin_edges(every, BINS)
    middles = (edges[:-1] + edges[1:]) / 2
    series = [
        Series(
            name,
            style,
            [
                (float(x), float(y))
                for x, y in zip(middles, np.histogram(values, edges)[0] / max(1, len(values)), strict=True)
            ],
        )
        for (name, values), style in zip(finite, SERIES, strict=False)
    ]
    return lines(
        "energies", "Energies", series, x_label="marginal energy, -log sum exp of the logits",
        caption="Share of images in each bin. Low is what the classifier takes for an image; it is no likelihood.",
        describe="; ".join(f"{name}: mean {values.mean():.3g}" for name, values in finite if len(values)),
    )  # fmt: skip


def _sheets(told: Mapping[str, Any], pictures: Mapping[str, NDArray[Any]]) -> list[Sheet]:
    steps = ", ".join(map(str, pictures["strip_steps"].tolist()))
    given = (
        ("Samples by class", "A row a class, the first samples of each, none chosen.", pictures["sheet"]),
        ("From seed to sample", f"A row a class; after {steps} steps.", pictures["strip"]),
        ("Nearest training images", "A sample of each class, then the training images nearest to it.",
         pictures["neighbours"]),
    )  # fmt: skip
    del told
    return [
        Sheet(title, caption, picture(sheet(images))) for title, caption, images in given if images.shape[2] in (1, 3)
    ]


def _arrays(folder: Path | None, name: str) -> dict[str, NDArray[Any]]:
    if folder is None or not (folder / name).is_file():
        return {}
    with np.load(folder / name) as stored:
        return {key: stored[key] for key in stored.files}
