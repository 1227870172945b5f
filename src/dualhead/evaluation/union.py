"""Several threats in one evaluation: a column for each attack under each, and what stands under all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dualhead.errors import UserError
from dualhead.evaluation.paired import same_names
from dualhead.evaluation.results import Evaluation, accuracies, balanced, interval, per_class, share
from dualhead.evaluation.transfer import TRANSFER
from dualhead.report import other_images, threat_text
from dualhead.threats import Threat

_WORSE = {"ok": 0, "warning": 1, "failed": 2}


def threat_labels(threats: Sequence[Threat]) -> list[str]:
    """Return the column name of each threat: its kind, with its budget where two share a kind.

    Raises:
        UserError: if one is named twice.
    """
    kinds = [threat.kind for threat in threats]
    labels = [threat.kind if kinds.count(threat.kind) == 1 else f"{threat.kind} {threat.eps:g}" for threat in threats]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"threat {label} is named twice")
    return labels


def column(attack: str, threat: str) -> str:
    """The name of an attack's column under a threat: `autoattack@L2`."""
    return f"{attack}@{threat}"


def merged(parts: Mapping[str, Evaluation], class_names: list[str], left_out: Sequence[str] = ()) -> Evaluation:
    """One evaluation of those of the same model and samples under several threats.

    An image counts as right in `worst` if it is right in every column: under every attack and every threat.

    Args:
        parts: evaluations by the threats' labels, in the order of the columns.
        class_names: of all classes.
        left_out: sentences on attacks that a threat was not tried with.
    """
    first = next(iter(parts.values()))
    verdicts, records = {}, {}
    for label, part in parts.items():
        for name, verdict in part.verdicts.items():
            verdicts[column(name, label)] = verdict
            records[column(name, label)] = part.results["attacks"][name]
    evaluation = Evaluation(first.index, first.labels, first.clean_prediction, verdicts, {}, measured=first.measured)
    transfer = _transfer(parts, evaluation)
    correct = evaluation.correct
    under = {
        label: np.logical_and.reduce([correct["clean"], *(verdict.robust for verdict in part.verdicts.values())])
        for label, part in parts.items()
    }
    evaluation.results = {
        **first.results,
        **transfer,
        "threat": {"union": [part.results["threat"] for part in parts.values()]},
        **accuracies(correct),
        **balanced(correct, first.labels),
        "threats": {
            label: {"robust_accuracy": share(right), "interval": interval(right)} for label, right in under.items()
        },
        "average": share(np.stack(list(under.values()))),
        "attacks": records,
        "curve": [],
        "per_class": per_class(correct, first.labels, class_names),
        "diagnostics": _diagnostics(parts),
        "left_out": list(left_out),
        "seconds": sum(part.results["seconds"] for part in parts.values()),
    }
    return evaluation


def _transfer(parts: Mapping[str, Evaluation], whole: Evaluation) -> dict[str, Any]:
    """Return what images made against another network say under all threats together; empty if there are none."""
    told = {label: part.results[TRANSFER] for label, part in parts.items() if TRANSFER in part.results}
    if not told:
        return {}
    attacks = {column(name, label): each for label, one in told.items() for name, each in one["attacks"].items()}
    right = {column(name, label): of for label, part in parts.items() for name, of in part.transferred.items()}
    whole.transferred = right
    together = np.logical_and.reduce([whole.correct["clean"], *right.values()])
    first = next(iter(told.values()))
    return {TRANSFER: {**first, "accuracy": share(together), "interval": interval(together), "attacks": attacks}}


def _diagnostics(parts: Mapping[str, Evaluation]) -> list[dict[str, str]]:
    """Each check once, with its worst outcome; where threats differ in it, which of them it is of."""
    found: dict[str, list[tuple[str, dict[str, str]]]] = {}
    for label, part in parts.items():
        for entry in part.results["diagnostics"]:
            found.setdefault(entry["name"], []).append((label, entry))
    told = []
    for name, entries in found.items():
        worst = max((entry["status"] for _, entry in entries), key=_WORSE.__getitem__)
        of = [(label, entry["message"]) for label, entry in entries if entry["status"] == worst]
        messages = list(dict.fromkeys(message for _, message in of))
        if len(messages) > 1 or len(of) < len(entries):
            messages = [f"under {label}: {message}" for label, message in of]
        told.append({"name": name, "status": worst, "message": "; ".join(messages)})
    return told


def against_specialists(evaluation: Evaluation, specialists: Sequence[Evaluation]) -> dict[str, float]:
    """Accuracies as shares of what models reach that are made for one threat (MultiRobustBench).

    Dai et al. 2023, MultiRobustBench, arXiv 2302.10980, section 4: each accuracy is divided by a specialist's, and the
    mean and the least of these are told. Here the specialist of a threat is the one of those given that does best under
    it, and clean accuracy's is the one that does best there.

    Args:
        evaluation: under several threats.
        specialists: others of the same threats and attacks, on any samples; but not on other images of the same names.

    Returns:
        `clean`, each threat, and `average` and `worst` over all of these; a share above 1 beats the specialist.

    Raises:
        UserError: if they are not of the same threats and attacks, one is of other data, or no specialist is right
            anywhere in one of them.
    """
    if "threats" not in evaluation.results:
        raise UserError("specialists are for evaluations under several threats; give --threat more than once")
    for number, other in enumerate(specialists, 1):
        if (other.results["threat"], set(other.verdicts)) != (evaluation.results["threat"], set(evaluation.verdicts)):
            raise UserError(
                f"specialist {number} was measured under {threat_text(other.results['threat'])}, not with the same "
                f"attacks under {threat_text(evaluation.results['threat'])}; evaluate all of them alike"
            )
        if same_names(evaluation, other) and other_images(evaluation.results, other.results):
            raise UserError(
                f"specialist {number} was measured on other images of the same indices; evaluate all of them on the "
                "same data"
            )
    shares = {"clean": (evaluation.clean_accuracy, max(other.clean_accuracy for other in specialists))}
    for label, told in evaluation.results["threats"].items():
        best = max(other.results["threats"][label]["robust_accuracy"] for other in specialists)
        shares[label] = (told["robust_accuracy"], best)
    for label, (_, best) in shares.items():
        if best == 0:
            raise UserError(f"no specialist is right in a single image under {label}; nothing can be divided by that")
    parts: dict[str, Any] = {label: own / best for label, (own, best) in shares.items()}
    return {**parts, "average": sum(parts.values()) / len(parts), "worst": min(parts.values())}
