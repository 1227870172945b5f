"""Where the time of a training step goes: a few steps under torch's profiler, as a table and as a trace."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerAction, record_function

from dualhead.system.files import write_atomically, write_text

logger = logging.getLogger(__name__)

SKIPPED = 2
"""Steps before: the first counts operations and pays for allocation, in the second the profiler warms up."""
STEPS = 3
"""Steps that are looked at."""
SECTIONS = ("load images", "frozen prefix", "attack", "loss: forward", "loss: backward", "update", "end of epoch")
"""Labels that the loop sets, as a trace shows them; the rest of a step is in none of them."""
OPERATORS = 25
"""Lines of the table of operators."""

T = TypeVar("T")


def labelled(name: str, items: Iterable[T]) -> Iterator[T]:
    """Return the items, the making of each under a name that a profile shows."""
    iterator, end = iter(items), object()
    while True:
        with record_function(name):
            item: Any = next(iterator, end)
        if item is end:
            return
        yield item


def _all_threads() -> _ExperimentalConfig | None:
    """Return settings that let a profile see the threads that attacks run in; torch calls them experimental."""
    try:
        return _ExperimentalConfig(profile_all_threads=True)
    except TypeError:
        logger.warning("this torch cannot look into other threads: the profile lacks what attacks do in lanes")
        return None


class StepProfiler:
    """Looks at a few steps of a stage and writes what it saw; used as a context around all steps. Results stay.

    `STAGE.txt` says which section of a step took how long, and which operators; `STAGE.json` is a trace for
    chrome://tracing or Perfetto. A stage with too few steps is told in the log.

    Args:
        folder: for both files.
        stage: its name.
        device: where it trains; another than the CPU is looked at too.
    """

    def __init__(self, folder: Path, stage: str, device: torch.device) -> None:
        self._folder, self._stage, self._device = folder, stage, device
        self._written = False
        self._profile = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=SKIPPED - 1, warmup=1, active=STEPS, repeat=1),
            on_trace_ready=self._write,
            experimental_config=_all_threads(),
        )

    def __enter__(self) -> Self:
        """Begin."""
        self._profile.start()
        return self

    def __exit__(self, *raised: object) -> None:
        """End, also before the steps are over."""
        if not self._written:
            self._profile.on_trace_ready = None  # of steps that are not whole
            logger.warning(
                "stage %s: no profile, since it ended before its step %d", self._stage, SKIPPED + STEPS
            )  # fmt: skip
        if self._profile.current_action != ProfilerAction.NONE:
            self._profile.stop()

    def step(self) -> None:
        """Note that a step is over."""
        if not self._written:
            self._profile.step()

    def _write(self, profile: Any) -> None:
        self._written = True
        trace = self._folder / f"{self._stage}.json"
        write_atomically(trace, lambda path: profile.export_chrome_trace(str(path)))
        averages = profile.key_averages()
        on_device = self._device.type != "cpu"
        lines = [f"stage {self._stage}: {STEPS} steps after the first {SKIPPED}", *self._parts(averages)]
        by = "self_device_time_total" if on_device else "self_cpu_time_total"
        write_text(
            self._folder / f"{self._stage}.txt", "\n".join(lines) + "\n\n" + averages.table(by, row_limit=OPERATORS)
        )

    @staticmethod
    def _parts(averages: Any) -> list[str]:
        """Return a line for each section of a step: seconds of the host, and its share."""
        seconds = {event.key: event.cpu_time_total / 1e6 / STEPS for event in averages}
        whole = next(value for name, value in seconds.items() if name.startswith("ProfilerStep"))
        sections = {name: seconds[name] for name in SECTIONS if name in seconds}
        sections |= {"rest": whole - sum(sections.values()), "a step": whole}
        return [f"  {name:16s} {value:10.4f} s  {value / whole:6.1%}" for name, value in sections.items()]
