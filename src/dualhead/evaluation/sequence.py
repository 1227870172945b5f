"""What a network learns and forgets as threats arrive one after another: the matrix of robust accuracies, and measures.

R[t][j] is robust accuracy after stage t under threat j. The measures are those of continual learning (Lopez-Paz and
Ranzato 2017, Gradient Episodic Memory, arXiv 1706.08840; Chaudhry et al. 2018, Riemannian Walk, arXiv 1801.10112) with
threats as tasks. A threat counts as learnt from the first stage on that trains against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dualhead.evaluation.results import Evaluation, interval, share
from dualhead.evaluation.union import column

KEPT: Final = "kept"
LOST: Final = "lost"
KNOWN: Final = "all known"
"""Whether training used attacks of threats that had been learnt before, did without, or knew all threats at once."""


MEASURES: Final = (
    "average_seen",
    "average_all",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "plasticity",
    "clean_drop",
    "union_forgetting",
)
"""What a row of a sequence holds beside accuracies; None where there is nothing to take a mean of."""


@dataclass(frozen=True)
class Visit:
    """The network after a stage of a sequence.

    Args:
        stage: its name.
        trained: by stage since the visit before, labels of the threats that it trained against.
        used: by stage, labels of all threats whose attacks it used, also to choose among epochs or weights.
        evaluation: under all threats of the sequence.
        forward_equivalents: cost of these stages' training, in forward passes of one image through the base model.
        seconds: of their training.
    """

    stage: str
    trained: tuple[tuple[str, ...], ...]
    used: tuple[tuple[str, ...], ...]
    evaluation: Evaluation
    forward_equivalents: float
    seconds: float


def robust_under(evaluation: Evaluation, threat: str) -> NDArray[np.bool_]:
    """Return which samples are right under all attacks within a threat, bool [N], in the order of their indices."""
    correct = evaluation.correct
    columns = [correct["clean"], *(right for name, right in correct.items() if name.endswith(column("", threat)))]
    return np.asarray(np.logical_and.reduce(columns))[np.argsort(evaluation.index)]


def arrivals(trained: Sequence[Sequence[str]], threats: Sequence[str]) -> dict[str, int]:
    """Return for each threat that is ever trained against the number of the first visit after that."""
    found: dict[str, int] = {}
    for number, names in enumerate(trained):
        for name in names:
            found.setdefault(name, number)
    return {name: found[name] for name in threats if name in found}


def old_attacks(trained: Sequence[Sequence[str]], used: Sequence[Sequence[str]]) -> list[str | None]:
    """Tell for each stage whether it used attacks of threats that had arrived before.

    Args:
        trained: by stage, labels of the threats that are trained against.
        used: by stage, labels of those that are used in any way.

    Returns:
        `kept` or `lost`; `all known` where all threats arrived at once; None before there is any old threat.
    """
    learnt: set[str] = set()
    current: set[str] = set()
    found: list[str | None] = []
    for new, seen in zip(trained, used, strict=True):
        if fresh := set(new) - learnt:
            current, learnt = fresh, learnt | fresh
        old = learnt - current
        found.append(KNOWN if not old and len(current) > 1 else None if not old else KEPT if old & set(seen) else LOST)
    return found


def _foremost(words: Sequence[str | None]) -> str | None:
    """Return what several stages come to: attacks that one of them kept were kept, and were lost if any lost them."""
    return next((word for word in (KEPT, LOST, KNOWN) if word in words), None)


def measures(
    matrix: Sequence[Sequence[float]],
    threats: Sequence[str],
    arrived: Mapping[str, int],
    specialists: Mapping[str, float] | None = None,
) -> list[dict[str, float | None]]:
    """Return what is made of the matrix after each of its rows.

    Args:
        matrix: R[t][j], fractions.
        threats: labels of the columns.
        arrived: by threat, the row after which it is learnt first; threats that never are, are left out.
        specialists: robust accuracy under a threat of the network that was made for it.

    Returns:
        For row T, None where there is nothing to take a mean of:

        * `average_seen`: mean R[T][j] over the threats learnt so far;
        * `average_all`: mean over all threats;
        * `forgetting`: mean over threats learnt before T of the highest R[t][j] since they were learnt, up to T - 1,
          less R[T][j];
        * `backward_transfer`: mean over these of R[T][j] less R[t][j] at the t when j was learnt;
        * `forward_transfer`: mean R[T][j] over the threats that are not learnt yet;
        * `plasticity`: mean over threats learnt so far of R[t][j] when j was learnt, less the specialist's.
    """
    values = np.asarray(matrix, dtype=np.float64)
    found = []
    for row in range(len(values)):
        seen = [(j, arrived[name]) for j, name in enumerate(threats) if arrived.get(name, len(values)) <= row]
        before = [(j, first) for j, first in seen if first < row]
        unseen = [j for j in range(len(threats)) if j not in {column for column, _ in seen}]
        known = [
            values[first, j] - specialists[threats[j]]
            for j, first in seen
            if specialists is not None and threats[j] in specialists
        ]
        found.append(
            {
                "average_seen": _mean([values[row, j] for j, _ in seen]),
                "average_all": float(values[row].mean()),
                "forgetting": _mean([values[first:row, j].max() - values[row, j] for j, first in before]),
                "backward_transfer": _mean([values[row, j] - values[first, j] for j, first in before]),
                "forward_transfer": _mean([values[row, j] for j in unseen]),
                "plasticity": _mean(known),
            }
        )
    return found


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def of_specialists(specialists: Sequence[Evaluation], threats: Sequence[str]) -> dict[str, float]:
    """Return for each threat the highest robust accuracy of the given networks; none where there are no networks."""
    if not specialists:
        return {}
    return {threat: max(share(robust_under(one, threat)) for one in specialists) for threat in threats}


def plasticity(told: Mapping[str, Any], specialists: Mapping[str, float]) -> float | None:
    """Return `plasticity` at the end of a sequence whose specialists became known later; see `measures`.

    Args:
        told: what `describe_sequence` gave.
        specialists: by threat.
    """
    stages = [row["stage"] for row in told["rows"]]
    matrix = [[row["robust_accuracy"][name] for name in told["threats"]] for row in told["rows"]]
    arrived = {threat: stages.index(stage) for threat, stage in told["arrived"].items()}
    return measures(matrix, told["threats"], arrived, specialists)[-1]["plasticity"]


def describe_sequence(
    visits: Sequence[Visit], threats: Sequence[str], specialists: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Return what `results.json` holds under `sequence`.

    Args:
        visits: in order.
        threats: labels, in order.
        specialists: by threat, the robust accuracy of the network that was made for it; None or empty: not known.

    Returns:
        `threats`; `old_attacks` of the whole (`kept` if any stage kept them); `arrived`, by threat the stage that
        learnt it; and `rows`, one for each visit: `stage`, `old_attacks`, `trained_against`, `clean_accuracy`,
        `robust_accuracy` by threat, `union` (right under all of them) with Wilson intervals, `clean_drop` since the
        first visit, `union_forgetting` since the best one, the `measures`, and `training_cost` up to it.
    """
    trained = [[name for stage in visit.trained for name in stage] for visit in visits]
    arrived = arrivals(trained, threats)
    by_stage = iter(old_attacks([of for v in visits for of in v.trained], [of for v in visits for of in v.used]))
    old = [_foremost([next(by_stage) for _ in visit.trained]) for visit in visits]
    right = [[robust_under(visit.evaluation, threat) for threat in threats] for visit in visits]
    matrix = [[share(column) for column in row] for row in right]
    made = measures(matrix, threats, arrived, specialists or None)
    rows: list[dict[str, Any]] = []
    forward, seconds, best = 0.0, 0.0, 0.0
    for number, visit in enumerate(visits):
        union = np.logical_and.reduce(right[number])
        forward, seconds = forward + visit.forward_equivalents, seconds + visit.seconds
        clean = visit.evaluation.clean_accuracy
        rows.append(
            {
                "stage": visit.stage,
                "old_attacks": old[number],
                "trained_against": trained[number],
                "clean_accuracy": clean,
                "robust_accuracy": dict(zip(threats, matrix[number], strict=True)),
                "union": share(union),
                "intervals": {
                    "clean_accuracy": list(visit.evaluation.intervals["clean_accuracy"]),
                    **{name: interval(column) for name, column in zip(threats, right[number], strict=True)},
                    "union": interval(union),
                },
                **made[number],
                "clean_drop": rows[0]["clean_accuracy"] - clean if rows else 0.0,
                "union_forgetting": max(best - share(union), 0.0),
                "training_cost": {"forward_equivalents": round(forward, 1), "seconds": round(seconds, 1)},
            }
        )
        best = max(best, share(union))
    return {
        "threats": list(threats),
        "old_attacks": _foremost(old),
        "arrived": {threat: visits[number].stage for threat, number in arrived.items()},
        **({"specialists": dict(specialists)} if specialists else {}),
        "rows": rows,
    }
