"""Small networks, recorded queries and injected noise for tests of attacks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dualhead.attacks import Query, Search, State
from dualhead.noise import Streams
from dualhead.threats.lp import ThreatModel


def network(classes: int = 10, channels: int = 3, side: int = 8, *, seed: int = 0, gain: float = 2.0) -> nn.Module:
    """A random convolutional network on images [channels, side, side], in eval mode, without parameter gradients."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(8 * ((side + 1) // 2) ** 2, 32),
            nn.Tanh(),
            nn.Linear(32, classes),
        )
        for layer in model:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight.data.mul_(gain)
    return model.eval().requires_grad_(False)


def linear_problem(norm: str, classes: int, *, near: int, batch: int = 3, seed: int = 0, shape=(1, 3, 4)):
    """A linear classifier on images of a shape, images, labels, and the exact distance [batch] to the nearest boundary.

    Only the first `near` classes compete; the boundaries of the others are far away. No face of the box is near;
    under L1, where few values do all the work, faces count.
    """
    generator = torch.Generator().manual_seed(seed)
    x = 0.5 + 0.05 * (images(batch, *shape, seed=seed) - 0.5)
    weight = torch.randn(classes, x[0].numel(), generator=generator)
    bias = 0.1 * torch.randn(classes, generator=generator)
    bias[near:] -= 20.0

    def model(x: Tensor) -> Tensor:
        return x.flatten(1) @ weight.T + bias

    logits = model(x)
    y = logits.argmax(1)
    difference = weight[y][:, None] - weight[None]
    gap = logits.gather(1, y[:, None]) - logits
    gap = _cheapest(difference, x, gap) if norm == "L1" else gap / difference.norm(p=1 if norm == "Linf" else 2, dim=2)
    return model, x, y, gap.scatter(1, y[:, None], torch.inf).amin(1)


def _cheapest(weight: Tensor, x: Tensor, needed: Tensor) -> Tensor:
    """The least L1 distance [B, C] by which functions of slopes [B, C, n] fall by `needed` [B, C]: steepest first.

    Infinite where the box ends before.
    """
    point = x.flatten(1)[:, None]
    room = torch.where(weight > 0, point, 1 - point)
    slopes, order = weight.abs().sort(2, descending=True)
    room = room.expand_as(weight).gather(2, order)
    before = (slopes * room).cumsum(2) - slopes * room
    moved = ((needed[..., None] - before) / slopes).clamp_min(0.0)
    short = (slopes * room).sum(2) < needed
    return torch.minimum(moved, room).nan_to_num(0.0).sum(2).masked_fill(short, torch.inf)


def images(batch: int, channels: int = 3, height: int = 8, width: int = 8, *, seed: int = 1) -> Tensor:
    """Random images in [0, 1], some of whose values lie on the faces of the box."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, channels, height, width, generator=generator) * 1.2 - 0.1).clamp(0, 1)


def streams(batch: int, seed: int = 0) -> Streams:
    return Streams.of(seed, torch.arange(batch))


class Recorder(nn.Module):
    """A model that keeps what it was asked, apart for questions with and without a gradient."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.with_gradient: list[Tensor] = []
        self.without: list[Tensor] = []
        self.local: list[dict[str, Tensor]] = []
        self.watched: tuple[str, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        (self.with_gradient if torch.is_grad_enabled() else self.without).append(x.detach().clone())
        if self.watched and torch.is_grad_enabled():
            self.local.append(_locals_of("attack_single_run", self.watched))
        return self.model(x)


def _locals_of(function: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    values = {} if frame is None else {n: frame.f_locals[n] for n in names if n in frame.f_locals}
    return {n: v.detach().clone() if isinstance(v, Tensor) else torch.tensor(v) for n, v in values.items()}


@contextmanager
def drawn(
    monkeypatch, *, rand: Callable[..., Tensor] | None = None, randn: Callable[..., Tensor] | None = None
) -> Iterator[None]:
    """Inside, `torch.rand` and `torch.randn` return what the functions give for a shape."""
    with monkeypatch.context() as patch:
        for name, function in (("rand", rand), ("randn", randn)):
            if function is not None:
                patch.setattr(torch, name, function)
        yield


def run(
    search: Search,
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    draws: Streams,
    *,
    job: int | Tensor = 0,
    watch: Callable[[State], None] = lambda state: None,
    outputs: Callable[[Tensor], Tensor] | None = None,
) -> tuple[State, Query]:
    """One job of every sample, to its end; `watch` sees the state before each step."""
    query = Query(model, outputs)
    with torch.no_grad():
        clean = model(x)
    state = search.begin(x, y, clean, torch.zeros_like(y) + job, threat, draws)
    for _ in range(search.max_steps()):
        watch(state)
        state = search.step(state, query, threat)
    return state, query


def run_staggered(
    search: Search,
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    draws: Streams,
    *,
    job: Tensor,
    slots: int = 3,
    outputs: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """All samples through a few slots that take the next one when they are done, started out of step.

    Rows are assigned in place, as a scheduler does. Returns the final `adversarial`, `found` (and `distance`).
    """
    query = Query(model, outputs)
    with torch.no_grad():
        clean = model(x)

    def begin(rows: Tensor) -> State:
        return search.begin(x[rows], y[rows], clean[rows], job[rows], threat, draws[rows])

    kept = ("adversarial", "found", "distance")
    waiting, holder = list(range(len(x))), list(range(min(slots, len(x))))
    waiting = waiting[len(holder) :]
    state = begin(torch.tensor(holder))
    lag = list(range(len(holder)))  # slot k starts again after k steps, so that the counters differ
    out: dict[str, Tensor] = {}
    clock = 0
    while any(row is not None for row in holder):
        for slot, row in enumerate(holder):
            if row is not None and clock < len(lag) and lag[slot] == clock and clock > 0:
                fresh = begin(torch.tensor([row]))
                for key in state:
                    state[key][slot] = fresh[key][0]
        state = search.step(state, query, threat)
        clock += 1
        for slot, row in enumerate(holder):
            if row is None or state["iteration"][slot] < search.max_steps():
                continue
            for key in kept:
                if key in state:
                    out.setdefault(key, torch.zeros(len(x), *state[key].shape[1:], dtype=state[key].dtype))[row] = (
                        state[key][slot]
                    )
            holder[slot] = waiting.pop(0) if waiting else None
            if holder[slot] is not None:
                fresh = begin(torch.tensor([holder[slot]]))
                for key in state:
                    state[key][slot] = fresh[key][0]
    return out
