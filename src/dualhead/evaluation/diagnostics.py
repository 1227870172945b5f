"""Signs that an evaluation cannot be believed: what makes attacks fail although the model is not robust.

After Carlini et al. 2019 (On evaluating adversarial robustness, section 5) and Croce et al. 2022 (Evaluating the
adversarial robustness of adaptive test-time defenses): each check says what was seen and what to do about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualhead.attacks import Search, predictions
from dualhead.attacks import attacks as registry
from dualhead.attacks.losses import cross_entropy
from dualhead.errors import Interrupted
from dualhead.evaluation.model import ROWS, Subject, differ
from dualhead.evaluation.scheduler import Hunt, Samples, Try
from dualhead.noise import Streams
from dualhead.statistics import AGAINST_OVERFITTING, overfits_single_steps, wilson
from dualhead.threats import Threat

PROBES = 32
"""Samples that the checks which run attacks look at, and those that tell one model from another."""
AUDITED = 64
"""Images at most that are searched again in float32, of those that withstood a search in bf16."""
ALMOST_ALL = 0.98
"""Share of the images from which on a single answer counts as the model's only one."""
MOST_DRAWS = 1000
"""How often at most images are asked without an attack, however many steps an attack has."""
SUITE_FOR_RANDOM = "autoattack-rand"
"""The attack for models with random answers."""


@dataclass(frozen=True)
class Finding:
    """The outcome of a check.

    Attributes:
        name: of the check.
        status: `ok`; `warning`: results may be too high; `failed`: they do not mean what they say.
        message: what was seen and, unless it is fine, what to do.
    """

    name: str
    status: Literal["ok", "warning", "failed"]
    message: str


def _finding(name: str, good: bool, fine: str, bad: str, *, failed: bool = True) -> Finding:
    return Finding(name, "ok", fine) if good else Finding(name, "failed" if failed else "warning", bad)


def check_model(
    subject: Subject,
    samples: Samples,
    correct: NDArray[np.bool_],
    class_names: Sequence[str],
    attacks: Set[str],
) -> list[Finding]:
    """Check the model before any attack.

    Args:
        subject: the model.
        samples: the data.
        correct: bool [N], what is right on clean images.
        class_names: by label.
        attacks: registered names of the attacks that are run, which no advice names again.
    """
    rows = torch.arange(min(2 * PROBES, len(samples.labels)))
    x, y = samples.fetch(rows, subject.device), samples.labels[rows].to(subject.device)
    noisy = Streams.of(0, samples.keys[rows].to(subject.device)).fork("diagnostics").uniform(*x.shape[1:])
    logits = subject.verify(x)
    random = is_random(subject, samples)
    one_class = _one_class(samples, class_names)
    return [
        _mode(subject),
        _values(samples.images),
        _independence(subject, x, logits, random=random),
        _finite(torch.cat((samples.clean, subject.verify(noisy).cpu()))),
        _probabilities(logits),
        one_class,
        _labels(samples.labels, class_names),
        _accuracy(correct, samples),
        *([] if one_class.status == "failed" else _gradients(subject, x, y, attacks)),
    ]


def _mode(subject: Subject) -> Finding:
    stubborn = [name or "the model" for name, module in subject.model.named_modules() if module.training]
    text = (
        f"{next(iter(stubborn), '')} stays in train mode although the model was put in eval mode: dropout and batch "
        "statistics make its output random or dependent on the batch"
    )
    return _finding("train_mode", not stubborn, "evaluated in eval mode", text)


def _values(images: Tensor) -> Finding:
    high = float(images.max()) / (255.0 if images.dtype == torch.uint8 else 1.0)
    text = f"no image value exceeds {high:.3g}; are the images divided by 255 twice? eps refers to images in [0, 1]"
    return _finding("value_range", high > 0.1, "images lie in [0, 1]", text, failed=False)


def is_random(subject: Subject, samples: Samples) -> bool:
    """Whether the same images in the same batch give other logits from one pass to the next."""
    x = samples.fetch(torch.arange(min(2 * PROBES, len(samples.labels))), subject.device)
    logits = subject.verify(x)
    return any(differ(logits, subject.verify(x), 1e-4) for _ in range(3))


def right_under_draws(
    subject: Subject, samples: Samples, draws: int, stop: Callable[[], bool] = lambda: False
) -> NDArray[np.bool_]:
    """Ask a random model about images that nobody attacks as often as an attack does.

    An attack takes an example once it looks misclassified and a second pass confirms that, so luck alone fools a random
    model. Here clean images meet the same rule: what is lost is luck, what an attack finds beyond it is the attack's.

    Args:
        subject: the model.
        samples: the data.
        draws: steps of the attack, each with a look at the answer.
        stop: asked before each draw.

    Returns:
        bool [N], images that were never twice in a row misclassified.

    Raises:
        Interrupted: when stopped; the draws are made anew next time.
    """
    left = torch.arange(len(samples.labels))
    kept = np.ones(len(left), np.bool_)
    for _ in range(draws):
        if stop():
            raise Interrupted("stopped while a random model was asked again; the same command goes on from there")
        wrong = _misclassified(subject, samples, _misclassified(subject, samples, left))
        kept[wrong.numpy()] = False
        left = left[torch.from_numpy(kept)[left]]
    return kept


def _misclassified(subject: Subject, samples: Samples, rows: Tensor) -> Tensor:
    """Those of some rows [M] that the model misclassifies in one pass."""
    parts = [
        part[predictions(subject.verify(samples.fetch(part, subject.device))).cpu() != samples.labels[part]]
        for part in torch.split(rows, subject.batch_size)
        if len(part)
    ]
    return torch.cat(parts) if parts else rows


def check_randomness(
    subject: Subject,
    samples: Samples,
    correct: NDArray[np.bool_],
    robust: NDArray[np.bool_],
    draws: int,
    attacks: Set[str],
    stop: Callable[[], bool] = lambda: False,
) -> Finding:
    """Is the model random, and how much of what attacks found is luck?

    Args:
        subject: the model.
        samples: the data.
        correct: bool [N], what was right on clean images, asked once.
        robust: bool [N], what withstood all attacks.
        draws: steps that the attack with most steps takes.
        attacks: registered names of the attacks that were run.
        stop: asked before each draw.

    Raises:
        Interrupted: when stopped.
    """
    if not is_random(subject, samples):
        return Finding("randomness", "ok", "the same images give the same logits")
    draws = min(draws, MOST_DRAWS)
    lucky = float(right_under_draws(subject, samples, draws, stop).mean())
    seen = (
        f"the same images gave different logits: the model is random. Asked {draws} times without any attack, "
        f"{lucky:.1%} of the images stay right (asked once, {correct.mean():.1%}): compare robust accuracy "
        f"{robust.mean():.1%} with {lucky:.1%}, since what lies between that and clean accuracy is luck; "
    )
    if SUITE_FOR_RANDOM in attacks:  # gradients were means over many passes, as such a model needs
        return Finding("randomness", "warning", seen + "repeat with other seeds (--seed 1, 2, ...) and tell the spread")
    further = f"use {SUITE_FOR_RANDOM}, which averages gradients over many passes, and evaluate with several seeds"
    return Finding("randomness", "failed", seen + further)


def _independence(subject: Subject, x: Tensor, logits: Tensor, *, random: bool) -> Finding:
    if random:  # other logits prove nothing then
        return Finding("batch_independence", "ok", "not judged: the model's logits are random")
    alone = torch.cat([subject.verify(row[None].expand(ROWS, *row.shape))[:1] for row in x[:4]])
    text = (
        "an image's logits depend on the other images in its batch, as with batch statistics: an adversary who fills "
        "the batch decides, and verdicts depend on who sits beside whom; use running statistics"
    )
    return _finding("batch_independence", not differ(logits[:4], alone, 1e-4), "an image's logits are its own", text)


def _finite(logits: Tensor) -> Finding:
    bad = int((~logits.isfinite()).any(1).sum())
    text = (
        f"{bad} of {len(logits)} images (clean ones and noise) gave logits that are not finite, which stops gradients "
        "and decides by accident; find where the model overflows"
    )
    return _finding("finite_logits", not bad, "logits are finite", text)


def _probabilities(logits: Tensor) -> Finding:
    sums = torch.ones_like(logits[:, 0])
    probable = bool((logits >= 0).all()) and torch.allclose(logits.sum(1), sums, atol=1e-3)
    text = (
        "the outputs are non-negative and sum to 1: these are probabilities, on which a second softmax flattens the "
        "cross-entropy; return logits, without the last softmax"
    )
    return _finding("logits", not probable, "outputs are logits", text, failed=False)


def _largest(values: Tensor) -> tuple[int, float]:
    """The most frequent of class numbers [N], and its share."""
    counts = values.bincount()
    return int(counts.argmax()), float(counts.max()) / len(values)


def _one_class(samples: Samples, class_names: Sequence[str]) -> Finding:
    """Does the model answer anything but one class?"""
    finite = samples.clean.isfinite().all(1)
    if finite.float().mean() < 0.5:
        return Finding("one_class", "ok", "not judged: most logits are not finite")
    answers, labels = samples.clean[finite].argmax(1), samples.labels[finite]
    (answer, share), (_, most) = _largest(answers), _largest(labels)
    text = (
        f"{share:.1%} of {len(answers)} images are taken for one class, {class_names[answer]}, which is the label of "
        f"{float((labels == answer).float().mean()):.1%}: nothing can fool a constant, so its robust accuracy is that "
        "share and says nothing; training has collapsed (lower the learning rate or eps, or warm up) or the weights or "
        "the normalisation do not belong to the model"
    )
    good = share < ALMOST_ALL or most >= share
    fine = f"the most frequent answer, {class_names[answer]}, is given to {share:.1%} of the images"
    return _finding("one_class", good, fine, text, failed=share == 1.0)


def _labels(labels: Tensor, class_names: Sequence[str]) -> Finding:
    only, share = _largest(labels)
    text = (
        f"all {len(labels)} images are labelled {class_names[only]}: a constant would have 100 %; evaluate images of "
        "all classes, in mixed order where only the first are taken"
    )
    return _finding("labels", share < 1.0 or len(labels) < 2 * len(class_names), "labels vary", text, failed=False)


def _accuracy(correct: NDArray[np.bool_], samples: Samples) -> Finding:
    share, classes, (_, largest) = float(correct.mean()), samples.clean.shape[1], _largest(samples.labels)
    no_better = largest < 1.0 and share <= largest
    told = (
        f"clean accuracy {share:.1%} is no more than always answering the largest class gives, {largest:.1%}"
        if no_better and share > 1.2 / classes
        else f"clean accuracy {share:.1%} is about that of guessing among {classes} classes"
    )
    text = f"{told}; do the labels belong to this model, and does it normalise its images itself?"
    good = share > 1.2 / classes and not no_better
    fine = f"clean accuracy {share:.1%}; the largest class has {largest:.1%} of the images"
    return _finding("clean_accuracy", good, fine, text, failed=False)


def input_gradient(subject: Subject, x: Tensor, y: Tensor) -> Tensor | None:
    """Return the gradient of the cross-entropy, [B, ...]; None if none reaches the images."""
    with torch.enable_grad():
        asked = x.detach().requires_grad_()
        logits = subject.logits(asked)
        if not logits.requires_grad:
            return None
        return torch.autograd.grad(cross_entropy(logits, y).sum(), asked, allow_unused=True)[0]


def _other_than(attacks: Set[str], known: Sequence[str]) -> str:
    """Those of some attacks that have not been run, as advice names them; of all that have been run, all."""
    return ", ".join([name for name in known if name not in attacks] or ["the least of those that were run"])


def _gradients(subject: Subject, x: Tensor, y: Tensor, attacks: Set[str]) -> list[Finding]:
    parts = zip(torch.split(x, subject.batch_size), torch.split(y, subject.batch_size), strict=True)
    found = [input_gradient(subject, *part) for part in parts]
    reaches = all(part is not None for part in found)
    gradient = torch.cat(cast("list[Tensor]", found)) if reaches else torch.zeros_like(x)
    blocked = (
        "no gradient reaches the images (detach, no_grad or a step that has none), so gradient attacks are blind; "
    )
    flow = _finding(
        "gradient_flow", reaches, "gradients reach the images", blocked + "attack a model without that step"
    )
    flat = ~gradient.isfinite() | (gradient == 0)
    share = float(flat.flatten(1).all(1).float().mean())
    text = (
        f"the gradient of the cross-entropy is exactly zero on {share:.0%} of {len(x)} images, as with saturated or "
        "quantised outputs: gradient attacks on this loss are blind there; believe attacks without "
        f"them and margin losses ({_other_than(attacks, ('square', 'autoattack'))}), and attack a smooth surrogate"
    )
    return [flow, _finding("zero_gradient", share == 0, "no image has gradient zero", text, failed=share >= 0.5)]


def _fooled(search: Search, threat: Threat, subject: Subject, samples: Samples, rows: Iterable[int], seed: int) -> int:
    """How many of the rows a search fools."""
    outcomes: list[Try] = []
    streams = Streams.of(seed, samples.keys).fork("diagnostics")
    Hunt(search, threat, subject, samples, streams, rows, known={}, check_every=1, on_try=outcomes.append).run()
    return sum(outcome.fooled for outcome in outcomes)


def check_attacks(
    subject: Subject, samples: Samples, correct: NDArray[np.bool_], threat: Threat, seed: int
) -> list[Finding]:
    """Do attacks behave as attacks must on a few samples: more steps find more, and a large eps finds everything?"""
    rows = np.flatnonzero(correct)[:PROBES].tolist()
    if not rows:
        return []

    def fooled(eps: float, **fields: Any) -> int:
        search = registry.build({"name": "pgd", **fields})
        assert isinstance(search, Search)
        return _fooled(search, threat.within(eps), subject, samples, rows, seed)

    few, many = fooled(threat.eps, steps=10), fooled(threat.eps, steps=40)
    steps = (
        f"PGD with 40 steps fooled {many} of {len(rows)} samples, with 10 steps {few}: more steps must not find less; "
        "the loss surface misleads gradient attacks, so believe square and restarts rather than more steps"
    )
    rising = f"PGD-40 fooled {many} and PGD-10 {few} of {len(rows)}"
    more_steps = _finding("more_steps", few <= many + 1, rising, steps, failed=False)
    # Within this radius every image can be turned grey, and a grey image has one label for all.
    radius = threat.grey_radius(samples.fetch(torch.tensor(rows), torch.device("cpu")))
    if radius is None:
        return [more_steps, Finding("large_eps", "ok", f"not checked: no eps of {threat.kind} must fool every image")]
    grey = fooled(radius, steps=20, start="clean", step_size=radius / 4)
    left = 1.0 - grey / len(rows)
    large = (
        f"at {threat.kind} eps {radius:.3g}, where every image can be made plain grey, PGD left {left:.0%} of "
        f"{len(rows)} samples unfooled: gradients do not lead to adversarial examples, and robust accuracy measured "
        "with them is too high; look for saturation, quantisation or randomness in the model"
    )
    reached = f"PGD at eps {radius:.3g} left {left:.0%}"
    return [
        more_steps,
        _finding("large_eps", left <= 0.05, reached, large, failed=left > 0.5),
    ]


def check_black_box(white: NDArray[np.bool_], black: NDArray[np.bool_]) -> list[Finding]:
    """Did attacks without gradients find what those with gradients did not?

    Args:
        white: bool [N], fooled by some attack that uses gradients.
        black: bool [N], fooled by some attack that uses none.
    """
    only, count = int((black & ~white).sum()), len(white)
    text = (
        f"{only} of {count} samples were fooled by the black-box attack alone: gradients are masked, and attacks that "
        "use them overrate the model; attack it without the step that hides them, or with more black-box queries"
    )
    good = only <= max(1.0, 0.002 * count)
    fine = f"the black-box attack alone fooled {only} of {count} samples"
    return [_finding("black_box", good, fine, text, failed=only > 0.05 * count)]


@dataclass(frozen=True)
class Audit:
    """Second search in float32, over samples that withstood one in bf16.

    Attributes:
        parts: labels of the searches.
        eps: the budget.
        survivors: images that withstood them.
        audited: how many of these were searched again.
        fell: how many of those did not withstand that.
        seconds: what it took.
    """

    parts: list[str]
    eps: float
    survivors: int
    audited: int
    fell: int
    seconds: float


def check_precision(audits: Sequence[Audit]) -> list[Finding]:
    """Did searches in bf16 overlook what they find in float32? Nothing to say if none was in bf16."""
    if not audits:
        return []
    audited, fell = sum(audit.audited for audit in audits), sum(audit.fell for audit in audits)
    low, high = wilson(fell, audited)
    names = ", ".join(dict.fromkeys(part for audit in audits for part in audit.parts))
    seen = (
        f"{fell} of {audited} images that withstood {names} in bf16, chosen at random, fell to it in float32 "
        f"(95 % interval {low:.1%} to {high:.1%}"
    )
    survivors = sum(audit.survivors for audit in audits)
    text = (
        f"{seen} of the {survivors} that withstood it): low precision hides adversarial examples, and robust accuracy "
        "is too high by that share; evaluate in float32 (--precision float32)"
    )
    return [_finding("precision", not fell, f"{seen})", text, failed=fell > 0.05 * audited)]


def check_curve(curve: Sequence[Mapping[str, Any]], count: int, attacks: Set[str] = frozenset()) -> list[Finding]:
    """Does robust accuracy fall with eps?

    Args:
        curve: entries with `eps` and `robust_accuracy`, in order of eps.
        count: number of samples.
        attacks: registered names of the attacks that were run, which no advice names again.
    """
    rises = []
    for low, high in pairwise(curve):
        for name, before in low["robust_accuracy"].items():
            if high["robust_accuracy"][name] > before + max(1.5, 0.005 * count) / count:
                rises.append(f"{name} from eps {low['eps']:.4g} to {high['eps']:.4g}")
    text = (
        f"robust accuracy rises with eps ({'; '.join(rises)}), which a larger ball cannot cause: the attack fails to "
        "climb; use more steps or restarts" + ("" if "autoattack" in attacks else ", or autoattack")
    )
    return [_finding("curve", not rises, "robust accuracy falls with eps", text, failed=False)]


def check_single_steps(lines: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Did training on single steps come to withstand single steps alone?

    Args:
        lines: of a run's metrics; stages that train otherwise have no `watched_fgsm`, and if none has it nothing is
            found.
    """
    watched = [line for line in lines if "watched_fgsm" in line]
    bad = [line for line in watched if overfits_single_steps(line["watched_fgsm"], line["watched_pgd"])]
    if not watched:
        return []
    if not bad:
        return [Finding("catastrophic_overfitting", "ok", f"in none of {len(watched)} epochs on single steps")]
    line = bad[-1]
    text = (
        f"training on single steps overfitted catastrophically in {len(bad)} of {len(watched)} epochs, last in epoch "
        f"{line['epoch']} of stage {line['stage']}: of a few images {line['watched_fgsm']:.0%} stayed right under one "
        f"step of FGSM and {line['watched_pgd']:.0%} under a few of PGD; {AGAINST_OVERFITTING}"
    )
    return [Finding("catastrophic_overfitting", "warning", text)]


def described(findings: Iterable[Finding]) -> list[dict[str, str]]:
    """As `results.json` holds them."""
    return [asdict(finding) for finding in findings]
