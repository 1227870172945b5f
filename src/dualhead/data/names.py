"""Names of classes: which number a class has, and which class of another set it is."""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from dualhead.data.split import Split
from dualhead.errors import UserError

_log = logging.getLogger(__name__)


def one_form(name: str) -> str:
    """A name in Unicode's composed form (NFC): some file systems hand out `é` as a letter and an accent."""
    return unicodedata.normalize("NFC", name)


def in_order(names: Iterable[str]) -> list[str]:
    """Names in the order in which classes are numbered: numbers by value, and all others by their letters."""
    found = list(names)
    return sorted(found, key=lambda name: (int(name), name)) if are_numbers(found) else sorted(found)


def are_numbers(names: Sequence[str]) -> bool:
    """Whether all of the names are whole numbers, each its own."""
    decimal = all(name.isdecimal() for name in names)
    return decimal and len({int(name) for name in names}) == len(names)


def match(given: Sequence[str], known: Sequence[str]) -> list[int] | None:
    """Find each name among others.

    Args:
        given: the names of classes.
        known: those of a set that may have more, in any order. Numbers are compared by value: `07` is `7`.

    Returns:
        The position in `known` of each name; None if a name is not there, or stands there twice.
    """
    if are_numbers(given) and are_numbers(known):
        places = {str(int(name)): place for place, name in enumerate(known)}
        given = [str(int(name)) for name in given]
    else:
        forms = [one_form(name) for name in known]
        given = [one_form(name) for name in given]
        if given == forms:
            return list(range(len(given)))
        counts = Counter(forms)
        places = {name: place for place, name in enumerate(forms) if counts[name] == 1}
    found = [places.get(name) for name in given]
    return [place for place in found if place is not None] if None not in found else None


def among(split: Split, known: Sequence[str], whose: str) -> Split:
    """Number the classes of a split as somebody else does: by name where both have names, else in their order.

    Args:
        split: images with labels.
        known: the names of the other's classes, in the order of their numbers; empty if it has none.
        whose: a word for the other, for messages.

    Returns:
        The split with the class names `known`; as it is if there are none or they are of another number, if they are
        numbers alone, or if they are other names.

    Raises:
        UserError: if some names are the other's and others are not.
    """
    given = split.class_names
    if not known:
        if list(given) != [str(number) for number in range(len(given))]:
            _log.warning(
                "%s does not name its classes: their order is trusted, so 0 is taken for %r, 1 for %r and so on",
                whose, given[0], given[1],
            )  # fmt: skip
        return split
    places = match(given, known)
    if places is not None:
        # Names that agree but for the form of their letters keep to the other's.
        return split if tuple(known) == given else split.numbered(places, known)
    if len(given) != len(known):
        return split
    forms = [one_form(name) for name in known]
    moved = [n for n, name in enumerate(map(one_form, given)) if name in forms and forms[n] != name]
    if moved and are_numbers(given) == are_numbers(known):
        place = moved[0]
        raise UserError(
            f"{given[place]!r} is class {place} of these images and class {forms.index(one_form(given[place]))} of "
            f"{whose}, so right answers would count as wrong; other names differ, so that names cannot decide: use "
            "the names of the classes that it was trained on"
        )
    if not are_numbers(given) and set(map(one_form, given)) & set(forms):
        strange = next(name for name in given if one_form(name) not in forms)
        raise UserError(
            f"{strange!r} is none of the classes of {whose}, which has others of these; rename or remove it"
        )
    if are_numbers(given) != are_numbers(known):
        _log.warning(
            "%s names its classes and these images number theirs, or the other way round: their order is trusted, so "
            "%r is taken for %r, %r for %r and so on", whose, given[0], known[0], given[1], known[1],
        )  # fmt: skip
        return split.numbered(range(len(given)), known) if are_numbers(given) else split
    place = next(
        place for place, names in enumerate(zip(map(one_form, given), forms, strict=True)) if len({*names}) > 1
    )
    _log.warning(
        "%s: class %d is called %r here and %r where it was trained; it is measured as if they were the same",
        whose, place, given[place], known[place],
    )  # fmt: skip
    return split
