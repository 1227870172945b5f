"""One search over many samples: slots that are refilled from the whole data set.

A sample is tried by several jobs (targets, restarts). All jobs of all samples form a queue, job by job: job 0 of every
sample, then job 1 of those that are left, and so on. A slot holds one try; as soon as the try has found an example or
run out of steps, the slot takes the next from the queue, so that the model always sees full batches. A trajectory
depends on its own sample and job only, hence who sits beside it does not matter.

What is recorded does not depend on timing either: a sample is fooled by the first job in order that succeeds. When a
later job succeeds while an earlier one is in flight, the earlier one is finished first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualhead.attacks import LooksAhead, Search, State, predictions
from dualhead.attacks.losses import margin
from dualhead.evaluation.model import ROWS, Subject, pad_rows, padded
from dualhead.noise import Streams
from dualhead.threats import Threat


@dataclass
class Try:
    """The outcome of one job on one sample.

    Attributes:
        sample: position of the sample in the data given to `evaluate`.
        job: which target or restart.
        fooled: the float32 model misclassifies the confined example.
        steps: how many steps were taken.
        distance: of the example, in the units of the threat's eps; NaN where not fooled.
        margin: highest other logit minus the label's, of the example, float32; NaN where not fooled.
        example: the image of the confined example, float32 [C, H, W]; None where not fooled.
        reached: whether the search got what it wants: fooled or, with a goal, the goal for an answer.
    """

    sample: int
    job: int
    fooled: bool
    steps: int
    distance: float = float("nan")
    margin: float = float("nan")
    example: Tensor | None = field(default=None, repr=False)
    reached: bool = False


@dataclass
class Cost:
    """Passes in images: those of the search, those of them that looked ahead in vain, and verification's."""

    forward: int = 0
    backward: int = 0
    vain: int = 0
    verification: int = 0


@dataclass
class Samples:
    """The samples of one process.

    Attributes:
        images: uint8 or floating [N, C, H, W].
        labels: int64 [N].
        clean: float32 logits of the images [N, K].
        keys: int64 [N], what names a sample in `Streams.of`.
    """

    images: Tensor
    labels: Tensor
    clean: Tensor
    keys: Tensor

    @staticmethod
    def images_at(images: Tensor, rows: Tensor, device: torch.device) -> Tensor:
        """Images float32 in [0, 1] on a device, from uint8 or floating ones."""
        moved = images[rows].to(device)
        return moved.float().div_(255.0) if moved.dtype == torch.uint8 else moved.float()

    def fetch(self, rows: Tensor, device: torch.device) -> Tensor:
        """Images float32 [B, C, H, W] in [0, 1] on a device."""
        return self.images_at(self.images, rows, device)


class Hunt:
    """One `Search` on the samples that are still open.

    Args:
        search: the program.
        threat: what the adversary may do, for images of this shape.
        subject: the model.
        samples: all samples of this process.
        streams: their randomness for this search, one stream per sample.
        open_samples: positions of those to search.
        known: what earlier runs found out: (sample, job) to whether the search got what it wants.
        check_every: steps between looks at what was found; more than 1 saves waiting for an accelerator.
        on_try: called with each outcome.
        on_round: called after each look, with the number of tries that are under way, each counted by its share done.
        flight: what `in_flight` gave earlier: tries to go on with instead of beginning them anew.
    """

    def __init__(
        self,
        search: Search,
        threat: Threat,
        subject: Subject,
        samples: Samples,
        streams: Streams,
        open_samples: Iterable[int],
        *,
        known: Mapping[tuple[int, int], bool],
        check_every: int,
        on_try: Callable[[Try], None],
        on_round: Callable[[float], None] = lambda under_way: None,
        flight: Sequence[Mapping[str, NDArray[Any]]] = (),
    ) -> None:
        self.search, self.threat, self.subject = search, threat, subject
        self.samples, self.streams = samples, streams
        self.check_every, self.on_try, self.on_round = check_every, on_try, on_round
        self.query = subject.query(threat.render)
        self._capacity, self._unit = subject.batch_size, ROWS
        self._ahead: int | None = None
        if isinstance(search, LooksAhead):
            self._capacity, self._unit, self._ahead = subject.forward_batch_size, 1, 1
        self.cost = Cost()
        self.jobs, self.max_steps = search.jobs(samples.clean.shape[1]), search.max_steps()
        self.first_success = dict.fromkeys(open_samples, self.jobs)
        self._goals = search.goal(samples.clean, samples.labels)
        for (sample, job), reached in known.items():
            if reached and sample in self.first_success:
                self.first_success[sample] = min(self.first_success[sample], job)
        # One entry per row of the state; sample -1 marks a row that nobody uses.
        self._sample = np.empty(0, np.int64)
        self._job = np.empty(0, np.int64)
        self._age = np.empty(0, np.int64)
        self._state: State = {}
        self._held = torch.empty(0, dtype=torch.bool)  # rows whose search has found something
        self._example = torch.empty(0)  # what it was, or the best so far
        going_on = self._restore(flight, known)
        self._queue = self._tries(known.keys() | going_on)
        self._next: tuple[int, int] | None = next(self._queue, None)

    def _tries(self, begun: Set[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        for job in range(self.jobs):
            for sample in self.first_success:
                if job < self.first_success[sample] and (sample, job) not in begun:
                    yield sample, job

    def in_flight(self) -> dict[str, NDArray[Any]]:
        """The tries under way: a row each. They are the same trajectories when they go on later, or elsewhere."""
        live = (self._sample >= 0).nonzero()[0]
        rows = torch.from_numpy(live).to(self.subject.device)
        state = {f"state_{key}": values[rows].cpu().numpy() for key, values in self._state.items()}
        return {
            "sample": self._sample[live],
            "job": self._job[live],
            "age": self._age[live],
            "held": self._held[rows].cpu().numpy(),
            "example": self._example[rows].cpu().numpy(),
            **state,
        }

    def _restore(
        self, flight: Sequence[Mapping[str, NDArray[Any]]], known: Mapping[tuple[int, int], bool]
    ) -> set[tuple[int, int]]:
        """Take up tries that were under way, each where it had got furthest: which ones.

        Those of a version whose searches kept other state are begun anew.
        """
        if flight and self.first_success:
            kept = {f"state_{name}" for name in self._begin([(next(iter(self.first_success)), 0)])}
            flight = [rows for rows in flight if kept == {name for name in rows if name.startswith("state_")}]
        furthest: dict[tuple[int, int], tuple[int, int, int]] = {}
        for number, rows in enumerate(flight):
            for row, (sample, job, age) in enumerate(
                zip(*(rows[k].tolist() for k in ("sample", "job", "age")), strict=True)
            ):
                wanted = (sample, job) not in known and job < self.first_success.get(sample, 0)
                if wanted and age > furthest.get((sample, job), (-1, 0, 0))[0]:
                    furthest[sample, job] = (age, number, row)
        places = [place[1:] for place in furthest.values()][: self._capacity]
        if not places:
            return set()
        places += [places[0]] * (self._rounded(len(places)) - len(places))

        def column(name: str) -> NDArray[Any]:
            return np.stack([flight[number][name][row] for number, row in places])

        def tensor(name: str) -> Tensor:
            return torch.from_numpy(column(name)).to(self.subject.device)

        self._sample, self._job, self._age = column("sample"), column("job"), column("age")
        self._sample[min(len(furthest), self._capacity) :] = -1
        self._held, self._example = tensor("held"), tensor("example")
        names = [name.removeprefix("state_") for name in flight[places[0][0]] if name.startswith("state_")]
        self._state = {name: tensor(f"state_{name}") for name in names}
        live = self._sample >= 0
        return set(zip(self._sample[live].tolist(), self._job[live].tolist(), strict=True))

    def _take(self, count: int) -> list[tuple[int, int]]:
        """Up to `count` tries from the queue. Whether a try is still wanted is asked when it is handed out."""
        taken: list[tuple[int, int]] = []
        while self._next is not None and len(taken) < count:
            if self._next[1] < self.first_success[self._next[0]]:
                taken.append(self._next)
            self._next = next(self._queue, None)
        return taken

    def _rounded(self, count: int) -> int:
        """Rows for so many tries: a search that looks ahead fills its batches itself."""
        return padded(count, self._unit)

    def _begin(self, tries: list[tuple[int, int]]) -> State:
        """Fresh state rows, `_rounded` many, the last ones copies."""
        device = self.subject.device
        rows = pad_rows(torch.tensor([sample for sample, _ in tries]), self._unit)
        jobs = pad_rows(torch.tensor([job for _, job in tries]), self._unit).to(device)
        x, y = self.samples.fetch(rows, device), self.samples.labels[rows].to(device)
        clean, streams = self.samples.clean[rows].to(device), Streams(self.streams.keys[rows].to(device))
        return self.search.begin(self.threat.lift(x), y, clean, jobs, self.threat, streams)

    def _fill(self) -> None:
        """Give free rows, and rows there is room for, to the queue's next tries."""
        free = (self._sample < 0).nonzero()[0]
        tries = self._take(len(free))
        if tries:
            free = free[: len(tries)]
            fresh, rows = self._begin(tries), torch.from_numpy(free).to(self.subject.device)
            for key, values in self._state.items():
                values[rows] = fresh[key][: len(tries)].to(values.dtype)
            self._held[rows] = False
            self._example[rows] = fresh["adversarial"][: len(tries)]
            self._sample[free], self._job[free] = zip(*tries, strict=True)
            self._age[free] = 0
        more = self._take(self._capacity - len(self._sample))
        if more:
            self._grow(more)

    def _grow(self, tries: list[tuple[int, int]]) -> None:
        """Add rows for tries, `_rounded` many."""
        fresh, device = self._begin(tries), self.subject.device
        unused = self._rounded(len(tries)) - len(tries)
        samples, jobs = zip(*tries, *[(-1, 0)] * unused, strict=True)
        self._sample, self._job = np.append(self._sample, samples), np.append(self._job, jobs)
        self._age = np.append(self._age, np.zeros(len(samples), np.int64))
        self._held = torch.cat((self._held.to(device), torch.zeros(len(samples), dtype=torch.bool, device=device)))
        example = fresh["adversarial"]
        self._example = torch.cat((self._example, example)) if len(self._example) else example.clone()
        self._state = {k: torch.cat((self._state[k], v)) for k, v in fresh.items()} if self._state else fresh

    def _shrink(self) -> None:
        """Leave out rows that nobody needs any more, once the queue is empty."""
        live = (self._sample >= 0).nonzero()[0]
        size = self._rounded(len(live))
        # Where looking at the results costs a wait, so does every new shape: halve, rather than follow closely.
        if (
            self._next is not None
            or size >= len(self._sample)
            or (self.check_every > 1 and 2 * size > len(self._sample))
        ):
            return
        keep = np.concatenate((live, np.full(size - len(live), live[0] if len(live) else 0)))[:size]
        rows = torch.from_numpy(keep).to(self.subject.device)
        self._state = {k: v[rows] for k, v in self._state.items()}
        self._held, self._example = self._held[rows], self._example[rows]
        self._sample, self._job, self._age = self._sample[keep], self._job[keep], self._age[keep]
        self._sample[len(live) :] = -1

    def _advance(self) -> None:
        """Some steps; each row's example is taken at the step that found it, or at its last step."""
        if self._ahead is not None:
            self._leap(max(1, min(self._ahead, self._capacity // len(self._sample))))
            return
        for _ in range(self.check_every):
            live = (self._sample >= 0) & (self._age < self.max_steps)
            forward, backward = self.query.forward_passes, self.query.backward_passes
            self._state = self.search.step(self._state, self.query, self.threat)
            share = int(live.sum()) / len(live)
            self.cost.forward += round((self.query.forward_passes - forward) * share)
            self.cost.backward += round((self.query.backward_passes - backward) * share)
            self._keep_examples()
            self._age += 1

    def _leap(self, count: int) -> None:
        """Up to `count` steps of each row in one query."""
        search, before = cast("LooksAhead", self.search), self._age
        live = (self._sample >= 0) & (before < self.max_steps)
        self._state = search.leap(self._state, self.query, self.threat, count)
        self._keep_examples()
        self._age = self._state["iteration"].cpu().numpy()
        asked, taken = int(live.sum()) * count, int((self._age - before)[live].sum())
        self.cost.forward += asked
        self.cost.vain += asked - taken
        # As many rows as pay: what is asked in vain grows with how often a step changes something.
        if taken > 0.9 * asked:
            self._ahead = 2 * count
        elif taken < 0.75 * asked:
            self._ahead = max(1, count // 2)

    def _keep_examples(self) -> None:
        """Keep an example of rows that hold none yet; called after a step, with the ages before it."""
        open_rows = ~self._held
        if (self._age >= self.max_steps).any():
            open_rows &= torch.from_numpy(self._age < self.max_steps).to(self._held.device)
        mask = open_rows.reshape(-1, *(1 for _ in self._example.shape[1:]))
        self._example = torch.where(mask, self._state["adversarial"], self._example)
        self._held = self._held | (self._state["found"] & open_rows)

    def _verify(self, rows: NDArray[np.int64]) -> dict[int, Try]:
        """Ask the float32 model about the examples of some rows: outcomes by row."""
        index = torch.from_numpy(rows).to(self.subject.device)
        samples = torch.from_numpy(self._sample[rows])
        x, y = self.samples.fetch(samples, self.subject.device), self.samples.labels[samples].to(self.subject.device)
        origin = self.threat.lift(x)
        point = self.threat.confine(self._example[index], origin)
        example = self.threat.render(point)
        logits = self.subject.verify(example)
        self.cost.verification += len(rows)
        distances = self.threat.distance(point, origin)
        # A pixel that is no number is at no distance, and what a model says of it counts for nothing.
        within = distances <= self.threat.eps
        wrong = wanted = (predictions(logits) != y) & within
        if self._goals is not None:
            wanted = (predictions(logits) == self._goals[samples].to(y.device)) & within
        columns = zip(wrong.tolist(), wanted.tolist(), distances.tolist(), margin(logits, y).tolist(), strict=True)
        outcomes = {}
        for place, (row, (fooled, reached, distance, gap)) in enumerate(zip(rows.tolist(), columns, strict=True)):
            steps = int(min(self._age[row], self.max_steps))
            outcome = Try(int(self._sample[row]), int(self._job[row]), fooled, steps, reached=reached)
            if fooled:
                outcome.distance, outcome.margin, outcome.example = distance, gap, example[place].cpu()
            outcomes[row] = outcome
        return outcomes

    def _retire(self) -> None:
        """Decide about rows that have found something or run out of steps."""
        held = self._held.cpu().numpy()
        live, spent = self._sample >= 0, self._age >= self.max_steps
        if "over" in self._state:
            spent = spent | self._state["over"].cpu().numpy()
        # A search in reduced precision may hold an example that only the float32 model sees to be one; one that missed
        # its goal may have got another wrong answer.
        doubtful = held | spent if self.subject.reduced or self._goals is not None else held
        rows = (live & doubtful).nonzero()[0]
        outcomes = self._verify(rows) if len(rows) else {}
        again, reached = [], False
        for row in (live & (held | spent)).nonzero()[0].tolist():
            sample, job = int(self._sample[row]), int(self._job[row])
            outcome = outcomes.get(row) or Try(sample, job, False, int(min(self._age[row], self.max_steps)))
            if not outcome.reached and not spent[row]:
                again.append(row)
                continue
            self._sample[row] = -1
            if outcome.reached:
                reached = True
                self.first_success[sample] = min(self.first_success[sample], job)
            self.on_try(outcome)
        for row in (self._sample >= 0).nonzero()[0].tolist() if reached else ():
            if self._job[row] > self.first_success[int(self._sample[row])]:
                self._sample[row] = -1
        if again:
            index = torch.tensor(again, device=self.subject.device)
            self._held[index] = False
            self._state["found"][index] = False

    def run(self) -> None:
        """Search until every sample is fooled or has been tried by all jobs."""
        self._fill()
        while (self._sample >= 0).any():
            self._advance()
            self._retire()
            self._fill()
            self._shrink()
            self.on_round(float(self._age[self._sample >= 0].sum()) / self.max_steps)
