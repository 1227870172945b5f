"""Reader of the folders of runs and evaluations; a missing or broken file becomes a note."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from dualhead.errors import UserError
from dualhead.names import MODEL, head_number, id_of, id_of_row, name_of, read_id, router_number, row_folder

COLUMNS = ("index", "label", "clean_prediction")
PER_ATTACK = ("robust_", "distance_", "steps_", "margin_", "prediction_")
"""Names of the arrays [N] of `samples.npz` beside those of each attack."""
WORN = "measured_"
"""Begins the names of arrays of which changed images are right, bool [N, K, L]; here the share of each image's, [N]."""


MEANS = ("accuracy", "interval", "kinds")
"""Keys of a measurement that hold numbers; the others are facts of the rendering."""


def measured_in(told: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what is told of measurements that are no attacks, such as `corruptions`, by name.

    Args:
        told: the content of `results.json`, or a row of `comparison.json`.
    """
    both = {"accuracy", "kinds"}
    return {str(name): value for name, value in told.items() if isinstance(value, Mapping) and both <= value.keys()}


def measured_title(told: Mapping[str, Any]) -> str:
    """Return what people read above the accuracies of a measurement: its name, its facts, the levels of each kind."""
    facts = [f", {key} of {value}" for key, value in told.items() if key not in (*MEANS, "name")]
    kinds = told["kinds"].values() if isinstance(told["kinds"], Mapping) else ()
    levels = {len(kind.get("severities", ())) for kind in kinds if isinstance(kind, Mapping)} - {0}
    means = f", means over {levels.pop()} severities" if len(levels) == 1 else ""
    return f"{told.get('name', 'changed images')}{''.join(facts)}{means}"


def role_of(output: str) -> str:
    """Return the colour of an output: its id, but `further` for heads after the second and for routers."""
    return "further" if (head_number(output) or 0) > 2 or router_number(output) is not None else output


@dataclass(frozen=True)
class Estimate:
    """A fraction with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """One classifier under one threat model.

    Args:
        run: label of the run.
        name: of the classifier within it.
        output: its id, see `dualhead.names`; `model` for what is no row of a run.
        title: its name on the page: with the run's, where there are several runs.
        deployed: it is the run's final output.
        threat: norm or name, and eps, or a `union` of such; None if not recorded.
        num_samples: None if not recorded.
        clean: clean accuracy.
        robust: by attack, with `worst`.
        results: content of `results.json`; empty if only `comparison.json` is left.
        samples: arrays [N] of `samples.npz`; empty if there are none.
        gallery: `gallery.npz`, images under attack; None if there is none.
        parameters: of the classifier.
        flops: cost of its training, in floating-point operations.
        forward_equivalents: the same in forward passes of one image through its own run's base model.
        training_seconds: of its training.
        folder: of the evaluation; None if there is none.
    """

    run: str
    name: str
    output: str
    title: str
    deployed: bool
    threat: Mapping[str, Any] | None
    num_samples: int | None
    clean: Estimate
    robust: Mapping[str, Estimate]
    results: Mapping[str, Any] = field(default_factory=dict, repr=False)
    samples: Mapping[str, NDArray[Any]] = field(default_factory=dict, repr=False)
    gallery: Path | None = None
    parameters: int | None = None
    flops: float | None = None
    forward_equivalents: float | None = None
    training_seconds: float | None = None
    folder: Path | None = None

    @property
    def role(self) -> str:
        """Return its colour: see `role_of`."""
        return role_of(self.output)

    @property
    def attacks(self) -> list[str]:
        """Names of the attacks, without `worst`."""
        return [name for name in self.robust if name != "worst"]

    @property
    def common_attacks(self) -> list[str]:
        """Those that every classifier can face: without the ones that only merged heads can."""
        told = self.results.get("attacks")
        told = told if isinstance(told, Mapping) else {}
        return [name for name in self.attacks if not _needs_heads(told.get(name))]

    @property
    def worst(self) -> Estimate | None:
        """Robust accuracy under all attacks together; None if there was none."""
        return self.robust.get("worst") or next(iter(self.robust.values()), None)

    @property
    def worn(self) -> dict[str, Estimate]:
        """Return by measurement, such as `corruptions`, the accuracy over all kinds and levels of changed images."""
        told = {name: _worn(each) for name, each in measured_in(self.results).items()}
        return {name: estimate for name, estimate in told.items() if estimate is not None}

    @property
    def transferred(self) -> Estimate | None:
        """Accuracy on images made against another network alone; None if not measured."""
        return _worn(self.results.get("transfer"))

    def worn_kinds(self, measurement: str) -> dict[str, Estimate]:
        """Return the same of one measurement by kind."""
        told = self.results.get(measurement)
        kinds = told.get("kinds") if isinstance(told, Mapping) else None
        found = {str(kind): _worn(of) for kind, of in kinds.items()} if isinstance(kinds, Mapping) else {}
        return {kind: estimate for kind, estimate in found.items() if estimate is not None}

    def correct(self, what: str) -> NDArray[np.bool_] | None:
        """Tell which samples are right, bool [N], by `clean`, an attack, or `worst`; None if it is not stored."""
        if "label" not in self.samples:
            return None
        clean = self.samples["clean_prediction"] == self.samples["label"]
        if what == "clean":
            return np.asarray(clean)
        if what != "worst":
            return self.samples.get(f"robust_{what}")
        columns = [self.samples.get(f"robust_{name}") for name in self.attacks]
        return np.logical_and.reduce([clean, *columns]) if all(c is not None for c in columns) else None


def _worn(told: Any) -> Estimate | None:
    """An accuracy that no attack on the model gave, as `results.json` holds it; None where it is none."""
    try:
        found = Estimate(float(told["accuracy"]), *(float(end) for end in told["interval"]))
    except (KeyError, TypeError, ValueError):
        return None
    return found if all(math.isfinite(number) for number in (found.value, found.low, found.high)) else None


def _needs_heads(record: object) -> bool:
    return isinstance(record, Mapping) and record.get("needs_heads") is True


@dataclass
class Source:
    """A run, or an evaluation that belongs to none.

    Args:
        label: what the page calls it.
        alone: the page is about nothing else.
        folder: where it lies.
        recipe: content of `config.yaml`; empty if there is none.
        recipe_text: the same as it stands in the file.
        environment: content of `environment.json`.
        metrics: lines of `metrics.jsonl`; numbers may be NaN.
        summaries: by stage, of the stages that are finished.
        class_names: of the classes, by label; empty if they are not recorded.
        images: training images, the held-out ones included; None if not recorded.
        rows: what was measured when training was over, the deployed output last.
        further: what `dualhead evaluate` measured later.
        routes: by the names of their folders, what `dualhead evaluate --routes` measured.
        notes: what is missing or cannot be read.
    """

    label: str
    alone: bool
    folder: Path
    recipe: Mapping[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    summaries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    class_names: Mapping[int, str] = field(default_factory=dict)
    images: int | None = None
    rows: list[Measured] = field(default_factory=list)
    further: list[Measured] = field(default_factory=list)
    routes: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def is_run(self) -> bool:
        """Whether it was trained here."""
        return bool(self.recipe_text)

    @property
    def held_out(self) -> int | None:
        """Training images that chose the checkpoints; None if there were none, or that is not recorded."""
        data = self.recipe.get("data")
        share = data.get("validation") if isinstance(data, Mapping) else None
        if isinstance(share, float):
            share = None if self.images is None else round(share * self.images)
        return share if isinstance(share, int) and share > 0 else None

    @property
    def stages(self) -> list[Mapping[str, Any]]:
        """Stages of the recipe; of a recipe that cannot be read, those that left metrics."""
        stages = self.recipe.get("stages")
        if isinstance(stages, list):
            return [stage for stage in stages if isinstance(stage, Mapping) and "name" in stage]
        return [{"name": name} for name in dict.fromkeys(line["stage"] for line in self.metrics)]

    @property
    def deployed(self) -> Measured | None:
        """The final output's evaluation."""
        return next((row for row in self.rows if row.deployed), None)

    def lines(self, stage: str) -> list[Mapping[str, Any]]:
        """Metrics of a stage."""
        return [line for line in self.metrics if line["stage"] == stage]


def read_sources(paths: Sequence[Path]) -> list[Source]:
    """Read runs, evaluations, and folders that hold several runs, as `demo` leaves them.

    Raises:
        UserError: for a folder that is none of these.
    """
    folders = list({folder.resolve(): folder for path in paths for folder in _expand(Path(path))}.values())
    if not folders:
        raise UserError("report: name at least one run, e.g. `dualhead report runs/digits`")
    return [
        _read(Source(label, len(folders) == 1, folder)) for folder, label in zip(folders, _labels(folders), strict=True)
    ]


def _expand(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name a run (runs/NAME) or a folder with results.json")
    if (path / "config.yaml").is_file() or (path / "results.json").is_file():
        yield path
        return
    inside = sorted(child for child in path.iterdir() if (child / "config.yaml").is_file())
    if not inside:
        raise UserError(f"{path}: holds neither a run (config.yaml) nor an evaluation (results.json)")
    yield from inside


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(words[-depth:]) for words in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def _read(source: Source) -> Source:
    folder = source.folder
    if (folder / "config.yaml").is_file():
        _read_training(source)
        _read_rows(source)
        for results in sorted((folder / "evaluations").glob("*/results.json")):
            source.further += _evaluation(source, results.parent, results.parent.name, deployed=False)
        for told in sorted((folder / "evaluations").glob("*/routes.json")):
            if found := _json_object(told, source.notes):
                source.routes[told.parent.name] = found
        if not source.rows:
            source.notes.append("This run has not been evaluated on test images.")
    else:
        source.rows = _evaluation(source, folder, source.label, deployed=True)
    return source


def _read_training(source: Source) -> None:
    folder, notes = source.folder, source.notes
    source.recipe_text = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace") or "# empty"
    try:
        recipe = yaml.safe_load(source.recipe_text)
    except yaml.YAMLError as error:
        recipe = None
        notes.append(f"config.yaml cannot be read: {error}")
    source.recipe = recipe if isinstance(recipe, Mapping) else {}
    if not isinstance(source.recipe.get("stages"), list):
        notes.append("config.yaml holds no recipe with stages; those that left metrics are shown.")
    source.environment = _json_object(folder / "environment.json", notes)
    source.metrics = _metrics(folder / "metrics.jsonl", notes)
    model = _json_object(folder / "checkpoints" / "config.json", notes)
    names, data = model.get("class_names"), model.get("data")
    images = data.get("images") if isinstance(data, Mapping) else None
    source.images = images if isinstance(images, int) else None
    source.class_names = dict(enumerate(map(str, names))) if isinstance(names, list) else {}
    source.summaries = {
        stage["name"]: summary
        for stage in source.stages
        if (summary := _json_object(_inside(folder / "checkpoints", stage["name"]) / "summary.json", notes))
    }
    unfinished = [stage for stage in source.stages if stage["name"] not in source.summaries]
    if unfinished:
        name = unfinished[0]["name"]
        reached = max((line["epoch"] for line in source.lines(name)), default=0)
        notes.append(
            f"Training is not finished: {len(source.stages) - len(unfinished)} of {len(source.stages)} stages are "
            f"done, and stage {name} has finished {reached} of {unfinished[0].get('epochs', '?')} epochs. It was "
            "interrupted or still goes on; the command that started it goes on from there."
        )


def _inside(folder: Path, name: object) -> Path:
    """A child of a folder: a name that leads elsewhere names nothing."""
    plain = str(name)
    return folder / (plain if plain == Path(plain).name != ".." else "-")


def _read_rows(source: Source) -> None:
    folder = source.folder / "evaluation"
    comparison = _json_object(source.folder / "comparison.json", source.notes)
    rows = comparison.get("rows")
    listed = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
    if comparison and not listed:
        source.notes.append("comparison.json holds no rows; what lies in the folder of the evaluation is shown.")
    if not listed:  # the evaluation of the rows was stopped on the way: take those that are done
        done = sorted(path.parent for path in (folder / "rows").glob("*/results.json"))
        for path in done:
            name = path.name.replace("_", " ")
            source.rows += _evaluation(source, path, name, id_of(name), deployed=False)
        if (folder / "results.json").is_file():
            output = _json_object(source.folder / "checkpoints" / "config.json", source.notes).get("output")
            output = read_id(str(output))
            source.rows += _evaluation(source, folder, name_of(output, source.label), output, deployed=True)
        elif done:
            source.notes.append("The evaluation was stopped before the final output was measured.")
        return
    for number, row in enumerate(listed):
        name, output, deployed = str(row.get("name")), id_of_row(row), number == len(listed) - 1
        place = folder if deployed else _inside(folder / "rows", row_folder(name))
        source.rows += _evaluation(source, place, name_of(output, name), output, deployed=deployed, row=row)


def _evaluation(
    source: Source,
    folder: Path,
    name: str,
    output: str = MODEL,
    *,
    deployed: bool,
    row: Mapping[str, Any] | None = None,
) -> list[Measured]:
    """Read the evaluation in a folder, as a list of one; of none if nothing can be read, which is then noted."""
    row = row or {}
    where = folder.relative_to(source.folder).as_posix()
    results = _json_object(folder / "results.json", source.notes)
    known = results or row
    if results and row and results.get("robust_accuracy") != row.get("robust_accuracy"):
        source.notes.append(f"{where}/results.json is of another evaluation than comparison.json; the former is shown.")
    try:
        clean, robust = _estimates(known)
    except (KeyError, TypeError, ValueError, AttributeError):
        source.notes.append(f"{name}: {where}/results.json holds no accuracies that can be read; it is left out.")
        return []
    if not results:
        source.notes.append(f"{name}: {where}/results.json is missing; what comparison.json holds is shown.")
    threat = results.get("threat") if results else source.recipe.get("threat")
    known_threat = isinstance(threat, Mapping) and (
        "union" in threat or ("eps" in threat and ("norm" in threat or "name" in threat))
    )
    cost = row.get("training_cost")
    cost = cost if isinstance(cost, Mapping) else {}
    count = results.get("num_samples")
    return [
        Measured(
            run=source.label,
            name=name,
            output=output,
            title=name if source.alone or name == source.label else f"{source.label}: {name}",
            deployed=deployed,
            threat=threat if known_threat else None,
            num_samples=count if isinstance(count, int) else None,
            clean=clean,
            robust=robust,
            results=results or _told_checks(row),
            samples=_samples(folder / "samples.npz", count, source.notes) if results else {},
            gallery=folder / "gallery.npz" if (folder / "gallery.npz").is_file() else None,
            parameters=row.get("parameters"),
            flops=cost.get("flops"),
            forward_equivalents=cost.get("forward_equivalents"),
            training_seconds=cost.get("seconds"),
            folder=folder,
        )
    ]


def _told_checks(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checks of a row of `comparison.json` as `results.json` holds them: the failed and warning ones."""
    return {"diagnostics": row["checks"]} if row.get("checks") else {}


def _estimates(results: Mapping[str, Any]) -> tuple[Estimate, dict[str, Estimate]]:
    ends = results["intervals"]

    def estimate(value: Any, name: str) -> Estimate:
        found = Estimate(float(value), float(ends[name][0]), float(ends[name][1]))
        if not all(math.isfinite(number) for number in (found.value, found.low, found.high)):
            raise ValueError(name)
        return found

    robust = {str(name): estimate(value, name) for name, value in results["robust_accuracy"].items()}
    return estimate(results["clean_accuracy"], "clean_accuracy"), robust


def _samples(path: Path, count: object, notes: list[str]) -> dict[str, NDArray[Any]]:
    """Read the arrays of `samples.npz`; images stay on the disk."""
    if not path.is_file():
        return {}
    try:
        with np.load(path) as stored:
            held = {name: stored[name] for name in stored.files if name in COLUMNS or name.startswith(PER_ATTACK)}
            worn = [name for name in stored.files if name.startswith(WORN) and stored[name].ndim == 3]
            held |= {name: stored[name].mean((1, 2)) for name in worn}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        notes.append(f"{path.name} in {path.parent.name} cannot be read: {error}")
        return {}
    fits = all(array.shape == (count,) for array in held.values()) and set(COLUMNS) <= set(held)
    if not fits:
        notes.append(f"{path.name} in {path.parent.name} does not fit its results.json; it is left out.")
    return held if fits else {}


def _json_object(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} in {path.parent.name} cannot be read: {error}")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{path.name} in {path.parent.name} holds no JSON object")
        return {}
    return content


def _metrics(path: Path, notes: list[str]) -> list[Mapping[str, Any]]:
    if not path.is_file():
        notes.append("metrics.jsonl is missing: no epoch has been finished.")
        return []
    lines: list[Mapping[str, Any]] = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            notes.append(f"metrics.jsonl, line {number}, was cut short or damaged; it is left out.")
            continue
        if isinstance(line, dict) and "stage" in line and isinstance(line.get("epoch"), int):
            lines.append(line)
    if not lines:
        notes.append("metrics.jsonl is empty: no epoch has been finished.")
    broken = sorted({f"{line['stage']} epoch {line['epoch']} ({name})" for line in lines for name in not_finite(line)})
    if broken:
        more = f" and {len(broken) - 4} more" if len(broken) > 4 else ""
        notes.append(f"Metrics that are not finite: {', '.join(broken[:4])}{more}; curves have gaps there.")
    return lines


def not_finite(line: Mapping[str, Any]) -> Iterable[str]:
    """Names of the metrics in a line that are NaN or infinite, or null, as some writers put it."""
    return [
        name for name, value in line.items() if value is None or (isinstance(value, float) and not math.isfinite(value))
    ]
