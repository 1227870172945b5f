"""The command line in this process, and the shortest run that there can be."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from functools import cache
from unittest import mock

import pytest
import typer.main

from dualhead.commands.cli import main

TINY = (
    "model.backbone={name: cnn, width: 4, stages: 2, convolutions: 1}",
    "data.train_limit=400",
    "data.validation=40",
    "stages.*.epochs=1",
    "stages.*.attack.steps=2",
    "validation.attack.steps=2",
    "evaluate.limit=48",
    "evaluate.attacks=[pgd-3]",
    "runtime.device=cpu",
)
"""Overrides that make a run of `digits` as short as can be."""


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str

    @property
    def error_line(self) -> str:
        """What standard error holds, which must be one line."""
        lines = self.err.splitlines()
        assert len(lines) == 1, f"{len(lines)} lines on standard error:\n{self.err}"
        assert "Traceback" not in self.err + self.out
        assert lines[0].startswith("dualhead: ")
        return lines[0].removeprefix("dualhead: ")


commands_of = cache(typer.main.get_command)
"""The tree of commands, which takes longer to build than most wrong input to refuse, and holds nothing of a call."""


def dualhead(*arguments: object) -> Ended:
    """`dualhead ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["dualhead", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(typer.main, "get_command", commands_of),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    code = ended.value.code
    return Ended(code if isinstance(code, int) else 0 if code is None else 1, out.getvalue(), err.getvalue())
