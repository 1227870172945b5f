"""An evaluation's results so far, on disk, so that it can be killed anywhere and go on.

A folder of small files that are written once, each under a temporary name and then renamed, hence never half there:
`identity.json` says what is evaluated, `facts.json` keeps what was settled at the start, each `tries-*.npz` holds the
outcomes since the one before, and `flight-*.npz` the tries that a process had under way. Nothing in them depends on who
found it out, so any number of processes may write, and another number may go on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualhead.errors import UserError
from dualhead.evaluation.scheduler import Cost, Try
from dualhead.system.files import write_atomically, write_json

_log = logging.getLogger(__name__)

SearchKey = tuple[str, int]
"""A task (an attack at an eps) and the number of its search."""

_COSTS = tuple(f.name for f in fields(Cost))
_OUTCOME = {
    "sample": int,
    "job": int,
    "fooled": bool,
    "steps": int,
    "distance": float,
    "margin": float,
    "taken_for": int,
}
LAYOUT = 3
"""Version of the files' layout; raised when files of another layout could not be read."""
ELSEWHERE: Final = "choose another folder (--output, output_dir), or begin anew (--overwrite, resume=False)"
"""Ways out of a folder of another evaluation, on the command line and in Python."""


@dataclass
class Outcome(Try):
    """A try, and what came of it for people to see.

    Attributes:
        taken_for: the class that the float32 model takes the example for; -1 where not fooled, or no logit is a number.
    """

    taken_for: int = -1

    def got(self, goals: Sequence[int] | None) -> bool:
        """Tell whether the search got what it wants, from the goal of each sample of the data, if there are any."""
        return self.fooled and (goals is None or self.taken_for == goals[self.sample])


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], *, compressed: bool = False) -> None:
    """Write an npz file, atomically."""
    save = np.savez_compressed if compressed else np.savez

    def write(aside: Path) -> None:
        with aside.open("wb") as stream:
            save(stream, **arrays)  # type: ignore[arg-type]  # numpy's types take ** for its own options

    write_atomically(path, write)


def finite(value: Any) -> Any:
    """Return JSON values, with None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


@contextmanager
def _left_out_if_damaged(path: Path) -> Iterator[None]:
    """Skip a damaged file with a warning; its results are computed again."""
    try:
        yield
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        _log.warning("%s: damaged (%s); what it held is done again", path, error or type(error).__name__)


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """Return a digest of parameters, buffers, and the tree of module classes."""
    tree = "\n".join(f"{name} {type(module).__qualname__}" for name, module in model.named_modules())
    state = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    return hashlib.sha256("\n".join([tree, *state, _digest(*state.values())]).encode()).hexdigest()


def data_fingerprint(images: Tensor, labels: Tensor, index: Tensor) -> str:
    """Return a digest of images, labels and the names of the samples."""
    return _digest(images, labels, index)


def images_fingerprint(images: Tensor, index: Tensor) -> str:
    """Return a digest of images at 8 bits a value, in the order of the samples' names.

    The same images have the same digest as uint8 and as floating numbers, on whatever device these were divided by 255,
    and in any order.

    Args:
        images: uint8 or floating in [0, 1], [N, C, H, W], on the CPU.
        index: names of the samples, int64 [N].
    """
    digest = hashlib.sha256()
    for rows in torch.split(torch.argsort(index), 256):
        shown = images[rows]
        levels = shown if shown.dtype == torch.uint8 else (shown.float() * 255).round().to(torch.uint8)
        digest.update(levels.numpy().tobytes())
    return digest.hexdigest()


class Journal:
    """The outcomes of tries, kept in memory and, if there is a folder, on disk.

    Args:
        folder: where; None keeps nothing.
        identity: description of the evaluation, names to text or numbers. A folder of another identity is refused.
        resume: False forgets what lies in the folder.
        rank: number of this process.
        world: how many processes there are. Each accounts for a share of what earlier processes spent.
        examples: keep the adversarial examples too.

    Raises:
        UserError: naming what differs, if the folder belongs to another evaluation.
    """

    flight_interval = 60.0

    def __init__(
        self, folder: Path | None, identity: Mapping[str, Any], *, resume: bool, rank: int, world: int, examples: bool
    ) -> None:
        self.folder, self.rank, self.world, self.examples = folder, rank, world, examples
        self.tries: dict[SearchKey, dict[tuple[int, int], Outcome]] = defaultdict(dict)
        self.costs: dict[SearchKey, Cost] = defaultdict(Cost)
        self.seconds: dict[SearchKey, float] = defaultdict(float)
        self.facts: dict[str, Any] = {}
        self._new: list[tuple[SearchKey, Outcome]] = []
        self._new_costs: list[tuple[SearchKey, float, Cost]] = []
        self._begun = self._written = self._flown = time.monotonic()
        self._flight_seconds = 0.0
        self._count = 0
        if folder is None:
            return
        identity = {**identity, "layout of these files": LAYOUT}
        if not resume and rank == 0 and folder.is_dir():
            for path in [
                *folder.glob("tries-*.npz"),
                *folder.glob("flight-*.npz"),
                folder / "facts.json",
                folder / "identity.json",
            ]:
                path.unlink(missing_ok=True)
        if resume and (folder / "identity.json").exists():
            self._check(dict(identity))
            self._load()
        if rank == 0:
            write_json(folder / "identity.json", identity)

    def _check(self, identity: dict[str, Any]) -> None:
        assert self.folder is not None
        path = self.folder / "identity.json"
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: damaged ({error}); {ELSEWHERE}") from None
        differs = [name for name in identity if before.get(name) != json.loads(json.dumps(identity[name]))]
        if differs:
            raise UserError(
                f"{self.folder.parent} holds an evaluation that differs in {', '.join(differs)}; {ELSEWHERE}"
            )

    def _load(self) -> None:
        assert self.folder is not None
        if (self.folder / "facts.json").exists():
            with _left_out_if_damaged(self.folder / "facts.json"):
                self.facts = json.loads((self.folder / "facts.json").read_text())
        for path in sorted(self.folder.glob("tries-*.npz")):
            self._count += 1
            held: dict[str, NDArray[Any]] = {}
            with _left_out_if_damaged(path), np.load(path) as stored:
                held = {name: stored[name] for name in stored.files}
            if not held:
                continue
            tasks = [str(task) for task in held["tasks"]]
            examples = iter(held["example"]) if "example" in held else None
            columns = (held[n].tolist() for n in ("task", "part", *_OUTCOME))
            for task, search, *outcome in zip(*columns, strict=True):
                found = Outcome(**dict(zip(_OUTCOME, outcome, strict=True)))
                if found.fooled and examples is not None:
                    found.example = torch.from_numpy(next(examples).copy())
                self.tries[tasks[task], search][found.sample, found.job] = found
            if int(held["rank"]) % self.world != self.rank:
                continue
            for task, search, seconds, *passes in zip(
                held["cost_task"].tolist(),
                held["cost_part"].tolist(),
                held["seconds"].tolist(),
                *(held[name].tolist() for name in _COSTS),
                strict=True,
            ):
                self._add_cost((tasks[task], search), seconds, Cost(*passes))

    def _add_cost(self, search: SearchKey, seconds: float, cost: Cost) -> None:
        total = self.costs[search]
        for name in _COSTS:
            setattr(total, name, getattr(total, name) + getattr(cost, name))
        self.seconds[search] += seconds

    def fact(self, name: str, find_out: Callable[[], Any]) -> Any:
        """Return the earlier result of this name, or the one of `find_out` now; JSON values only."""
        if name not in self.facts:
            self.facts[name] = json.loads(json.dumps(finite(find_out())))
            if self.folder is not None and self.rank == 0:
                write_json(self.folder / "facts.json", self.facts)
        return self.facts[name]

    def known(self, search: SearchKey, goals: Sequence[int] | None = None) -> dict[tuple[int, int], bool]:
        """Return for each (sample, job) whether it got what the search wants: fooled, or fooled for its goal."""
        return {key: found.got(goals) for key, found in self.tries[search].items()}

    def first_successes(
        self, search: SearchKey, samples: Iterable[int], goals: Sequence[int] | None = None
    ) -> dict[int, Outcome]:
        """Return for each fooled sample the first job in order that fooled it, those that got the goal before others.

        Args:
            search: which one.
            samples: those asked about.
            goals: the class that each sample of the data is to be taken for; None for any but its label.
        """
        asked = set(samples)
        first: dict[int, Outcome] = {}
        for (sample, _), found in sorted(self.tries[search].items(), reverse=True):
            missed = sample in first and first[sample].got(goals) and not found.got(goals)
            if found.fooled and sample in asked and not missed:
                first[sample] = found
        return first

    def add(self, search: SearchKey, found: Outcome) -> None:
        """Record an outcome."""
        if not self.examples:
            found.example = None
        self.tries[search][found.sample, found.job] = found
        self._new.append((search, found))

    def add_cost(self, search: SearchKey, seconds: float, cost: Cost) -> None:
        """Record time and passes spent since the last call."""
        self._add_cost(search, seconds, cost)
        self._new_costs.append((search, seconds, cost))

    def due(self) -> bool:
        """Whether it is time to write: after 2 s at first, later after 2 % of the time so far, at most a minute."""
        now = time.monotonic()
        return now - self._written > min(max(2.0, 0.02 * (now - self._begun)), 60.0)

    def flight_due(self) -> bool:
        """Whether to write down what is under way: every minute, less often where writing takes more than a second."""
        interval = max(self.flight_interval, 50 * self._flight_seconds)
        return self.folder is not None and time.monotonic() - self._flown > interval

    def write_flight(self, search: SearchKey, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Put on disk what is under way, in place of what was when this was last called."""
        assert self.folder is not None
        self.write()
        begun = time.monotonic()
        name = {"part_name": np.array(search[0]), "part_number": np.array(search[1])}
        write_arrays(self.folder / f"flight-{self.rank}.npz", {**name, **arrays})
        self._flown = time.monotonic()
        self._flight_seconds = self._flown - begun

    def flight(self, search: SearchKey) -> list[dict[str, NDArray[Any]]]:
        """Read the unfinished tries of a search from all processes."""
        found = []
        for path in sorted(self.folder.glob("flight-*.npz")) if self.folder is not None else ():
            with _left_out_if_damaged(path), np.load(path) as stored:
                if (str(stored["part_name"]), int(stored["part_number"])) == search:
                    found.append({name: stored[name] for name in stored.files})
        return found

    def write(self) -> None:
        """Put on disk what is new."""
        self._written = time.monotonic()
        if self.folder is None or not (self._new or self._new_costs):
            return
        tasks = sorted({where[0] for where in (*(w for w, _ in self._new), *(w for w, *_ in self._new_costs))})
        arrays: dict[str, Any] = {
            "rank": np.array(self.rank),
            "tasks": np.array(tasks),
            "task": np.array([tasks.index(search[0]) for search, _ in self._new], np.int64),
            "part": np.array([search[1] for search, _ in self._new], np.int64),
            "cost_task": np.array([tasks.index(search[0]) for search, *_ in self._new_costs], np.int64),
            "cost_part": np.array([search[1] for search, *_ in self._new_costs], np.int64),
            "seconds": np.array([seconds for _, seconds, _ in self._new_costs]),
        }
        for name, kind in _OUTCOME.items():
            arrays[name] = np.array([getattr(found, name) for _, found in self._new], kind)
        for name in _COSTS:
            arrays[name] = np.array([getattr(cost, name) for *_, cost in self._new_costs], np.int64)
        if self.examples:
            examples = [found.example.numpy() for _, found in self._new if found.example is not None]
            arrays["example"] = np.stack(examples) if examples else np.empty(0, np.float32)
        name = f"tries-{self._count:06d}-{self.rank}-{os.getpid()}-{time.time_ns():x}.npz"
        write_arrays(self.folder / name, arrays)
        self._count += 1
        self._new, self._new_costs = [], []
