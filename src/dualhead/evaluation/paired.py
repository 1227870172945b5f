"""Two evaluations of the same samples, compared sample by sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dualhead.errors import UserError
from dualhead.evaluation.results import Evaluation
from dualhead.statistics import Paired, mcnemar, paired_shares


def compare(first: Evaluation | str | Path, second: Evaluation | str | Path) -> dict[str, Paired]:
    """Run McNemar's exact test for clean accuracy and each attack that both faced, `paired_shares` for corruptions.

    Args:
        first: an evaluation, or the folder that `evaluate` wrote.
        second: the same; a `gain` is one of the second over the first.

    Returns:
        By `clean`, each common attack, `worst` if both faced the same attacks, and `corruptions` if both hold which
        corrupted images are right.

    Raises:
        UserError: if the samples or the threat models differ.
    """
    a = first if isinstance(first, Evaluation) else Evaluation.load(first)
    b = second if isinstance(second, Evaluation) else Evaluation.load(second)
    if a.results["threat"] != b.results["threat"]:
        raise UserError(
            f"threat models differ: {a.results['threat']} and {b.results['threat']}; evaluate both under one"
        )
    if a.num_samples != b.num_samples or set(a.index) != set(b.index):
        raise UserError(
            f"the evaluations are of different samples ({a.num_samples} and {b.num_samples}); evaluate both on the same"
        )
    by_a, by_b = np.argsort(a.index), np.argsort(b.index)
    if not np.array_equal(a.labels[by_a], b.labels[by_b]):
        raise UserError("the labels of the samples differ; these are different data")
    both = ["clean", *(name for name in a.verdicts if name in b.verdicts)]
    if a.verdicts and a.verdicts.keys() == b.verdicts.keys():
        both.append("worst")
    left, right = a.correct, b.correct
    found = {name: mcnemar(left[name][by_a], right[name][by_b]) for name in both}
    mine, theirs = a.shares, b.shares
    alike = [name for name in mine if name in theirs and rendered_alike(a, b, name) and a.num_samples > 1]
    return found | {name: paired_shares(mine[name][by_a], theirs[name][by_b]) for name in alike}


def rendered_alike(first: Evaluation, second: Evaluation, name: str) -> bool:
    """Whether two evaluations showed the same kinds of changed images: of the same rendering, in the same order."""
    a, b = first.results[name], second.results[name]
    facts = [{key: each[key] for key in each if key not in ("accuracy", "interval", "kinds")} for each in (a, b)]
    return facts[0] == facts[1] and list(a["kinds"]) == list(b["kinds"])
