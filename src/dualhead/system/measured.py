"""Choices that a measurement decides: made once for a machine and kept, so that no result depends on how busy it was.

Each choice is a small JSON file in `measured/` in the cache's folder, named by what it depends on: the machine, torch,
the architecture and the shape of its images. It may be deleted at any time; the next run measures again. A file that
cannot be read or written is worth a line in the log and never an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dualhead.system.devices import describe_environment
from dualhead.system.files import write_json

_log = logging.getLogger(__name__)

_MACHINE = ("torch", "platform", "device", "accelerator", "cpu", "cpu_capability", "threads")


@dataclass(frozen=True)
class Measured:
    """A choice and where it comes from.

    Attributes:
        found: the content, JSON values.
        when: the day of the measurement, as 2026-11-29.
    """

    found: Any
    when: str

    @property
    def told(self) -> str:
        """In words, for results."""
        return f"measured on {self.when}, and kept for this machine and architecture"


def cache_folder() -> Path:
    """Where dualhead keeps what can be made again: `$DUALHEAD_CACHE`, `$XDG_CACHE_HOME/dualhead`, `~/.cache/dualhead`.

    The first of these that is set counts. As the XDG specification asks, a relative `$XDG_CACHE_HOME` does not.
    """
    if given := os.environ.get("DUALHEAD_CACHE"):
        return Path(given).expanduser()
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (caches if caches.is_absolute() else Path.home() / ".cache") / "dualhead"


def signature(model: nn.Module) -> str:
    """Return a digest of an architecture: its modules with their settings, and the shapes of parameters and buffers."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    shapes = [f"{name} {getattr(tensor, 'dtype', None)} {_shape(tensor)}" for name, tensor in tensors]
    printed = re.sub(r" at 0x[0-9a-f]+", "", str(model))  # functions among the settings are printed with their place
    return hashlib.sha256("\n".join([printed, *shapes]).encode()).hexdigest()


def _shape(tensor: Tensor) -> tuple[int, ...] | None:
    return None if nn.parameter.is_lazy(tensor) else tuple(tensor.shape)


def kept(
    what: str,
    model: nn.Module,
    example: Tensor,
    settings: Mapping[str, Any],
    measure: Callable[[], Any],
    fits: Callable[[Any], bool],
) -> Measured:
    """Return what was once measured for this machine and architecture; measure it now if nothing is kept.

    Args:
        what: is measured, in a few words.
        model: the network.
        example: a batch of images as the work will use; its shape and device count.
        settings: what else the result depends on, JSON values.
        measure: returns JSON values.
        fits: whether such a value can be used; one that cannot is measured again.
    """
    environment = describe_environment(example.device)
    depends = {
        "what": what,
        **{name: environment[name] for name in _MACHINE},
        "architecture": signature(model),
        "shape": list(example.shape),
        **settings,
    }
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "measured" / f"{digest[:32]}.json"
    if known := _read(path, fits):
        return known
    found = Measured(json.loads(json.dumps(measure())), datetime.now(UTC).date().isoformat())
    # Another process may have been faster: then its measurement counts, here too.
    return _read(path, fits) or _write(path, found, depends)


def _read(path: Path, fits: Callable[[Any], bool]) -> Measured | None:
    try:
        if not path.exists():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        if not fits(content["found"]):
            raise ValueError("it does not hold what it should")
        return Measured(content["found"], str(content["when"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        _log.warning("%s: cannot be read (%s); measured again", path, error or type(error).__name__)
        return None


def _write(path: Path, measured: Measured, depends: Mapping[str, Any]) -> Measured:
    try:
        write_json(path, {"found": measured.found, "when": measured.when, "depends_on": depends})
    except (OSError, ValueError) as error:  # the latter for times that are not finite
        _log.warning("what was measured is not kept for the next run: %s", error)
    return measured
