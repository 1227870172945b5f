"""The work of an evaluation under one threat: searches, journal, diagnostics and measurements."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualhead.attacks import Attack, LogitsFn, Search, predictions
from dualhead.attacks import attacks as registry
from dualhead.components.plugins import sources_in
from dualhead.errors import Interrupted, UserError
from dualhead.evaluation.calibration import calibration
from dualhead.evaluation.diagnostics import (
    AUDITED,
    PROBES,
    Audit,
    Finding,
    check_attacks,
    check_black_box,
    check_curve,
    check_model,
    check_precision,
    check_randomness,
    described,
    is_random,
)
from dualhead.evaluation.journal import (
    ELSEWHERE,
    Journal,
    Outcome,
    data_fingerprint,
    images_fingerprint,
    weights_fingerprint,
)
from dualhead.evaluation.measurements import Measurement, right_when_changed, summary
from dualhead.evaluation.measurements import measurements as measurement_registry
from dualhead.evaluation.model import Subject, differ, refuse_labels, told_if_unfit, worth_reducing
from dualhead.evaluation.progress import EvaluationProgress, Reporter, Silent
from dualhead.evaluation.results import Evaluation, Verdicts, accuracies, balanced, per_class, targeted
from dualhead.evaluation.scheduler import Cost, Hunt, Samples, Try
from dualhead.noise import Streams
from dualhead.system.arithmetic import BF16, FLOAT32, Arithmetic, Precision
from dualhead.system.devices import describe_environment
from dualhead.system.processes import group
from dualhead.threats import Threat, ThreatModel


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Model, samples, threat and attacks of an evaluation, and how it is done: the arguments of `evaluate`, checked.

    The fields have their names and meaning there; but `threat` is a single one, and `measurements` are told apart from
    `attacks`, each by label. None of them has a default, so that none is forgotten on the way.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    threat: Threat
    attacks: Mapping[str, Attack]
    measurements: Mapping[str, Measurement]
    eps: Sequence[float]
    index: Tensor
    batch_size: int
    seed: int
    precision: Precision
    device: torch.device | str | None
    class_names: Sequence[str] | None
    skipped: int
    checks: Sequence[Finding]
    heads: LogitsFn | None
    return_adversarial: bool
    save_adversarial: bool
    output_dir: Path | None
    resume: bool
    diagnostics: bool
    progress: EvaluationProgress | None
    command: str | None
    subject: Mapping[str, str | None] | None
    transfer_from: nn.Module | None
    transfer_name: str
    stop: Callable[[], bool]


def check_interval(device: torch.device) -> int:
    """Return the steps between looks at a search: on an accelerator each look waits for it, on the CPU none does."""
    return 1 if device.type == "cpu" else 5


def _task(attack: Attack, threat: Threat) -> str:
    """Return the journal's name of an attack under a threat."""
    return f"{threat.kind} {threat.eps!r} {registry.describe(attack)!r}"


@dataclass
class _Found:
    """Results of one attack in one process."""

    tries: dict[int, tuple[int, Outcome]]  # sample to the part that fooled it, and how
    costs: dict[int, Cost]
    seconds: dict[int, float]
    precisions: dict[int, str]  # of each part's search


class Work:
    """State of an evaluation under one threat.

    Args:
        settings: what is asked for; the model is frozen as long as the work goes on.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.subject = subject = Subject(settings.model, settings.heads, settings.batch_size)
        self.threat, self.attacks = settings.threat, settings.attacks
        self.seed, self.stop = settings.seed, settings.stop
        self.progress = settings.progress or Silent()
        self.keep_examples = settings.save_adversarial or settings.return_adversarial
        images = settings.images.cpu()
        labels, index = (numbers.to("cpu", torch.int64) for numbers in (settings.labels, settings.index))
        self.group = group()
        self.rank, self.world = self.group.rank, self.group.world
        self.mine = np.arange(self.rank, len(images), self.world)
        with told_if_unfit(settings.model, images):
            clean = self._clean(images)
        self.samples = Samples(images, labels, clean, index)
        self.num_classes = self.samples.clean.shape[1]
        refuse_labels(labels, self.num_classes)
        self.num_heads = subject.query().num_heads(self.samples.fetch(torch.arange(1), subject.device))
        self.threats = {radius: self.threat.within(radius) if radius else None for radius in settings.eps}
        for asked in (self.threat, *self.threats.values()):  # what cannot be done is refused now, not hours later
            for attack in self.attacks.values() if asked else ():
                attack.check(cast("Threat", asked))
                attack.parts(self.num_classes, cast("Threat", asked), self.num_heads)
        self.correct = (predictions(self.samples.clean) == labels).numpy()
        self.audits: list[Audit] | None = None  # None: what is searched in bf16 is not audited

    def _clean(self, images: Tensor) -> Tensor:
        """Compute float32 logits of all clean images, each process its own share."""
        subject = self.subject
        shares = []
        for rows in torch.split(torch.from_numpy(self.mine), subject.batch_size):
            logits = subject.verify(Samples.images_at(images, rows, subject.device))
            if logits.ndim != 2 or logits.shape[1] < 2:
                raise UserError(f"the model must give logits [B, C] with C at least 2, got {list(logits.shape)}")
            shares.append(logits.cpu())
        gathered = [part for part in self.group.gather(torch.cat(shares) if shares else None) if part is not None]
        clean = torch.empty(len(images), gathered[0].shape[1])
        for rank, part in enumerate(gathered):
            clean[rank :: self.world] = part
        return clean

    def right_on(self, images: Tensor) -> NDArray[np.bool_]:
        """Tell whether the float32 model is right on changed images of all samples [N, C, H, W], bool [N]."""
        answers = predictions(
            torch.cat(
                [
                    self.subject.verify(chunk.to(self.subject.device)).cpu()
                    for chunk in torch.split(images, self.subject.batch_size)
                ]
            )
        )
        return cast("NDArray[np.bool_]", (answers == self.samples.labels).numpy())

    def open_journal(self) -> None:
        """Resume from the folder, and settle the precision of the search."""
        samples, precision, resume = self.samples, self.settings.precision, self.settings.resume
        folder = None if self.settings.output_dir is None else self.settings.output_dir / "progress"
        identity = {
            "weights": weights_fingerprint(self.subject.model),
            "data": data_fingerprint(samples.images, samples.labels, samples.keys),
            "norm" if isinstance(self.threat, ThreatModel) else "threat": self.threat.kind,
            "seed": self.seed,
            "precision": precision,
            "adversarial examples": self.keep_examples,
        }
        first = self.group.first

        def begin() -> None:
            self.journal = Journal(
                folder, identity, resume=resume, rank=self.rank, world=self.world, examples=self.keep_examples
            )

        self.group.agreed(lambda: begin() if first else None)
        self.group.agreed(lambda: None if first else begin())  # a folder that is begun anew has been emptied by now

        rows = torch.arange(min(self.subject.batch_size, len(samples.labels)))
        x, y = samples.fetch(rows, self.subject.device), samples.labels[rows].to(self.subject.device)

        def settle() -> dict[str, Any]:
            return {
                **self.subject.settle(precision, x, y, self._most_passes()),
                "layout": self.subject.layout,
                "batch_size": self.subject.batch_size,
                "forward_batch_size": self.subject.forward_batch_size,
                "batch_invariant": self.subject.batch_invariant(x, y),
            }

        built = {label: registry.describe(attack) for label, attack in self.attacks.items()}
        built |= {name: measurement_registry.describe(each) for name, each in self.settings.measurements.items()}

        def refuse_changed() -> None:
            for label, spec in built.items():
                self._refuse_changed_code(label, spec, folder)

        self.group.lead(refuse_changed)
        self.settled = self.group.lead(lambda: self.journal.fact("arithmetic", settle))
        self._check_answers()
        self.shown, self.usual = x, BF16 if self.settled["precision"] == "bf16" else FLOAT32
        self.subject.use(self.usual, x)
        self.subject.repeatable = self._repeatable()
        self.subject.batch_size = min(self.subject.batch_size, self.settled["batch_size"])
        self.subject.forward_batch_size = min(self.subject.forward_batch_size, self.settled["forward_batch_size"])

    def _repeatable(self) -> bool:
        """Whether an image gets the same answer every time, asked only where an attack makes use of it."""
        threats = [threat for threat in (self.threat, *self.threats.values()) if threat is not None]
        uses = any(
            part.stops_at_cycles
            for threat in threats
            for attack in self.attacks.values()
            for part in attack.parts(self.num_classes, threat, self.num_heads)
        )
        if not (uses and self.settled["batch_invariant"]):
            return False
        return not self.group.lead(
            lambda: self.journal.fact("logits are random", lambda: is_random(self.subject, self.samples))
        )

    def _said(self) -> Tensor:
        """Compute float32 logits of the first samples; infinite ones become NaN, as JSON has one word for both."""
        rows = torch.arange(min(PROBES, len(self.samples.labels)))
        logits = self.subject.verify(self.samples.fetch(rows, self.subject.device)).cpu()
        return torch.where(logits.isfinite(), logits, torch.nan)

    def _refuse_changed_code(self, label: str, described: Mapping[str, Any], folder: Path | None) -> None:
        """Refuse an attack or a measurement from outside whose file has changed since the earlier results."""
        for source in sources_in(described):
            before = self.journal.fact(f"code of {label} in {source.name}", partial(str, source.sha256))
            if before != source.sha256:
                raise UserError(
                    f"{folder}: holds results of {label} with another version of {source.file}; put that version "
                    f"back, {ELSEWHERE}"
                )

    def _check_answers(self) -> None:
        """Refuse to resume with a model whose answers have changed.

        Its weights have been compared; but a model's answers also depend on what is in no state dict: constants, the
        mean and standard deviation that it normalises with, its code. One that is random cannot be told from another.
        """
        said = self._said()
        kept = self.group.lead(lambda: self.journal.fact("logits of the first samples", said.tolist))
        before = torch.tensor(np.array(kept, np.float32))
        if differ(before, said, 1e-3) and not differ(said, self._said(), 1e-4):
            raise UserError(
                f"{self.journal.folder} holds what was found out of a model that gave other logits for the same images "
                f"with the same weights; {ELSEWHERE}"
            )

    def _most_passes(self) -> int:
        """Return the steps of one process if no sample were fooled."""
        threats = {self.threat, *self.threats.values()} - {None}
        parts = [
            part
            for threat in cast("set[Threat]", threats)
            for attack in self.attacks.values()
            for part in attack.parts(self.num_classes, threat, self.num_heads)
        ]
        return len(self.mine) * sum(part.jobs(self.num_classes) * part.max_steps() for part in parts)

    @property
    def _attack_names(self) -> frozenset[str]:
        """Return the registered names of the attacks and of their parts."""
        names = {attack.registered_name for attack in self.attacks.values()}
        for attack in self.attacks.values():
            names |= {part.label for part in attack.parts(self.num_classes, self.threat, self.num_heads)}
        return frozenset(names | ({"autoattack"} if "autoattack-plus" in names else set()))

    def _diagnose_model(self, class_names: Sequence[str]) -> list[dict[str, str]]:
        """Run the checks before the attacks, in the first process."""

        def check() -> list[dict[str, str]]:
            return described(check_model(self.subject, self.samples, self.correct, class_names, self._attack_names))

        key = f"checks before {', '.join(sorted(self._attack_names))}"  # advice names no attack that is run
        return cast("list[dict[str, str]]", self.group.lead(lambda: self.journal.fact(key, check)))

    def _diagnose_randomness(self, robust: NDArray[np.bool_]) -> list[dict[str, str]]:
        """Judge a random model by as many draws as an attack takes, in the first process."""
        draws = max(
            sum(
                part.jobs(self.num_classes) * part.max_steps()
                for part in attack.parts(self.num_classes, self.threat, self.num_heads)
            )
            for attack in self.attacks.values()
        )

        def check() -> list[dict[str, str]]:
            names = self._attack_names
            found = check_randomness(self.subject, self.samples, self.correct, robust, draws, names, self.stop)
            return described([found])

        key = f"randomness at eps {self.threat.eps!r} of {', '.join(sorted(self.attacks))}"
        return cast("list[dict[str, str]]", self.group.lead(lambda: self.journal.fact(key, check)))

    def _diagnose_attacks(
        self, verdicts: dict[str, Verdicts], records: dict[str, dict[str, Any]], curve: list[dict[str, Any]]
    ) -> list[dict[str, str]]:
        """Run the checks after the attacks, in the first process.

        Args:
            verdicts: of each attack.
            records: passes and successes of each attack's parts.
            curve: robust accuracy over eps.
        """
        gradient_free = {
            name: {
                number
                for number, part in enumerate(record["parts"])
                if part["forward_passes"] and not part["backward_passes"]
            }
            for name, record in records.items()
        }
        with_gradients = any(part["backward_passes"] for record in records.values() for part in record["parts"])

        def probe() -> list[dict[str, str]]:
            return described(check_attacks(self.subject, self.samples, self.correct, self.threat, self.seed))

        findings = self.group.lead(lambda: self.journal.fact(f"checks after at eps {self.threat.eps!r}", probe))
        white, black = np.zeros_like(self.correct), np.zeros_like(self.correct)
        for name, verdict in verdicts.items():
            blind = np.isin(verdict.part, list(gradient_free[name]))
            black |= blind
            white |= (verdict.part >= 0) & ~blind
        # Elsewhere than under norms gradients are known to miss what a search finds, masked or not.
        if any(gradient_free.values()) and with_gradients and isinstance(self.threat, ThreatModel):
            findings = findings + described(check_black_box(white, black))
        if len(curve) > 1:
            findings = findings + described(check_curve(curve, len(self.correct), self._attack_names))
        return cast("list[dict[str, str]]", findings)

    def _measure(self, name: str, measurement: Measurement) -> NDArray[np.bool_]:
        """Tell which changed images are classified correctly, bool [N, K, L], each process on its own share."""
        samples, subject = self.samples, self.subject
        right: list[NDArray[np.bool_]] = []
        mine, kinds = torch.from_numpy(self.mine), measurement.kinds()

        def answer(images: Tensor) -> Tensor:
            return predictions(subject.verify(images.to(subject.device))).cpu()

        # Results of other settings are not these.
        settings = {key: value for key, value in measurement_registry.describe(measurement).items() if key != "name"}
        for done, kind in enumerate(kinds):
            self.progress.update(name, done, len(kinds), float(np.mean(right)) if right else 1.0)
            if any(self.group.any(self.stop())):
                raise Interrupted(f"stopped in {name}; the same command goes on from there")
            key = f"{name} {settings!r}: {kind}" if settings else f"{name}: {kind}"
            found = np.zeros((len(self.correct), measurement.levels), bool)
            if not self.group.lead(partial(self.journal.facts.__contains__, key)):
                own = right_when_changed(
                    measurement, answer, samples.images[mine], samples.labels[mine], samples.keys[mine], kind,
                    self.seed, subject.batch_size,
                )  # fmt: skip
                for rank, part in enumerate(self.group.gather(own)):
                    found[rank :: self.world] = part
            told = self.group.lead(partial(self.journal.fact, key, found.tolist))
            right.append(np.array(told, bool))
        self.progress.update(name, len(kinds), len(kinds), float(np.mean(right)))
        return np.stack(right, 1)

    def run(self, class_names: list[str]) -> Evaluation:
        """Run all attacks at all budgets, then all measurements."""
        begun = time.perf_counter()
        settings, measurements, diagnostics = self.settings, self.settings.measurements, self.settings.diagnostics
        self.audits = [] if diagnostics else None
        findings = self._diagnose_model(class_names) if diagnostics else []
        records, verdicts = {}, {}
        for name, attack in self.attacks.items():
            verdicts[name], records[name] = self._attack(attack, self.threat)
        evaluation = Evaluation(
            self.samples.keys.numpy(),
            self.samples.labels.numpy(),
            predictions(self.samples.clean).numpy(),
            verdicts,
            {},
            measured={name: self._measure(name, measurement) for name, measurement in measurements.items()},
        )
        correct = evaluation.correct
        curve = []
        for radius, threat in sorted(self.threats.items()):
            curve.append({"eps": radius, **self._at(threat, correct)})
        if diagnostics and self.attacks:
            findings += self._diagnose_randomness(correct["worst"])
            # Where a model gives one answer to everything, an attack that finds nothing proves no masked gradients.
            if not any(one["name"] == "one_class" and one["status"] == "failed" for one in findings):
                findings += self._diagnose_attacks(verdicts, records, curve)
        findings += described(check_precision(self.audits or ()))
        built = [registry.describe(attack) for attack in self.attacks.values()]
        built += [measurement_registry.describe(measurement) for measurement in measurements.values()]
        code = [source.describe() for source in sources_in(built)]
        evaluation.results = {
            "num_samples": len(self.correct),
            "images": {
                "shape": list(self.samples.images.shape[1:]),
                "sha256": images_fingerprint(self.samples.images, self.samples.keys),
            },
            "threat": self.threat.describe(),
            **accuracies(correct),
            **balanced(correct, evaluation.labels),
            "calibration": calibration(self.samples.clean, self.samples.labels),
            "attacks": records,
            **{
                name: summary(measurement, evaluation.measured[name], self.samples.images.shape[1:])
                for name, measurement in measurements.items()
            },
            "curve": curve,
            "per_class": per_class(correct, evaluation.labels, class_names),
            "diagnostics": findings,
            "environment": {
                **describe_environment(self.subject.device),
                **self.settled,
                **({"plugins": code} if code else {}),
                "processes": self.world,
            },
            "seconds": time.perf_counter() - begun,
            "seed": self.seed,
            "command": settings.command,
            "subject": dict(settings.subject or {}),
            **({"skipped_images": settings.skipped} if settings.skipped else {}),
        }
        return evaluation

    def _at(self, threat: Threat | None, correct: dict[str, NDArray[np.bool_]]) -> dict[str, Any]:
        """Return the accuracies under another threat model; None is no threat."""
        if threat == self.threat:
            columns = correct
        elif threat is None:
            columns = dict.fromkeys(correct, self.correct)
        else:
            found = {name: self._attack(attack, threat)[0].robust for name, attack in self.attacks.items()}
            columns = {"clean": self.correct, **found}
            columns["worst"] = cast("NDArray[np.bool_]", np.logical_and.reduce(list(columns.values())))
        both = accuracies(columns)
        even = balanced(columns, self.samples.labels.numpy())["balanced_accuracy"]
        return {**{key: both[key] for key in ("robust_accuracy", "intervals")}, "balanced_accuracy": even}

    def _attack(self, attack: Attack, threat: Threat) -> tuple[Verdicts, dict[str, Any]]:
        """Run one attack on all samples, and merge the findings of the processes."""
        parts = attack.parts(self.num_classes, threat, self.num_heads)
        shares = cast("list[_Found]", self.group.gather(self._attack_mine(attack, parts, threat)))
        count = len(self.correct)
        numbers = {key: np.full(count, -1) for key in ("part", "job", "steps")}
        clean = predictions(self.samples.clean).numpy()
        empty = np.full(count, np.nan)
        verdicts = Verdicts(self.correct.copy(), empty, **numbers, margin=empty.copy(), prediction=clean)
        tries = {sample: outcome for found in shares for sample, outcome in found.tries.items()}
        for sample, (part, outcome) in tries.items():
            verdicts.robust[sample] = False
            verdicts.part[sample], verdicts.job[sample], verdicts.steps[sample] = part, outcome.job, outcome.steps
            verdicts.distance[sample], verdicts.margin[sample] = outcome.distance, outcome.margin
            verdicts.prediction[sample] = outcome.taken_for
        goals, asked = self._goals(parts)
        if goals is not None:
            verdicts.target = np.where(asked, goals, -1)
        if self.keep_examples:
            verdicts.adversarial_rows = np.array(sorted(tries), np.int64)
            examples = [cast("Tensor", tries[sample][1].example).numpy() for sample in sorted(tries)]
            shape = self.samples.images.shape[1:]
            verdicts.adversarial = np.stack(examples) if examples else np.empty((0, *shape), np.float32)
        record = self._record(attack, parts, shares, verdicts)
        reduced = [number for number, name in shares[0].precisions.items() if name != FLOAT32.name]
        if reduced and self.audits is not None and (verdicts.robust & asked).any():
            audit = self._audit(attack, parts, threat, verdicts.robust & asked, reduced)
            self.audits.append(audit)
            record["audit"] = asdict(audit)
        return verdicts, record

    def _goals(self, parts: Sequence[Search]) -> tuple[list[int] | None, NDArray[np.bool_]]:
        """Return the class that a targeted attack wants for each sample, None for other attacks; and what is attacked.

        A sample is attacked where it is right without an attack, and its label is not what the attack wants.
        """
        goals = parts[0].goal(self.samples.clean, self.samples.labels)
        if goals is None:
            return None, self.correct
        return goals.tolist(), self.correct & (goals != self.samples.labels).numpy()

    def _record(
        self, attack: Attack, parts: Sequence[Search], shares: list[_Found], verdicts: Verdicts
    ) -> dict[str, Any]:
        """Return passes, seconds and successes of an attack and of its parts."""
        entries, left = [], int(self.correct.sum())
        for number, part in enumerate(parts):
            costs = [found.costs[number] for found in shares]
            fooled = int((verdicts.part == number).sum())
            left -= fooled
            entries.append(
                {
                    "name": part.label,
                    "seconds": max(found.seconds[number] for found in shares),
                    **{f"{key}_passes": sum(getattr(cost, key) for cost in costs) for key in asdict(Cost())},
                    "fooled": fooled,
                    "robust_accuracy": left / len(self.correct),
                    "precision": shares[0].precisions[number],
                }
            )
        keys = ("seconds", *(f"{key}_passes" for key in asdict(Cost())), "fooled")
        return {
            **{key: sum(entry[key] for entry in entries) for key in keys},
            "parts": entries,
            "notes": attack.notes(self.num_classes),
            "parameters": registry.describe(attack),
            "needs_heads": attack.needs_heads,
            **({} if verdicts.target is None else {"targeted": targeted(verdicts)}),
        }

    def _audit(
        self, attack: Attack, parts: Sequence[Search], threat: Threat, robust: NDArray[np.bool_], numbers: Sequence[int]
    ) -> Audit:
        """Search again in float32 some of what withstood parts in bf16, each process its share of those."""
        survivors = np.flatnonzero(robust)
        order = Streams.of(self.seed, self.samples.keys).fork("audit").uniform(1)[:, 0].numpy()
        chosen = survivors[np.argsort(order[survivors], kind="stable")[:AUDITED]]
        mine = np.intersect1d(chosen, self.mine).tolist()
        streams, fell, seconds = self._streams(attack), set[int](), 0.0
        goals, asked = self._goals(parts)
        others = int((robust | (self.correct & ~asked))[self.mine].sum()) - len(mine)
        for number in numbers:
            where = (f"again in float32: {_task(attack, threat)}", number)
            left = [sample for sample in mine if sample not in fell]
            label = f"{attack.label}: {parts[number].label}, audit"
            self._hunt(parts[number], threat, streams.fork(number), left, where, label, goals, FLOAT32, others)
            fell |= set(self.journal.first_successes(where, left, goals))
            seconds += self.journal.seconds[where]
        shares = self.group.gather((len(fell), seconds))
        return Audit(
            [parts[number].label for number in numbers], threat.eps, len(survivors), len(chosen),
            sum(count for count, _ in shares), max(taken for _, taken in shares),
        )  # fmt: skip

    def _streams(self, attack: Attack) -> Streams:
        return Streams.of(self.seed, self.samples.keys).fork(attack.registered_name)

    def _arithmetic_of(self, part: Search, left: int) -> Arithmetic:
        """The arithmetic for a part that has `left` samples of this process to search.

        All processes decide alike, from what is left to all of them: a verdict must not depend on their number.
        """
        seconds = self.settled["seconds_per_image"] if "chosen" in self.settled else {}  # else begun by earlier code
        if part.uses_gradients or not seconds:
            return self.usual
        return BF16 if worth_reducing(seconds, sum(self.group.gather(left)), AUDITED) else self.usual

    def _attack_mine(self, attack: Attack, parts: Sequence[Search], threat: Threat) -> _Found:
        """Run one attack on this process's samples."""
        streams, found = self._streams(attack), _Found({}, {}, {}, {})
        goals, asked = self._goals(parts)
        others = int((self.correct & ~asked)[self.mine].sum())
        for number, part in enumerate(parts):
            where = (_task(attack, threat), number)
            label = attack.label if len(parts) == 1 else f"{attack.label}: {part.label}"
            left = [sample for sample in self.mine.tolist() if asked[sample] and sample not in found.tries]
            arithmetic = self._arithmetic_of(part, len(left))
            self._hunt(part, threat, streams.fork(number), left, where, label, goals, arithmetic, others)
            for sample, outcome in self.journal.first_successes(where, left, goals).items():
                found.tries[sample] = (number, outcome)
            found.costs[number], found.seconds[number] = self.journal.costs[where], self.journal.seconds[where]
            found.precisions[number] = arithmetic.name
        return found

    def _hunt(
        self,
        part: Search,
        threat: Threat,
        streams: Streams,
        left: list[int],
        where: tuple[str, int],
        label: str,
        goals: list[int] | None,
        arithmetic: Arithmetic,
        others: int,
    ) -> None:
        """Run one part on the samples that are left, and journal each try; `others` stand without being searched."""
        self.subject.use(arithmetic, self.shown)
        jobs, known = part.jobs(self.num_classes), self.journal.tries[where].values()
        report = Reporter(self.progress, label, left, jobs, len(self.mine), known, others)
        since = time.perf_counter()
        spent = Cost()
        ended: list[Try] = []

        def account() -> None:
            nonlocal since, spent
            self._journal_tries(where, ended, goals)
            ended.clear()
            now, cost = time.perf_counter(), hunt.cost
            self.journal.add_cost(
                where, now - since, Cost(**{key: value - getattr(spent, key) for key, value in asdict(cost).items()})
            )
            since, spent = now, replace(cost)
            self.journal.write()

        def record(outcome: Try) -> None:
            ended.append(outcome)
            if self.journal.due() or len(ended) >= self.subject.batch_size:
                account()
            report.outcome(outcome)

        def look(under_way: float) -> None:
            stopped = self.stop()
            if self.journal.flight_due() or (stopped and self.journal.folder is not None):
                account()
                self.journal.write_flight(where, hunt.in_flight())
            if stopped:
                raise Interrupted(f"stopped in {label}; the same command goes on from there")
            report.look(under_way)

        hunt = Hunt(
            part,
            threat,
            self.subject,
            self.samples,
            streams,
            left,
            known=self.journal.known(where, goals),
            check_every=check_interval(self.subject.device),
            on_try=record,
            on_round=look,
            flight=self.journal.flight(where),
        )
        try:
            hunt.run()
        finally:
            if hunt.cost != spent or ended:
                account()
            self.subject.use(self.usual, self.shown)

    def _journal_tries(self, where: tuple[str, int], ended: Sequence[Try], goals: list[int] | None) -> None:
        """Record tries that have ended, with the model's answer to each example, asked in one batch."""
        examples = [found.example for found in ended if found.fooled and found.example is not None]
        wrong: list[int] = []
        if examples:
            labels = self.samples.labels[[found.sample for found in ended if found.fooled]]
            logits = self.subject.verify(torch.stack(examples).to(self.subject.device)).cpu()
            # They are known to be misclassified. Another batch may round a tie otherwise, and must not undo that.
            wrong = predictions(logits.scatter(1, labels[:, None], -torch.inf)).tolist()
        taken = iter(wrong)
        for found in ended:
            answer = next(taken) if found.fooled else -1
            if goals is not None and found.fooled and found.reached != (answer == goals[found.sample]):
                answer = goals[found.sample] if found.reached else -1
            self.journal.add(where, Outcome(**vars(found), taken_for=answer))
