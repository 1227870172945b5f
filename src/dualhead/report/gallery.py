"""Images under attack, and what each output of the model says of them."""

from __future__ import annotations

import base64
import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualhead.names import name_of, read_id
from dualhead.report import landscape
from dualhead.report.figures import Figure
from dualhead.report.sources import Measured, role_of
from dualhead.report.table import Cell, Table
from dualhead.report.text import eps_texts, percent
from dualhead.system.files import write_atomically

MOST_EXAMPLES = 500
MOST_BYTES = 3_600_000
"""Most bytes of all pictures of a page, as text."""

NO_CLASS = "no class"
"""Prediction of an output whose logits are not numbers."""

Bytes = NDArray[np.uint8]


def outcomes(heads: int, merged: str) -> dict[str, str]:
    """Return the choices of examples: a sign for each output, * for either, | for or; and their meanings.

    Args:
        heads: in front of what merges them; 0 for a model that is one output.
        merged: what the page calls that.
    """
    if not heads:
        return {"+": "withstands", "-": "is fooled"}
    every = range(heads)

    def signs(chosen: Mapping[int, str], last: str = "*") -> str:
        return "".join(chosen.get(head, "*") for head in every) + last

    return {
        signs({}, "+"): f"{merged} holds",
        signs({}, "-"): f"{merged} fails",
        **{signs({head: "-"}, "+"): f"head {head + 1} fails, {merged} holds" for head in every},
        signs(dict.fromkeys(every, "-"), "+"): f"{'both' if heads == 2 else 'all'} heads fail, {merged} holds",
        "|".join(signs({head: "+"}, "-") for head in every): f"a head holds, {merged} fails",
        "|".join(
            signs({a: "+", b: "-"}) for a in every for b in every if a != b
        ): "the heads disagree on what is right",
        "+" * (heads + 1): "all hold",
        "-" * (heads + 1): "all fail",
    }


@dataclass(frozen=True)
class Opinion:
    """Answer of an output to an image.

    Args:
        output: its name.
        role: its colour.
        predicted: name of the class.
        probability: of that class, in [0, 1].
        of_label: probability of the label.
        right: whether it says the label.
        unharmed: probability of the label on the clean image.
    """

    output: str
    role: str
    predicted: str
    probability: float
    of_label: float
    right: bool
    unharmed: float


@dataclass(frozen=True)
class Example:
    """One image, as the page shows it before anybody has moved anything.

    Args:
        sample: its name.
        label: name of its class.
        clean: data URI.
        change: data URI of the perturbation, scaled; empty where the attack changed nothing.
        scale: how many grey levels stand for one level of change.
        opinions: of the outputs on the attacked image.
    """

    sample: int
    label: str
    clean: str
    change: str
    scale: int
    opinions: list[Opinion]


@dataclass(frozen=True)
class Gallery:
    """Images that one attack changed, against one model.

    Args:
        title: model, attack and norm.
        examples: those that are shown.
        total: how many there are.
        labels: names of the classes that occur.
        outcomes: pattern and words of what they can be chosen by.
        targets: number and name of the outputs that were attacked, the one that is shown first in front.
        steps: number and words of the budgets, clean images first.
        data: what moving the controls shows, for the script.
        transfer: how often each output is right under the attack on each.
        margins: what the attack does to the logits of both heads; None where there are no two heads.
        landscapes: margins around some of the images.
        note: what is not shown, and why.
    """

    title: str
    examples: list[Example]
    total: int
    labels: list[str]
    outcomes: Mapping[str, str]
    targets: list[tuple[int, str]]
    steps: list[tuple[int, str]]
    data: Mapping[str, Any] = field(repr=False)
    transfer: Table
    margins: Figure | None
    landscapes: list[Figure]
    note: str


class Album:
    """Makes galleries until the page is full."""

    def __init__(self) -> None:
        self._bytes, self._examples = MOST_BYTES, MOST_EXAMPLES

    def galleries(self, measured: Measured, names: Mapping[int, str], notes: list[str]) -> list[Gallery]:
        """The gallery of a classifier, as a list of one; of none if none is stored.

        Args:
            measured: the classifier.
            names: of the classes.
            notes: told what cannot be read.
        """
        if measured.gallery is None:
            return []
        try:
            arrays = read(measured.gallery)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            notes.append(f"{measured.name}: its gallery cannot be shown: {error}")
            return []
        if not len(arrays["label"]) or not self._examples:
            return []
        gallery = self._gallery(measured, arrays, names)
        if not gallery.examples:
            notes.append(f"{measured.name}: its gallery is left out, since the page is full; make a report of it alone")
        return [gallery] if gallery.examples else []

    def _gallery(self, measured: Measured, arrays: Mapping[str, NDArray[Any]], names: Mapping[int, str]) -> Gallery:
        total, count = len(arrays["label"]), len(arrays["outputs"])
        rows = spread(total, self._examples)
        rows.sort(key=lambda row: arrays["clean_margin"][row, -1] <= 0)  # what is wrong anyway comes last
        clean = self._fitting([picture(arrays["original"][row]) for row in rows])
        rows = rows[: len(clean)]
        # What the final output faces comes first, its largest budget before smaller ones; then the heads.
        order = [(t, s) for t in (count - 1, *range(count - 1)) for s in reversed(range(len(arrays["eps"])))]
        pictured: dict[tuple[int, int], list[tuple[str, int]]] = {}
        for target, step in order:
            made = [change(arrays["original"][r], arrays["adversarial"][target, step, r]) for r in rows]
            size = sum(len(data) for data, _ in made)
            if pictured and size > self._bytes:
                break
            pictured[target, step] = made
            self._bytes -= size
        self._examples -= len(rows)
        first = order[0]
        called = [name_of(read_id(str(output))) for output in arrays["outputs"]]
        said = {key: _opinions(arrays, key, rows, names) for key in (None, *pictured)}
        labels = [names.get(int(arrays["label"][row]), str(arrays["label"][row])) for row in rows]
        steps = sorted({step for _, step in pictured})
        radii = [float(arrays["eps"][step]) for step in steps]
        examples = [
            Example(int(arrays["index"][row]), labels[n], clean[n], *pictured[first][n], said[first][n])
            for n, row in enumerate(rows)
        ]
        return Gallery(
            title=f"{measured.title}, {arrays['attack']}, {arrays['norm']}",
            examples=examples,
            total=total,
            labels=sorted(set(labels)),
            outcomes=outcomes(count - 1, called[-1]),
            targets=[(t, called[t]) for t in dict.fromkeys(target for target, _ in pictured)],
            steps=[(-1, "0 (clean)"), *zip(steps, eps_texts(radii, str(arrays["norm"])), strict=True)],
            data={
                "first": f"{first[0]},{first[1]}",
                "said": {
                    "clean" if key is None else f"{key[0]},{key[1]}": [[_plain(o) for o in row] for row in opinions]
                    for key, opinions in said.items()
                },
                "changes": {f"{t},{s}": made for (t, s), made in pictured.items() if (t, s) != first},
            },
            transfer=_transfer(arrays, called),
            margins=landscape.margins(arrays, called) if count == 3 else None,
            landscapes=landscape.landscapes(arrays, called, names),
            note=_note(len(rows), total, len(pictured), len(order)),
        )

    def _fitting(self, pictures: list[str]) -> list[str]:
        """As many of the pictures as leave room for as many perturbations."""
        room, kept = self._bytes // 2, 0
        while kept < len(pictures) and len(pictures[kept]) <= room:
            room -= len(pictures[kept])
            kept += 1
        self._bytes -= sum(map(len, pictures[:kept]))
        return pictures[:kept]


def read(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a gallery.

    Raises:
        ValueError: if they do not fit one another.
        KeyError: if one is missing.
    """
    with np.load(path) as stored:
        held = {name: stored[name] for name in stored.files}
    images = held["original"]
    outputs, steps, count = len(held["outputs"]), len(held["eps"]), len(images)
    shapes = {
        "adversarial": (outputs, steps, *images.shape),
        "clean_prediction": (count, outputs),
        "clean_probability": (count, outputs, 2),
        "clean_margin": (count, outputs),
        "prediction": (outputs, steps, count, outputs),
        "probability": (outputs, steps, count, outputs, 2),
        "margin": (outputs, steps, count, outputs),
        "index": (count,),
        "label": (count,),
    }
    wrong = [name for name, shape in shapes.items() if held[name].shape != shape]
    if wrong or images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != np.uint8:
        raise ValueError(f"{', '.join(wrong) or 'original'} has a shape or type that does not fit")
    rows = held["landscape_rows"]
    if held["landscape"].shape[:2] != (len(rows), outputs) and len(rows):
        raise ValueError("landscape has a shape that does not fit")
    if len(rows) and not 0 <= rows.min() <= rows.max() < count:
        raise ValueError("landscapes are of samples that are not there")
    return held


def spread(count: int, most: int) -> list[int]:
    """Up to `most` of `count` positions, evenly spread, in order."""
    if count <= most:
        return list(range(count))
    return [position * count // most for position in range(most)]


def _opinions(
    arrays: Mapping[str, NDArray[Any]], key: tuple[int, int] | None, rows: Sequence[int], names: Mapping[int, str]
) -> list[list[Opinion]]:
    """Return the outputs' answers to the clean images, or to those of a target and budget."""
    where: tuple[int, ...] = () if key is None else key
    prefix = "clean_" if key is None else ""
    found = []
    for row in rows:
        label = int(arrays["label"][row])
        said = arrays[f"{prefix}prediction"][(*where, row)].tolist()
        # Where logits overflow there is no probability, and NaN is no JSON.
        shares = np.nan_to_num(arrays[f"{prefix}probability"][(*where, row)], nan=0.0).tolist()
        unharmed = np.nan_to_num(arrays["clean_probability"][row, :, 1], nan=0.0).tolist()
        found.append([
            Opinion(
                name_of(read_id(str(output))), role_of(read_id(str(output))),
                names.get(predicted, str(predicted)) if predicted >= 0 else NO_CLASS,
                round(share, 3), round(of_label, 3), predicted == label, round(before, 3),
            )
            for output, predicted, (share, of_label), before in zip(
                arrays["outputs"], said, shares, unharmed, strict=True
            )
        ])  # fmt: skip
    return found


def _plain(opinion: Opinion) -> list[Any]:
    return [opinion.predicted, opinion.probability, opinion.of_label, int(opinion.right)]


def _transfer(arrays: Mapping[str, NDArray[Any]], called: Sequence[str]) -> Table:
    right = arrays["margin"][:, -1] > 0
    clean = (arrays["clean_margin"] > 0).mean(0)
    rows = [[Cell("no attack"), *(Cell(percent(share), float(share)) for share in clean)]]
    rows += [
        [Cell(f"attack on {name}"), *(Cell(percent(share), float(share)) for share in right[target].mean(0))]
        for target, name in enumerate(called)
    ]
    return Table(["images", *(f"{name} %" for name in called)], rows)


def _note(shown: int, total: int, pictured: int, possible: int) -> str:
    notes = []
    if shown < total:
        notes.append(f"{shown} of {total} images are shown.")
    if pictured < possible:
        notes.append(
            f"To keep the page small, it holds {pictured} of {possible} combinations of attacked output and eps."
        )
    return " ".join(notes)


# ---- pictures


def picture(image: Bytes) -> str:
    """A data URI of an image uint8 [C, H, W] with one or three channels, without loss."""
    from PIL import Image

    stored = io.BytesIO()
    plain = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    plain.save(stored, "WEBP", lossless=True, quality=60, method=4)
    return "data:image/webp;base64," + base64.b64encode(stored.getvalue()).decode()


def change(clean: Bytes, attacked: Bytes) -> tuple[str, int]:
    """A picture of what an attack changed, grey where nothing, and how many grey levels stand for one; "" for nothing.

    A change of more than 127 levels is cut there.
    """
    levels = attacked.astype(np.int16) - clean
    largest = min(int(np.abs(levels).max()), 127)
    if largest == 0:
        return "", 1
    scale = 127 // largest
    return picture((128 + levels.clip(-127, 127) * scale).astype(np.uint8)), scale


def sheet(images: Bytes, side: int = 64) -> Bytes:
    """Return one picture uint8 [C, H', W'] of images uint8 [rows, columns, C, H, W], with gutters between them.

    Args:
        images: what is shown.
        side: images that are smaller are enlarged by whole pixels to at least so many.
    """
    rows, columns, channels, height, width = images.shape
    scale = max(1, -(-side // max(height, width)))
    large = images.repeat(scale, 3).repeat(scale, 4)
    gutter = 4
    high, wide = height * scale + gutter, width * scale + gutter
    page = np.full((channels, rows * high + gutter, columns * wide + gutter), 255, np.uint8)
    for row in range(rows):
        for column in range(columns):
            top, left = gutter + row * high, gutter + column * wide
            page[:, top : top + height * scale, left : left + width * scale] = large[row, column]
    return page


def save_sheet(images: Bytes, path: Path) -> None:
    """Write a PNG of images uint8 [rows, columns, C, H, W], enlarged by whole pixels, with gutters between them."""
    from PIL import Image

    page = sheet(images)
    plain = Image.fromarray(page[0] if len(page) == 1 else page.transpose(1, 2, 0))
    write_atomically(path, lambda aside: plain.save(aside, "PNG"))
