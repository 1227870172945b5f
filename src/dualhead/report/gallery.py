"""Adversarial examples as pictures."""

from __future__ import annotations

import base64
import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualhead.report.differences import comparable
from dualhead.report.sources import Measured
from dualhead.report.text import eps_text, percent, threat_text

MOST_EXAMPLES = 500
MOST_BYTES = 3_000_000
"""Of all pictures of a page, as text."""

Images = NDArray[np.float32]


@dataclass(frozen=True)
class Example:
    """One adversarial example.

    Args:
        sample: its index.
        label: name of its class.
        prediction: of the example; empty if it is not stored.
        pictures: words and data URIs: of the clean image and the perturbation, if they are stored, and of the example.
        facts: sample, distance, steps and margin, in words.
        holds: other classifiers and whether each withstood its own attack on this sample.
    """

    sample: int
    label: str
    prediction: str
    pictures: list[tuple[str, str]]
    facts: list[str]
    holds: list[tuple[str, bool]]


@dataclass(frozen=True)
class Gallery:
    """The examples that one attack found against one classifier.

    Args:
        title: classifier, attack and threat model.
        examples: those that are shown.
        found: how many there are.
        others: names of the classifiers that `Example.holds` speaks of.
        labels: names of the classes that occur.
        note: what is not shown, and why.
    """

    title: str
    examples: list[Example]
    found: int
    others: list[str]
    labels: list[str]
    note: str


class Album:
    """Makes galleries until the page is full."""

    def __init__(self) -> None:
        self._bytes, self._examples = MOST_BYTES, MOST_EXAMPLES

    def galleries(
        self, measured: Measured, others: Sequence[Measured], names: Mapping[int, str], notes: list[str]
    ) -> list[Gallery]:
        """The galleries of a classifier, one for each attack whose examples are stored.

        Args:
            measured: the classifier.
            others: classifiers of the same run, of which those under the same threat model are compared.
            names: of the classes.
            notes: told what cannot be read.
        """
        if measured.archive is None or not measured.samples:
            return []
        found = []
        for attack in measured.attacks:
            try:
                arrays = _arrays(measured, attack)
            except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, IndexError) as error:
                notes.append(f"{measured.name}: adversarial examples of {attack} cannot be shown: {error}")
                continue
            if arrays is not None and len(arrays["rows"]):
                found.append(self._gallery(measured, attack, arrays, _facing(measured, attack, others), names))
        return found

    def _gallery(
        self,
        measured: Measured,
        attack: str,
        arrays: Mapping[str, NDArray[Any]],
        others: Sequence[Measured],
        names: Mapping[int, str],
    ) -> Gallery:
        rows, examples = arrays["rows"], []
        for position in spread(len(rows), self._examples):
            pictures = _pictures(arrays, position)
            size = sum(len(data) for _, data in pictures)
            if size > self._bytes:
                break
            self._bytes -= size
            self._examples -= 1
            examples.append(_example(measured, attack, int(rows[position]), pictures, others, names))
        notes = [] if len(examples) == len(rows) else [f"{len(examples)} of {len(rows)} examples are shown."]
        if "original" not in arrays:
            notes.append("Clean images are not stored with this evaluation, so there is no perturbation to show.")
        if f"prediction_{attack}" not in measured.samples:
            notes.append("What the model takes each example for is not stored; it is a class other than the label.")
        title = f"{measured.title}, {attack}, {threat_text(measured.threat)}"
        labels = sorted({example.label for example in examples})
        return Gallery(title, examples, len(rows), [other.name for other in others], labels, " ".join(notes))


def spread(count: int, most: int) -> list[int]:
    """Up to `most` of `count` positions, evenly spread, in order."""
    if count <= most:
        return list(range(count))
    return [position * count // most for position in range(most)]


def _arrays(measured: Measured, attack: str) -> dict[str, NDArray[Any]] | None:
    """Adversarial examples [M, C, H, W], positions `rows` [M] and, if stored, the `original` images."""
    assert measured.archive is not None
    with np.load(measured.archive) as stored:
        if f"adversarial_{attack}" not in stored.files or f"adversarial_rows_{attack}" not in stored.files:
            return None
        held = {"adversarial": stored[f"adversarial_{attack}"], "rows": stored[f"adversarial_rows_{attack}"]}
        if f"original_{attack}" in stored.files:
            held["original"] = stored[f"original_{attack}"]
    images, rows = held["adversarial"], held["rows"]
    if images.ndim != 4 or rows.shape != images.shape[:1] or images.shape[1] not in (1, 3):
        raise ValueError(f"arrays of shapes {images.shape} and {rows.shape} are no images with their positions")
    if held.get("original", images).shape != images.shape:
        raise ValueError("there are not as many clean images as adversarial ones")
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(measured.samples["label"]):
        raise IndexError("positions beyond the samples")
    return held


def _facing(measured: Measured, attack: str, others: Sequence[Measured]) -> list[Measured]:
    """Those of the other classifiers that met the same attack on the same samples."""
    return [
        other
        for other in others
        if other is not measured and comparable(measured, other) and f"robust_{attack}" in other.samples
    ]


def _pictures(arrays: Mapping[str, NDArray[Any]], position: int) -> list[tuple[str, str]]:
    adversarial = _unit(arrays["adversarial"][position])
    if "original" not in arrays:
        return [("adversarial", picture(adversarial))]
    original = _unit(arrays["original"][position])
    change = adversarial - original
    largest = float(np.abs(change).max()) or 1.0
    shown = 0.5 + change / (2 * largest)
    scale = f"perturbation, scaled so that grey is none and the largest is {eps_text(round(largest, 6))}"
    return [("clean", picture(original)), (scale, picture(shown)), ("adversarial", picture(adversarial))]


def _unit(image: NDArray[Any]) -> Images:
    """An image [C, H, W] in [0, 1], as float32."""
    scale = 255.0 if image.dtype == np.uint8 else 1.0
    unit: Images = np.nan_to_num(np.asarray(image, np.float32) / np.float32(scale))
    return unit


def picture(image: Images) -> str:
    """A data URI of an image [C, H, W] in [0, 1], with one or three channels."""
    from PIL import Image

    levels = (image.clip(0.0, 1.0) * 255).round().astype(np.uint8)
    stored = io.BytesIO()
    Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)).save(stored, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stored.getvalue()).decode()


def _example(
    measured: Measured,
    attack: str,
    row: int,
    pictures: list[tuple[str, str]],
    others: Sequence[Measured],
    names: Mapping[int, str],
) -> Example:
    samples = measured.samples
    sample, label = int(samples["index"][row]), int(samples["label"][row])
    prediction = ""
    if f"prediction_{attack}" in samples:
        predicted = int(samples[f"prediction_{attack}"][row])
        prediction = names.get(predicted, str(predicted))
    facts = [f"sample {sample}"]
    for key, words in (("distance", "distance {:.3g}"), ("steps", "steps {}"), ("margin", "margin {:.2g}")):
        if f"{key}_{attack}" in samples:
            value = samples[f"{key}_{attack}"][row].item()
            if np.isfinite(value):
                facts.append(words.format(value))
    holds = []
    for other in others:
        where = int(np.flatnonzero(other.samples["index"] == sample)[0])
        holds.append((other.name, bool(other.samples[f"robust_{attack}"][where])))
    return Example(sample, names.get(label, str(label)), prediction, pictures, facts, holds)


def overview(gallery: Gallery) -> str:
    """How often the other classifiers hold where this one is fooled."""
    if not gallery.examples or not gallery.others:
        return ""
    counts = {name: sum(dict(example.holds)[name] for example in gallery.examples) for name in gallery.others}
    told = ", ".join(f"{name} {percent(count / len(gallery.examples), 0)} %" for name, count in counts.items())
    return f"Of these samples others withstood their own attack: {told}."
