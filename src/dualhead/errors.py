"""The two ways in which a run can end badly, told apart by who can mend it."""


class UserError(ValueError):
    """Bad input: the message is one line that says what is wrong, where, and what would be right (exit status 2)."""


class RunError(RuntimeError):
    """A run failed although its input was right; what it had saved is kept (exit status 1)."""


class Interrupted(RunError):  # noqa: N818  # not an error of anybody's
    """A run was asked to stop, and saved itself first (exit status 75): the same command goes on."""
