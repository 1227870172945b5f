"""Types of fields that components and sections of a recipe share."""

from __future__ import annotations

import math
from dataclasses import Field, field
from numbers import Integral
from numbers import Real as Number
from typing import Annotated, Any

from pydantic import BeforeValidator

from dualhead.errors import UserError


def parse_real(value: object) -> float:
    """A finite number from a number, also one of numpy, or from text such as `8/255` or `0.031`.

    Raises:
        UserError: if it is neither.
    """
    try:
        if isinstance(value, bool) or not isinstance(value, Number | str):
            raise ValueError
        above, slash, below = value.partition("/") if isinstance(value, str) else (value, "", "")
        number = float(above) / float(below if slash else 1)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise UserError(f"{value!r} is not a number; write it like 0.031 or 8/255") from None
    if not math.isfinite(number):
        raise UserError(f"{value!r} is not finite; write a number like 0.031 or 8/255")
    return number


Real = Annotated[float, BeforeValidator(parse_real)]
"""A float that may also be written as a fraction, for fields of recipes."""


def at_least(bound: float, name: str, value: float | None, usual: str = "") -> None:
    """Refuse a number below a bound, NaN and infinity.

    Args:
        bound: the smallest that is allowed.
        name: of the field.
        value: of the field; None, where that is allowed, passes.
        usual: what would be right, for the message.

    Raises:
        UserError: naming the field.
    """
    if value is not None and not bound <= value < math.inf:
        raise UserError(_refusal(f"{name} must be at least {bound:g}", value, usual))


def whole(name: str, value: object, least: int | None = None) -> None:
    """Refuse what is no whole number.

    Args:
        name: of the field.
        value: of the field.
        least: the smallest that is allowed; None for any.

    Raises:
        UserError: naming the field.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{name} must be a whole number, got {value!r}")
    if least is not None:
        at_least(least, name, int(value))


def above(bound: float, name: str, value: float | None, usual: str = "") -> None:
    """Refuse a number that is not greater than a bound, NaN and infinity.

    Args:
        bound: all that are allowed are greater.
        name: of the field.
        value: of the field; None, where that is allowed, passes.
        usual: what would be right, for the message.

    Raises:
        UserError: naming the field.
    """
    if value is not None and not bound < value < math.inf:
        raise UserError(_refusal(f"{name} must be greater than {bound:g}", value, usual))


def _refusal(rule: str, value: float, usual: str) -> str:
    finite = "" if math.isfinite(value) else " and finite"
    return f"{rule}{finite}, got {value:g}" + (f"; {usual}" if usual else "")


_UNLESS_GIVEN = "left out of what is written, unless given"


def unless_given() -> Any:
    """Return a field of a component that is None by default and is then left out of what describes the component.

    For fields that came later: results and journals from before still describe the same component.
    """
    return field(default=None, metadata={_UNLESS_GIVEN: True})


def is_written(of: Field[Any], value: Any) -> bool:
    """Tell whether a field with this value stands in what describes a component."""
    return value is not None or _UNLESS_GIVEN not in of.metadata
