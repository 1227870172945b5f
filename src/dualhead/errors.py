"""The two ways in which a run can end badly, told apart by who can mend it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_LONGEST: Final = 1000


def one_line(text: str) -> str:
    """Fit text on one line of a terminal: blanks for white space, unprintable characters escaped, length bounded.

    Messages quote what stood in somebody's file, which may hold line breaks and what steers a terminal.
    """
    if len(text) > _LONGEST:  # what is wrong stands at its beginning and its end, what is quoted in between
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))


class UserError(ValueError):
    """Bad input: the message is one line that says what is wrong, where, and what would be right (exit status 2)."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class RunError(RuntimeError):
    """A run failed although its input was right; what it had saved is kept (exit status 1)."""


class Interrupted(RunError):  # noqa: N818  # not an error of anybody's
    """A run was asked to stop, and saved itself first (exit status 75): the same command goes on."""


@contextmanager
def under(where: str) -> Iterator[None]:
    """Put where it happened, such as a key of a recipe, before the message of a `UserError`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
