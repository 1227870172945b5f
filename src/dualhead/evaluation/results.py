"""An evaluation's results: per sample in `samples.npz`, as numbers in `results.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualhead.errors import UserError
from dualhead.evaluation.journal import finite, write_arrays
from dualhead.report import evaluation_row, lights, rows_html, rows_text
from dualhead.statistics import wilson
from dualhead.system.files import write_json

PER_SAMPLE = ("distance", "part", "job", "steps", "margin", "prediction")
"""Arrays [N] in `samples.npz` for each attack, beside `robust`."""
MEASURED = "measured_"
"""Before the name of a measurement, the array [N, K, L] in `samples.npz` of which changed images are right."""


@dataclass
class Verdicts:
    """One attack's verdicts on the samples, in the order of the data.

    Attributes:
        robust: bool [N]: correct on the clean image, and not fooled.
        distance: float64 [N]: of the example that fooled it; NaN where none was found.
        part: int64 [N]: number of the attack's search that found it; -1 where none did.
        job: int64 [N]: which target or restart of that search; -1 where none did.
        steps: int64 [N]: how many steps that took, on an accelerator up to the next look, at every fifth; -1 where
            none was found.
        margin: float64 [N]: highest other logit minus the label's at the example; NaN where none was found.
        prediction: int64 [N]: the class of the image as the attack left it, the clean one where nothing was found;
            -1 where the logits are not numbers.
        target: int64 [N], of a targeted attack the class that it wanted; -1 where it was not tried, since the clean
            image is misclassified or of that class. None of other attacks.
        adversarial: float32 [M, C, H, W], the examples of the samples in `adversarial_rows`; None unless asked for.
        adversarial_rows: int64 [M], positions of those samples.
    """

    robust: NDArray[np.bool_]
    distance: NDArray[np.float64]
    part: NDArray[np.int64]
    job: NDArray[np.int64]
    steps: NDArray[np.int64]
    margin: NDArray[np.float64]
    prediction: NDArray[np.int64]
    target: NDArray[np.int64] | None = None
    adversarial: NDArray[np.float32] | None = None
    adversarial_rows: NDArray[np.int64] | None = None


@dataclass(repr=False)
class Evaluation:
    """Robustness of a model on samples.

    Attributes:
        index: int64 [N], names of the samples.
        labels: int64 [N].
        clean_prediction: int64 [N]; -1 where the logits are not numbers.
        verdicts: attack to what it left.
        results: the content of `results.json`.
        transferred: bool [N] by attack: right on the clean image and on the one made against another network; empty
            unless asked for.
        measured: bool [N, K, L] by measurement, such as `corruptions`: right on the image as changed by kind and level;
            empty unless asked for.
    """

    index: NDArray[np.int64]
    labels: NDArray[np.int64]
    clean_prediction: NDArray[np.int64]
    verdicts: dict[str, Verdicts]
    results: dict[str, Any] = field(repr=False)
    transferred: dict[str, NDArray[np.bool_]] = field(default_factory=dict, repr=False)
    measured: dict[str, NDArray[np.bool_]] = field(default_factory=dict, repr=False)
    _clean: Tensor | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        shares = {"clean": self.clean_accuracy, **self.robust_accuracy}
        told = [f"{self.num_samples} samples", *(f"{name} {share:.1%}" for name, share in shares.items())]
        told += [f"{check['status']}: {check['name']}" for check in self.checks]
        return f"Evaluation({', '.join(told)})"

    def __str__(self) -> str:
        return rows_text([self._row])

    def _repr_html_(self) -> str:
        return rows_html([self._row])

    @property
    def _row(self) -> dict[str, Any]:
        return {**evaluation_row(f"{self.num_samples} images", self.results), "checks": self.checks}

    def keep_clean(self, images: Tensor) -> None:
        """Keep the images, for `adversarial`."""
        self._clean = images

    def adversarial(self, attack: str | None = None) -> Tensor:
        """Return the images as an attack left them: the clean one where it did not fool the model.

        Args:
            attack: its name, under several threats with the threat's, as `pgd-40@L2`; None for the only one.

        Returns:
            Float32 [N, C, H, W] in [0, 1].

        Raises:
            UserError: without `return_adversarial=True`, or for an attack that was not run.
        """
        if self._clean is None:
            raise UserError("adversarial images are kept by evaluate(..., return_adversarial=True)")
        known = ", ".join(self.verdicts)
        name = next(iter(self.verdicts)) if attack is None and len(self.verdicts) == 1 else attack
        if name not in self.verdicts:
            raise UserError(f"attack {attack!r}: name one of {known}")
        clean, verdict = self._clean.cpu(), self.verdicts[name]
        images = clean.float() / 255 if clean.dtype == torch.uint8 else clean.float().clone()
        if verdict.adversarial is not None and verdict.adversarial_rows is not None:
            images[torch.from_numpy(verdict.adversarial_rows)] = torch.from_numpy(verdict.adversarial)
        return images

    @property
    def num_samples(self) -> int:
        """How many samples were evaluated."""
        return len(self.labels)

    @property
    def clean_accuracy(self) -> float:
        """Share of samples whose clean image is classified correctly."""
        return float(self.results["clean_accuracy"])

    @property
    def robust_accuracy(self) -> dict[str, float]:
        """Share of samples that are correct and not fooled, for each attack and, as `worst`, under all of them."""
        return dict(self.results["robust_accuracy"])

    @property
    def balanced_accuracy(self) -> dict[str, float]:
        """Mean over the classes of the share that is right, by `clean`, each attack, and `worst`, in [0, 1]."""
        return dict(balanced(self.correct, self.labels)["balanced_accuracy"])

    @property
    def calibration_error(self) -> float | None:
        """Expected calibration error on clean images, in [0, 1], 15 bins; None where it was not measured."""
        found = self.results.get("calibration")
        return None if found is None else float(found["error"])

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Wilson 95 % intervals of `clean_accuracy`, of each attack, and of `worst`."""
        return {name: (low, high) for name, (low, high) in self.results["intervals"].items()}

    @property
    def checks(self) -> list[dict[str, str]]:
        """Return the checks that are not fine: `name`, `status` (`failed` or `warning`) and `message` of each."""
        return lights(self.results.get("diagnostics"))

    @property
    def correct(self) -> dict[str, NDArray[np.bool_]]:
        """Return which samples are right, bool [N], by `clean`, each attack and, if there was one, `worst`."""
        clean = self.clean_prediction == self.labels
        columns = {"clean": clean, **{name: verdict.robust for name, verdict in self.verdicts.items()}}
        return {**columns, "worst": np.logical_and.reduce(list(columns.values()))} if self.verdicts else columns

    @property
    def shares(self) -> dict[str, NDArray[np.float64]]:
        """Return by measurement, such as `corruptions`, the share of each sample's changed images that are right, [N].

        The mean is over kinds and levels.
        """
        return {name: right.mean((1, 2)) for name, right in self.measured.items()}

    def save(self, folder: str | Path) -> None:
        """Write `samples.npz` and then `results.json`, each atomically."""
        folder = Path(folder)
        arrays: dict[str, NDArray[Any]] = {
            "index": self.index,
            "label": self.labels,
            "clean_prediction": self.clean_prediction,
        }
        arrays |= {f"transfer_{name}": right for name, right in self.transferred.items()}
        arrays |= {f"{MEASURED}{name}": right for name, right in self.measured.items()}
        for name, verdict in self.verdicts.items():
            arrays[f"robust_{name}"] = verdict.robust
            for key in PER_SAMPLE:
                arrays[f"{key}_{name}"] = getattr(verdict, key)
            if verdict.target is not None:
                arrays[f"target_{name}"] = verdict.target
            if verdict.adversarial is not None and verdict.adversarial_rows is not None:
                arrays[f"adversarial_{name}"] = verdict.adversarial
                arrays[f"adversarial_rows_{name}"] = verdict.adversarial_rows
        write_arrays(folder / "samples.npz", arrays)
        write_json(folder / "results.json", finite(self.results))

    @classmethod
    def load(cls, folder: str | Path) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            UserError: if the folder holds no finished evaluation.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name a run (runs/NAME) or a folder with results.json")
        for name in ("results.json", "samples.npz"):
            if not (folder / name).is_file():
                raise UserError(
                    f"{folder} holds no finished evaluation: {name} is missing; run `dualhead evaluate` first"
                )
        try:
            return cls._read(folder)
        except (OSError, ValueError, LookupError, TypeError, BadZipFile) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder}: its results cannot be read ({type(error).__name__}: {reason})") from None

    @classmethod
    def _read(cls, folder: Path) -> Evaluation:
        results = json.loads((folder / "results.json").read_text())
        with np.load(folder / "samples.npz") as stored:
            held = {name: stored[name] for name in stored.files}
        verdicts = {}
        for name in results["attacks"]:
            found = {key: held[f"{key}_{name}"] for key in ("robust", *PER_SAMPLE)}
            kept: dict[str, Any] = {
                key: held.get(f"{key}_{name}") for key in ("target", "adversarial", "adversarial_rows")
            }
            verdicts[name] = Verdicts(**found, **kept)
        transferred = {name: held[f"transfer_{name}"] for name in verdicts if f"transfer_{name}" in held}
        measured = {key.removeprefix(MEASURED): of for key, of in held.items() if key.startswith(MEASURED)}
        return cls(held["index"], held["label"], held["clean_prediction"], verdicts, results, transferred, measured)


def share(correct: NDArray[np.bool_]) -> float:
    """Return the share of samples that are right."""
    return float(correct.mean())


def interval(correct: NDArray[np.bool_]) -> list[float]:
    """Return the share's Wilson 95 % interval."""
    return list(wilson(int(correct.sum()), len(correct)))


def targeted(verdicts: Verdicts) -> dict[str, Any]:
    """Return how often a targeted attack got the answer that it wanted: `success`, of `attacked` images, `interval`.

    That is no robust accuracy: an image that is taken for a third class counts against both.
    """
    assert verdicts.target is not None
    tried = verdicts.target >= 0
    got = (verdicts.prediction == verdicts.target)[tried]
    if not len(got):
        return {"attacked": 0, "success": None, "interval": None}
    return {"attacked": len(got), "success": share(got), "interval": interval(got)}


def accuracies(correct: dict[str, NDArray[np.bool_]]) -> dict[str, Any]:
    """`clean_accuracy`, `robust_accuracy` and `intervals` from columns named as in `Evaluation.correct`."""
    attacked = {name: column for name, column in correct.items() if name != "clean"}
    return {
        "clean_accuracy": share(correct["clean"]),
        "robust_accuracy": {name: share(column) for name, column in attacked.items()},
        "intervals": {
            "clean_accuracy": interval(correct["clean"]),
            **{name: interval(column) for name, column in attacked.items()},
        },
    }


def balanced(correct: dict[str, NDArray[np.bool_]], labels: NDArray[np.int64]) -> dict[str, Any]:
    """Return what does not depend on how many images each class has.

    Args:
        correct: bool [N] each, named as in `Evaluation.correct`.
        labels: int64 [N].

    Returns:
        `balanced_accuracy`: by the same names, in [0, 1], the mean over the classes that occur of the share of their
        images that are right (Brodersen et al. 2010); `class_sizes`: images of the smallest of these classes and of
        the largest.
    """
    _, place, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    means = {name: float((np.bincount(place, column, len(sizes)) / sizes).mean()) for name, column in correct.items()}
    return {"balanced_accuracy": means, "class_sizes": [int(sizes.min()), int(sizes.max())]}


def per_class(
    correct: dict[str, NDArray[np.bool_]], labels: NDArray[np.int64], class_names: list[str]
) -> list[dict[str, Any]]:
    """Return one entry per class that occurs, with accuracies and intervals."""
    entries = []
    for label in np.unique(labels).tolist():
        columns = {name: column[labels == label] for name, column in correct.items()}
        count = int((labels == label).sum())
        entries.append({"label": label, "class": class_names[label], "num_samples": count, **accuracies(columns)})
    return entries
