"""The log of a run: one JSON object a line, for every finished epoch; TensorBoard beside it if it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dualhead.errors import UserError
from dualhead.system.files import write_text
from dualhead.system.processes import group


def summary_writer() -> Any:
    """TensorBoard's class, which may not be there.

    Raises:
        UserError: if TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        hint = "pip install 'dualhead[tensorboard]'"
        raise UserError(f"runtime.tensorboard: TensorBoard is not installed; {hint}") from None
    return SummaryWriter


class MetricsLog:
    """`metrics.jsonl` of a run; of several processes the first one writes it.

    Args:
        path: the file.
        keep: tells for a line that stands there already whether it stays: a run that goes on from a checkpoint drops
            the lines that came after it. None: all stay.
        tensorboard: folder for TensorBoard's event files; None for none.

    Raises:
        UserError: if TensorBoard is asked for and not installed.
    """

    def __init__(
        self, path: Path, keep: Callable[[Mapping[str, Any]], bool] | None = None, tensorboard: Path | None = None
    ) -> None:
        self._path = path
        self._writer: Any = None
        if not group().first:
            return
        kept = [line for line in read_metrics(path) if keep is None or keep(line)]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        if tensorboard is not None:
            self._writer = summary_writer()(str(tensorboard))

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        if not group().first:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(line)) + "\n")
        if self._writer is not None:
            for key, value in line.items():
                if isinstance(value, int | float) and key not in ("epoch", "step"):
                    self._writer.add_scalar(f"{line['stage']}/{key}", value, line["step"])
            self._writer.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that a crash cut short is left out. No file is no lines."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines
