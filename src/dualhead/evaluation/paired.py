"""Two evaluations of the same samples, compared sample by sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dualhead.errors import UserError
from dualhead.evaluation.results import Evaluation
from dualhead.report import other_images, threat_text
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
        UserError: if the samples, their images or the threat models differ.
    """
    a = first if isinstance(first, Evaluation) else Evaluation.load(first)
    b = second if isinstance(second, Evaluation) else Evaluation.load(second)
    names = (
        f"the {place} evaluation" if isinstance(given, Evaluation) else str(given)
        for place, given in (("first", first), ("second", second))
    )
    refuse_unlike(a, b, *names)
    by_a, by_b = np.argsort(a.index), np.argsort(b.index)
    both = ["clean", *(name for name in a.verdicts if name in b.verdicts)]
    if a.verdicts and a.verdicts.keys() == b.verdicts.keys():
        both.append("worst")
    left, right = a.correct, b.correct
    found = {name: mcnemar(left[name][by_a], right[name][by_b]) for name in both}
    mine, theirs = a.shares, b.shares
    alike = [name for name in mine if name in theirs and rendered_alike(a, b, name) and a.num_samples > 1]
    return found | {name: paired_shares(mine[name][by_a], theirs[name][by_b]) for name in alike}


def refuse_unlike(first: Evaluation, second: Evaluation, first_name: str, second_name: str) -> None:
    """Refuse two evaluations that cannot be compared sample by sample.

    Args:
        first: one of them.
        second: the other one.
        first_name: what messages call the first.
        second_name: and the second.

    Raises:
        UserError: if the threat models, the samples, their labels or their images differ.
    """
    both, told = f"{first_name} and {second_name}", (first.results["threat"], second.results["threat"])
    if told[0] != told[1]:
        raise UserError(
            f"threat models differ: {first_name} was measured under {threat_text(told[0])}, {second_name} under "
            f"{threat_text(told[1])}; evaluate both under one"
        )
    if first.num_samples != second.num_samples:
        raise UserError(
            f"{both} were measured on different samples ({first.num_samples} and {second.num_samples}); evaluate both "
            "on the same"
        )
    if not same_names(first, second):
        raise UserError(f"{both} were measured on different samples, by their index; evaluate both on the same")
    by_first, by_second = np.argsort(first.index), np.argsort(second.index)
    if not np.array_equal(first.labels[by_first], second.labels[by_second]):
        raise UserError(f"{both} have different labels for the same samples; these are different data")
    if other_images(first.results, second.results):
        raise UserError(
            f"{both} were measured on different images of the same indices and labels; evaluate both on the same"
        )


def same_names(first: Evaluation, second: Evaluation) -> bool:
    """Whether two evaluations are of samples of the same names, in any order."""
    return set(first.index.tolist()) == set(second.index.tolist())


def rendered_alike(first: Evaluation, second: Evaluation, name: str) -> bool:
    """Whether two evaluations showed the same kinds of changed images: of the same rendering, in the same order."""
    a, b = first.results[name], second.results[name]
    facts = [{key: each[key] for key in each if key not in ("accuracy", "interval", "kinds")} for each in (a, b)]
    return facts[0] == facts[1] and list(a["kinds"]) == list(b["kinds"])
