"""Measure a trained run: every output of its model on the test images, and what each cost to train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from dualhead.evaluation import (
    Evaluation,
    EvaluationProgress,
    Finding,
    Visit,
    balanced,
    check_duplicates,
    check_single_steps,
    describe_sequence,
    evaluate,
    make_gallery,
    of_specialists,
    threat_labels,
)
from dualhead.heads import DualHeadClassifier
from dualhead.models import count_parameters
from dualhead.names import AGGREGATE, BASE, MEAN, MODEL, head_id, name_of
from dualhead.runs.folder import load_kept
from dualhead.runs.images import count_measured
from dualhead.runs.poisoned import Measures, summary_of
from dualhead.runs.prepare import Prepared, chosen_under, load_specialists
from dualhead.runs.stages import precision_of
from dualhead.saving import view, write_card
from dualhead.system.files import write_json
from dualhead.system.flops import CountFlops
from dualhead.system.modes import in_eval_mode
from dualhead.system.processes import group
from dualhead.threats import Threat
from dualhead.training import Stage, read_metrics


@dataclass(frozen=True)
class Row:
    """One line of a comparison: an output of the run's model, or its base model as it was before the second head.

    Args:
        name: as tables call it.
        output: its id, see `dualhead.names`; `base` for the base model.
        evaluation: what was measured.
        parameters: of the modules that the output runs.
        flops: floating-point operations of its training.
        forward_equivalents: the same in forward passes of one image through the base model.
        seconds: of its training.
    """

    name: str
    output: str
    evaluation: Evaluation
    parameters: int
    flops: int
    forward_equivalents: float
    seconds: float

    def describe(self) -> dict[str, Any]:
        """Return the row as `comparison.json` holds it."""
        return {
            "name": self.name,
            "output": self.output,
            "checks": self.evaluation.checks,
            "clean_accuracy": self.evaluation.clean_accuracy,
            "robust_accuracy": dict(self.evaluation.robust_accuracy),
            **balanced(self.evaluation.correct, self.evaluation.labels),
            "calibration_error": self.evaluation.calibration_error,
            "intervals": {name: list(ends) for name, ends in self.evaluation.intervals.items()},
            **{name: self.evaluation.results[name] for name in self.evaluation.measured},
            "parameters": self.parameters,
            **(
                {"poison": summary_of(self.evaluation.results["poison"])} if "poison" in self.evaluation.results else {}
            ),
            "training_cost": {
                "flops": self.flops,
                "forward_equivalents": round(self.forward_equivalents, 1),
                "seconds": round(self.seconds, 1),
            },
        }


@dataclass(frozen=True)
class Candidate:
    """A classifier that is measured.

    Args:
        output: its id; `base` for the base model.
        model: images [B, C, H, W] to logits [B, num_classes].
    """

    output: str
    model: nn.Module


def measure(
    prepared: Prepared,
    model: nn.Module,
    progress: Callable[[str], EvaluationProgress] | None,
    stop: Callable[[], bool],
    *,
    command: str | None = None,
) -> list[Row]:
    """Measure the outputs of a trained network, and its base model, on the test images; or what is deployed alone.

    The deployed output's results are written to `evaluation/`, the others' to `evaluation/rows/`, and all of them side
    by side to `comparison.json`.

    Args:
        prepared: the run; this process holds its folder, in which all stages are finished.
        model: the trained network.
        progress: gives, for the name of a row, who is told of its evaluation.
        stop: asked between batches; when true `Interrupted` is raised.
        command: what the user typed, kept with the results.

    Returns:
        The rows, the deployed output's last.

    Raises:
        Interrupted: when stopped.
    """
    costs, unit = group().lead(lambda: _costs(prepared, model)), forward_flops(prepared, model)
    trained = group().lead(lambda: read_metrics(prepared.folder.metrics))
    checks = [check_duplicates(*prepared.images.digests()), *check_single_steps(trained)]
    poisoned = None if prepared.images.poisoning is None else Measures(prepared)
    rows: list[Row] = []
    last: list[Row] = []
    for candidate in _measured(prepared, model):
        output = candidate.output
        name, deployed = name_of(output, prepared.recipe.name), output == prepared.output
        where = prepared.folder.evaluation if deployed else prepared.folder.row(name)
        options = _options(prepared, candidate.model, name, progress, command, stop)
        besides = {**options, "attacks": [*options["attacks"], *prepared.asked.measurements.values()]}
        evaluation = _evaluate(prepared, candidate.model, checks, besides, where)
        if poisoned is not None:
            evaluation.results["poison"] = poisoned.of(
                candidate.model, evaluation, where, output=output, deployed=deployed, **options
            )
            group().lead(partial(evaluation.save, where))
        flops, seconds = costs[output]
        row = Row(name, output, evaluation, _parameters(model, output), flops, flops / unit, seconds)
        (last if deployed else rows).append(row)
    rows += last
    sequence = None
    if prepared.recipe.sequence is not None:
        visits = _visits(prepared, last[0].evaluation, unit, checks, progress, stop, command)
        threats = threat_labels(prepared.recipe.threats_measured)
        sequence = describe_sequence(visits, threats, of_specialists(load_specialists(prepared.recipe), threats))
        last[0].evaluation.results["sequence"] = sequence
    group().lead(lambda: _write(prepared, model, rows, sequence))
    return rows


def _options(
    prepared: Prepared,
    model: nn.Module,
    name: str,
    progress: Callable[[str], EvaluationProgress] | None,
    command: str | None,
    stop: Callable[[], bool],
) -> dict[str, Any]:
    """Return the arguments of `evaluate` that do not depend on the images."""
    recipe = prepared.recipe
    return {
        "threat": recipe.threats_measured or recipe.threat,
        "attacks": list(prepared.asked.for_model(model).attacks.values()),
        "batch_size": recipe.evaluate.batch_size,
        "seed": recipe.runtime.seed,
        "precision": precision_of(recipe.runtime),
        "progress": progress(name) if progress else None,
        "command": command,
        "stop": stop,
    }


def _evaluate(
    prepared: Prepared,
    model: nn.Module,
    checks: Sequence[Finding],
    options: Mapping[str, Any],
    where: Path,
) -> Evaluation:
    test = prepared.images.test
    count = count_measured(prepared.recipe, test)
    return evaluate(
        model.eval(),
        test.images[:count],
        test.labels[:count],
        class_names=list(test.class_names),
        skipped=len(test.skipped),
        checks=checks,
        output_dir=where,
        **options,
    )


def _visits(
    prepared: Prepared,
    deployed: Evaluation,
    unit: int,
    checks: Sequence[Finding],
    progress: Callable[[str], EvaluationProgress] | None,
    stop: Callable[[], bool],
    command: str | None,
) -> list[Visit]:
    """Measure the network after each stage of a sequence; after the last one it is what is deployed."""
    recipe, folder = prepared.recipe, prepared.folder
    labels = dict(zip(recipe.threats_measured, threat_labels(recipe.threats_measured), strict=True))
    visits: list[Visit] = []
    since: list[Stage] = []
    for stage in recipe.stages:
        since.append(stage)
        if stage not in recipe.sequence_stages:
            continue
        evaluation = deployed
        if stage is not recipe.stages[-1]:
            model = prepared.architecture.create().to(prepared.device)
            load_kept(folder, stage, model)
            view_of, where = view(model, stage.output), folder.visit(stage.name)
            options = _options(prepared, view_of, f"after {stage.name}", progress, command, stop)
            evaluation = _evaluate(prepared, view_of, checks, options, where)
        summaries = [group().lead(lambda of=each: _summary(prepared, of)) for each in since]  # type: ignore[misc]
        visits.append(
            Visit(
                stage.name,
                tuple(tuple(labels[t] for t in each.met(recipe.threat) if t in labels) for each in since),
                tuple(tuple(labels[t] for t in _used(prepared, each) if t in labels) for each in since),
                evaluation,
                sum(summary["flops"] for summary in summaries) / unit,
                sum(summary["seconds"] for summary in summaries),
            )
        )
        since = []
    return visits


def _used(prepared: Prepared, stage: Stage) -> tuple[Threat, ...]:
    """Return the threats whose attacks a stage uses: to train, to choose an epoch, or to choose weights."""
    recipe = prepared.recipe
    used = list(stage.met(recipe.threat))
    if stage.interpolate is not None:
        used += chosen_under(recipe, stage)
    elif stage.keep == "best" and stage.epochs and prepared.images.held_out is not None:
        used += recipe.validated_under(stage)
    return tuple(dict.fromkeys(used))


def _write(prepared: Prepared, model: nn.Module, rows: Sequence[Row], sequence: Mapping[str, Any] | None) -> None:
    """Write the comparison, the model's card and the gallery; a gallery that is there stays."""
    recipe, folder, test = prepared.recipe, prepared.folder, prepared.images.test
    told: dict[str, Any] = {"rows": [row.describe() for row in rows]}
    if sequence is not None:
        rows[-1].evaluation.save(folder.evaluation)
        told["sequence"] = sequence
    write_json(folder.comparison, told)
    write_card(folder.model, folder.path)
    shown = min(recipe.evaluate.gallery, len(test))
    if shown and not folder.gallery.is_file():
        gallery = make_gallery(
            view(model, prepared.output),
            test.images[:shown],
            test.labels[:shown],
            threat=recipe.threat,
            seed=recipe.runtime.seed,
            batch_size=recipe.evaluate.batch_size,
        )
        gallery.save(folder.gallery)


# ---- what is measured


def _measured(prepared: Prepared, model: nn.Module) -> Iterator[Candidate]:
    """Yield what the recipe wants measured."""
    alone = prepared.recipe.evaluate.outputs == "deployed"
    return (each for each in _candidates(prepared, model) if not alone or each.output == prepared.output)


def _candidates(prepared: Prepared, model: nn.Module) -> Iterator[Candidate]:
    """Yield all that can be measured; the base model has the weights that its last stage kept."""
    if not isinstance(model, DualHeadClassifier):
        yield Candidate(MODEL, model)
        return
    first = _base_stages(prepared)
    if first:
        base = prepared.architecture.create().to(prepared.device)
        load_kept(prepared.folder, first[-1], base)
        yield Candidate(BASE, view(base, head_id(1)))
    # With the aggregator `mean` two outputs are one: only what is deployed is measured.
    same = {MEAN, AGGREGATE} if model.is_mean else set()
    kept = prepared.output if prepared.output in same else MEAN
    for output in model.outputs:
        if output not in same or output == kept:
            yield Candidate(output, view(model, output))


def _base_stages(prepared: Prepared) -> list[Stage]:
    """Return the stages that make the base model: those before any other part than trunk and head 1 is trained."""
    return list(takewhile(lambda stage: set(stage.train) <= {"trunk", head_id(1)}, prepared.recipe.stages))


# ---- what it cost


def _parts_of(model: nn.Module) -> Mapping[str, set[str]]:
    """Return the parts whose training changes each output, and `base`."""
    if not isinstance(model, DualHeadClassifier):
        return {MODEL: {"model"}}
    outputs = {BASE: head_id(1), **{output: output for output in model.outputs}}
    return {
        name: {part for part in model.parts if model.is_shaped_by(output, part)} for name, output in outputs.items()
    }


def _parameters(model: nn.Module, output: str) -> int:
    """Count the parameters that an output runs."""
    return count_parameters(view(model, head_id(1) if output == BASE else output))


def _costs(prepared: Prepared, model: nn.Module) -> dict[str, tuple[int, float]]:
    """Add up the training cost of each output and of `base`, in floating-point operations and in seconds.

    An output costs the stages up to the last one that trains a part it runs; the base model costs its own.
    """
    stages = []
    for stage in prepared.recipe.stages:
        summary = _summary(prepared, stage)
        stages.append((set(stage.train), summary["flops"], summary["seconds"]))

    def up_to(count: int) -> tuple[int, float]:
        return sum(flops for _, flops, _ in stages[:count]), sum(seconds for _, _, seconds in stages[:count])

    costs = {
        output: up_to(max((n + 1 for n, (trained, _, _) in enumerate(stages) if trained & parts), default=0))
        for output, parts in _parts_of(model).items()
    }
    return {**costs, BASE: up_to(len(_base_stages(prepared)))}


def _summary(prepared: Prepared, stage: Stage) -> dict[str, Any]:
    """Read what a finished stage cost and reached."""
    found: dict[str, Any] = yaml.safe_load(prepared.folder.summary(stage.name).read_text(encoding="utf-8"))
    return found


def forward_flops(prepared: Prepared, model: nn.Module) -> int:
    """Count the floating-point operations of a forward pass of one image through the base model."""
    base = view(model, head_id(1)) if isinstance(model, DualHeadClassifier) else model
    example = torch.zeros(1, *prepared.architecture.image_shape, device=prepared.device)
    counter = CountFlops()
    with counter, in_eval_mode(base), torch.no_grad():
        base(example)
    return counter.total
