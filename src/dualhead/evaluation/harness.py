"""`evaluate`: attacks on a data set, one verdict per sample and attack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualhead.attacks import LogitsFn
from dualhead.components.fields import parse_real, whole
from dualhead.errors import UserError
from dualhead.evaluation.asked import Asked, Spec
from dualhead.evaluation.diagnostics import Finding
from dualhead.evaluation.given import read_all, tensors_of
from dualhead.evaluation.model import check_images, check_module, frozen
from dualhead.evaluation.progress import EvaluationProgress
from dualhead.evaluation.results import Evaluation
from dualhead.evaluation.transfer import TRANSFER, transfer_results
from dualhead.evaluation.union import merged, threat_labels
from dualhead.evaluation.work import Settings, Work
from dualhead.system.arithmetic import Precision
from dualhead.system.devices import find_device, float32_products
from dualhead.system.outputs import without_inference_tensors
from dualhead.system.processes import group
from dualhead.threats import Threat, build_threat, refuse_changed_origins


@float32_products()  # TF32 is no float32, and verdicts are float32's
def evaluate(
    model: nn.Module,
    images: Tensor | NDArray[Any] | Iterable[Any],
    labels: Tensor | NDArray[Any] | Sequence[int] | None = None,
    *,
    threat: Threat | str | Mapping[str, Any] | Sequence[Threat | str | Mapping[str, Any]] | None = None,
    attacks: Iterable[Spec] | Spec,
    eps: float | str | Sequence[float | str] = (),
    index: Tensor | NDArray[Any] | Sequence[int] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    precision: Precision = "auto",
    device: torch.device | str | None = None,
    class_names: Sequence[str] | None = None,
    skipped: int = 0,
    checks: Sequence[Finding] = (),
    heads: LogitsFn | None = None,
    return_adversarial: bool = False,
    save_adversarial: bool = False,
    output_dir: str | Path | None = None,
    resume: bool = True,
    diagnostics: bool = True,
    progress: EvaluationProgress | None = None,
    command: str | None = None,
    subject: Mapping[str, str | None] | None = None,
    transfer_from: nn.Module | None = None,
    transfer_name: str = "another network",
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Measure how robust a classifier is.

    Every attack named here is tried on every sample that is classified correctly without one; the searches within an
    attack (a suite's parts, targets, restarts) go on with what is left. Only the float32 model's answer to the final
    example, confined to the budget, counts. A verdict depends on the model, the sample, its index and the seed, not on
    batch size, order or number of processes, as far as the model's kernels allow (`environment.batch_invariant` in the
    results says whether they do here).

    In a group of processes (`dualhead.system.processes`) each calls this with the same arguments, searches its share of
    the samples, and returns the whole; the first one writes.

    Args:
        model: images float32 [B, C, H, W] in [0, 1] to logits [B, K], or to anything with `.logits`; evaluated in eval
            mode, and left as it was found. One logit z per image is read as [0, z], for two classes. It may change the
            images that it is given: it gets copies then.
        images: uint8, or floating in [0, 1], [N, C, H, W], or a list of tensors [C, H, W]; they are left as they are.
            Or, without `labels`, a `DataLoader`, a data set (torch's or `datasets`'), or any iterable of (images,
            labels), which is read once into a temporary file and not held in memory.
        labels: integers [N] in [0, K); None if `images` gives them too.
        threat: what the adversary may do, and the budget: `ThreatModel("Linf", "8/255")`, its fields,
            `{"norm": "L2", "eps": 0.5}`, or those of a threat that is no norm, `{"name": "flow", "eps": 0.05}`; or as
            text, `"L2:0.5"`. Several, in a list, make a column each, as `pgd-40@L2`, and `worst` is under all of them;
            an attack that is not defined for one of them runs under the others, which the results tell. None, or a
            norm or name alone: `eps` gives the budget, of Linf where nothing says otherwise.
        attacks: names with or without parameters (`pgd-40`), mappings (`{"name": "pgd", "restarts": 5}`), attacks,
            or functions of (model, images, labels) to images, which results call by their names and never resume; a
            single one without a list too, and text that names several, `pgd-40,square`.
            `corruptions`, alone or among them, measures accuracy on the 15 common corruptions of Hendrycks and
            Dietterich in 5 severities, on all images and apart from the attacks; under several threats, once.
        eps: further budgets at which robust accuracy is measured too; 0 stands for the clean images. Where `threat`
            has no budget, the largest is its.
        index: a number per sample that names it, for its random numbers and in the results; None for 0 to N - 1.
        batch_size: images at once at most, rounded up to a multiple of 16; fewer where that is faster.
        seed: of all random numbers.
        precision: of the search: `float32`; `bf16` (autocast, channels last); `auto` for gradients in float32, and
            queries without gradients in bf16 where that saves time on this machine. The results say which it was, and
            what was searched in bf16 is audited: see the diagnostic `precision`.
        device: None for where the model is; else the model is moved there. `cpu`, `cuda`, or `auto` for the best.
        class_names: for the results; None for numbers.
        skipped: images that were left out since they cannot be read, for the results (`skipped_images`).
        checks: what whoever read the images found out about them, to stand among the diagnostics.
        heads: images to the logits of all heads [B, H, K], for attacks that use them; None for `model.head_logits`
            where there is one.
        return_adversarial: keep the adversarial examples in the result, for `Evaluation.adversarial(attack)`.
        save_adversarial: keep the adversarial examples in `samples.npz`.
        output_dir: where to write `results.json` and `samples.npz`, and to keep what is found out on the way.
        resume: go on with what lies there; False begins anew.
        diagnostics: look for signs that the results cannot be believed; costs about 1,600 passes on a robust model.
        progress: told how far it is; None tells nobody.
        command: the command line, for the results.
        subject: what was evaluated (stage, checkpoint and output of a run), for the results.
        transfer_from: another network, usually a clean one; the attacks also make images against it, once, and the
            share of them on which `model` is right stands under `transfer` in the results. No attack saw the model
            then, so this flatters it; `worst` and robust accuracy do not count it. Attacks that need several heads
            make none against a network that has none. What was found out about that network lies in the folder
            `transfer` of the results.
        transfer_name: what results call it.
        stop: asked again and again; when true, what is under way is put on disk and `Interrupted` raised.

    Raises:
        UserError: for a model, images, labels, a device, a threat or attacks that do not fit, or an output folder of
            another evaluation.
        Interrupted: when stopped.
    """
    check_module(model, "model", "the order is evaluate(model, images, labels)")
    if transfer_from is not None:
        check_module(transfer_from, "transfer_from", "give another network")
    if progress is not None and not hasattr(progress, "update"):
        raise UserError(
            f"progress: must have update(attack, done, total, robust_so_far), got {progress!r}; leave it out for none"
        )
    if labels is None:
        if isinstance(images, Tensor | np.ndarray):
            raise UserError("labels are needed beside a tensor of images; only a DataLoader or data set gives both")
        images, labels = read_all(images)
    images, labels = check_images(*tensors_of(images, labels))
    index = torch.arange(len(images)) if index is None else torch.as_tensor(index)
    if index.shape != labels.shape or len(set(index.tolist())) != len(index):
        raise UserError(f"index must name each of the {len(images)} samples once")
    whole("batch_size", batch_size, 1)
    whole("seed", seed)
    threats, radii = _settled(threat, eps)
    asked = _asked(attacks, images, radii)
    settings = Settings(
        model=model,
        images=images,
        labels=labels,
        threat=threats[0],
        attacks=asked.attacks,
        measurements=asked.measurements,
        eps=[parse_real(radius) for radius in radii],
        index=index,
        batch_size=batch_size,
        seed=seed,
        precision=precision,
        device=None if device is None else group().agreed(lambda: find_device(str(device))),
        class_names=class_names,
        skipped=skipped,
        checks=checks,
        heads=heads,
        return_adversarial=return_adversarial,
        save_adversarial=save_adversarial,
        output_dir=None if output_dir is None else Path(output_dir),
        resume=resume,
        diagnostics=diagnostics,
        progress=progress,
        command=command,
        subject=subject,
        transfer_from=transfer_from,
        transfer_name=transfer_name,
        stop=stop,
    )
    return _under_each(settings, threats) if len(threats) > 1 else _under_one(settings)


Given = Threat | str | Mapping[str, Any]
"""A threat as callers give it."""


def _settled(
    threat: Given | Sequence[Given] | None, eps: float | str | Sequence[float | str]
) -> tuple[list[Threat], list[float | str]]:
    """Return the threats with their budgets, and the budgets of a curve.

    A threat without a budget, or none at all for Linf, takes the largest of `eps`; one number alone is then no curve.

    Raises:
        UserError: if nothing gives a budget, or a list of threats is too short or comes with a curve.
    """
    radii = [cast("float | str", eps)] if np.ndim(eps) == 0 else list(cast("Sequence[float | str]", eps))
    if isinstance(threat, Sequence) and not isinstance(threat, str):
        if radii:
            raise UserError("eps: a curve over eps is of one threat; leave it out, or name one threat")
        if len(threat) < 2:
            raise UserError("threat: a list names two threats or more; write one threat alone, without a list")
        return [build_threat(each, f"threat.{place}") for place, each in enumerate(threat)], []
    bare = isinstance(threat, str) and ":" not in threat
    if not (threat is None or bare or (isinstance(threat, Mapping) and "eps" not in threat)):
        return [build_threat(threat, "threat")], radii
    if not radii:
        alone = "" if threat is None else f" {threat!r} has no budget;"
        raise UserError(f"threat:{alone} give threat=ThreatModel('Linf', '8/255'), or eps='8/255' for Linf")
    largest = max(map(parse_real, radii))
    full = f"{threat}:{largest}" if bare else {**cast("Mapping[str, Any]", threat or {}), "eps": largest}
    return [build_threat(full, "threat")], radii[1:] and radii


def _asked(attacks: Iterable[Spec] | Spec, images: Tensor, radii: Sequence[float | str]) -> Asked:
    """Build what is asked for, and refuse images and budgets that do not suit a measurement."""
    asked = Asked.of(attacks)
    for name, measurement in asked.measurements.items():
        measurement.check(images.shape[1:])
        if radii and not asked.attacks:
            raise UserError(f"eps: {name} have no budget; leave it out, or name an attack too")
    return asked


def _under_one(settings: Settings) -> Evaluation:
    """Evaluate under one threat."""
    names = list(settings.class_names or ())
    if settings.device is not None:
        settings.model.to(settings.device)
    refuse_changed_origins(settings.threat, settings.images.shape[1:])
    settings = replace(
        settings,
        model=without_inference_tensors(settings.model),
        threat=settings.threat.for_images(settings.images.shape[1:]),
        attacks={label: attack.for_classes(names) for label, attack in settings.attacks.items()},
    )
    with torch.inference_mode(False), torch.enable_grad(), frozen(settings.model):
        work = Work(settings)
        if settings.class_names is None:
            names = [str(k) for k in range(work.num_classes)]
        if len(names) < work.num_classes:
            raise UserError(f"{len(names)} class names for a model of {work.num_classes} classes")
        work.open_journal()
        made = _made_elsewhere(work)  # first, so that a network that does not fit is refused now, not hours later
        evaluation = work.run(names)
        if made is not None:
            _add_transfer(work, made, evaluation)
        evaluation.results["diagnostics"] += [asdict(check) for check in settings.checks]
    return _kept(evaluation, settings)


def _made_elsewhere(work: Work) -> Evaluation | None:
    """Let the attacks make images against another network; None if there is no such network."""
    settings, other = work.settings, work.settings.transfer_from
    if other is None:
        return None
    met = settings.attacks
    if not hasattr(other, "head_logits"):  # where all need heads, the first of them says so
        met = {label: attack for label, attack in met.items() if not attack.needs_heads} or met
    return _under_one(
        replace(
            settings,
            model=other,
            attacks=met,
            heads=None,
            transfer_from=None,
            device=work.subject.device,
            measurements={},
            eps=(),
            skipped=0,
            checks=(),
            command=None,
            subject=None,
            return_adversarial=True,
            save_adversarial=False,
            output_dir=None if settings.output_dir is None else settings.output_dir / TRANSFER,
            diagnostics=False,
        )
    )


def _add_transfer(work: Work, made: Evaluation, evaluation: Evaluation) -> None:
    """Measure on images that were made against another network."""
    right = {attack: work.right_on(made.adversarial(attack)) for attack in made.verdicts}
    fooled = {attack: made.correct["clean"] & ~verdict.robust for attack, verdict in made.verdicts.items()}
    evaluation.transferred = {attack: column & work.correct for attack, column in right.items()}
    told = transfer_results(work.settings.transfer_name, evaluation.transferred, fooled, work.correct)
    evaluation.results[TRANSFER] = told


def _under_each(settings: Settings, threats: Sequence[Threat]) -> Evaluation:
    """Evaluate under each of several threats, in a folder of its own, and under their union."""
    labelled = dict(zip(threat_labels(threats), threats, strict=True))
    named, once = settings.attacks, settings.measurements
    if not named:
        told = f"{next(iter(once))} are of no threat" if once else "there is no attack to try under several"
        raise UserError(f"threat: {told}; name one alone, or an attack too")
    chosen, left_out = {}, []
    for label, threat in labelled.items():
        chosen[label] = {name: attack for name, attack in named.items() if attack.takes(threat)}
        left_out += [
            f"{name} is not defined for {label} and was not run under it" for name in named if name not in chosen[label]
        ]
        if not chosen[label]:
            next(iter(named.values())).check(threat)
    parts = {}
    for label, threat in labelled.items():
        folder = None if settings.output_dir is None else settings.output_dir / "threats" / _file_name(label)
        own = replace(settings, threat=threat, attacks=chosen[label], measurements=once, output_dir=folder)
        parts[label], once = _under_one(own), {}
    count = max(int(entry["label"]) for part in parts.values() for entry in part.results["per_class"]) + 1
    names = [str(k) for k in range(count)] if settings.class_names is None else list(settings.class_names)
    return _kept(merged(parts, names, sorted(left_out)), settings)


def _kept(evaluation: Evaluation, settings: Settings) -> Evaluation:
    """Keep of an evaluation what was asked for: clean images beside adversarial ones, and files."""
    if settings.return_adversarial:
        evaluation.keep_clean(settings.images)
    folder = settings.output_dir
    if folder is not None:
        group().lead(lambda: evaluation.save(folder))
    return evaluation


def _file_name(label: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in label)
