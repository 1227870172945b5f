"""Labels as numbers of classes, and the names of these."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dualhead.data.names import in_order, one_form
from dualhead.errors import UserError

_MANY_CLASSES: Final = 10_000  # a few rows may well have large labels, but not larger than this

_log = logging.getLogger(__name__)


def numbered(
    labels: Sequence[NDArray[Any]], theirs: Sequence[NDArray[Any]], named: Sequence[str] | None, column: str
) -> tuple[list[NDArray[np.int64]], list[str]]:
    """Labels as numbers of classes, and the names of these.

    Args:
        labels: numbers or text of the part.
        theirs: of the other part; both have the same classes.
        named: the names, if they are known.
        column: for messages.
    """
    kinds = {values.dtype.kind in "OU" for values in labels}
    theirs = [values for values in theirs if (values.dtype.kind in "OU") in kinds]
    if kinds == {False}:
        numbers = [_whole(values, column) for values in labels]
        if named is not None:
            return numbers, list(named)
        if all(values.dtype.kind == "b" for values in labels):
            return numbers, ["False", "True"]
        return numbers, _numbered_classes([*numbers, *(_whole(values, column) for values in theirs)], column)
    texts = [[one_form(str(value)) for value in values.tolist()] for values in labels]
    found = {name for part in texts for name in part} | {one_form(str(v)) for p in theirs for v in p.tolist()}
    names = in_order(found) if named is None else list(named)
    if strange := sorted(found - set(names)):
        told = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise UserError(f"{column}: {strange[0]!r} is none of the class names ({told}); name all classes")
    number = {name: place for place, name in enumerate(names)}
    return [np.array([number[name] for name in part], np.int64) for part in texts], names


def _whole(values: NDArray[Any], column: str) -> NDArray[np.int64]:
    if values.dtype.kind == "f" and not (whole := (values == np.round(values)) & np.isfinite(values)).all():
        strange = values[~whole][0]
        raise UserError(f"column {column!r} holds numbers such as {strange:g}: labels are whole numbers, or text")
    return values.astype(np.int64)


def _numbered_classes(labels: Sequence[NDArray[np.int64]], column: str) -> list[str]:
    largest = max(int(numbers.max(initial=-1)) for numbers in labels)
    if largest >= max(_MANY_CLASSES, sum(map(len, labels))):
        raise UserError(f"column {column!r} holds numbers up to {largest}, more than there are rows: not class labels")
    seen = np.unique(np.concatenate([numbers[numbers >= 0] for numbers in labels]))
    missing = sorted(set(range(largest + 1)) - set(seen.tolist()))
    if missing == [0]:
        _log.warning("column %r: no image has label 0; counted from 0 to %d, class 0 has none", column, largest)
    elif missing:
        _log.warning(
            "column %r: labels go from 0 to %d, and no image has %s: %d classes, of which %d have images; store the "
            "names of classes as text if there are no others", column, largest, _few_numbers(missing), largest + 1,
            len(seen),
        )  # fmt: skip
    return [str(number) for number in range(largest + 1)]


def _few_numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:6])) + (f" and {len(numbers) - 6} more" if len(numbers) > 6 else "")


def check_labels(numbers: NDArray[np.int64], num_classes: int, place: Callable[[int], str]) -> None:
    """Refuse labels that are no class; `place` names the file and row of a position among them."""
    wrong = ((numbers < 0) | (numbers >= num_classes)).nonzero()[0]
    if len(wrong):
        number = numbers[wrong[0]]
        hint = " (-1 often marks a part without labels)" if number == -1 else ""
        allowed = f"labels must lie in 0..{num_classes - 1}"
        raise UserError(f"{place(int(wrong[0]))} has label {number}{hint}; {allowed}")
