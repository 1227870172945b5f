"""One batch in several threads, each with its share of the rows: what a model asks the CPU for is then independent.

A small network gives each of its layers too little work for several cores: threads that share every layer wait for
one another at each. Threads that have images of their own do not.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[[Tensor], Tensor]
"""Images [B, ...] to something with one row per image."""

LEAST_ROWS = 16
"""Rows that a lane has at least. On fewer, oneDNN takes other kernels in one thread than it takes in several, and
logits differ in the last bit (measured on AVX512)."""


def pool(lanes: int) -> ThreadPoolExecutor:
    """Workers, each with its share of the threads that torch has; what the caller has stays as it is."""
    return _pool(lanes, max(1, torch.get_num_threads() // lanes))


@functools.cache
def _pool(lanes: int, threads: int) -> ThreadPoolExecutor:
    own = torch.get_num_threads()
    ready = threading.Barrier(lanes)

    def begin() -> None:
        torch.set_num_threads(threads)
        torch.get_num_threads()  # settles it: otherwise the first use would take over what the caller has by then
        ready.wait()

    workers = ThreadPoolExecutor(lanes, "lane", begin)
    list(workers.map(lambda _: None, range(lanes)))
    torch.set_num_threads(own)
    return workers


def twins(model: nn.Module, count: int) -> list[nn.Module]:
    """The model and copies of its modules that share its tensors, so that what a forward keeps in one stays there."""
    tensors = [*model.parameters(), *model.buffers()]
    return [model, *(copy.deepcopy(model, {id(t): t for t in tensors}) for _ in range(count - 1))]


class Lanes:
    """A function of images that is asked in several threads at once.

    Rows must come in multiples of `unit`, and each lane is asked about a multiple of it. A batch too small for all
    lanes is asked in the caller's thread.

    Args:
        functions: one per lane, all equal: images [B, ...] to one row per image.
        unit: see above.
    """

    def __init__(self, functions: Sequence[Function], unit: int) -> None:
        self._functions, self._unit = functions, unit
        self._least = max(LEAST_ROWS, unit)
        self._pool = pool(len(functions))

    def __call__(self, x: Tensor) -> Tensor:
        """The function's rows for the images', differentiable where the images are."""
        count = len(self._functions)
        if x.shape[0] < count * self._least:
            return self._functions[0](x)
        units, more = divmod(x.shape[0] // self._unit, count)
        parts = torch.split(x, [(units + (lane < more)) * self._unit for lane in range(count)])
        if torch.is_grad_enabled() and x.requires_grad:
            result: Tensor = _InLanes.apply(self, x, *parts)  # type: ignore[no-untyped-call]
            return result
        with torch.no_grad():
            return torch.cat([output for _, output in self.each(parts, with_graph=False)])

    def each(self, parts: Sequence[Tensor], *, with_graph: bool) -> list[tuple[Tensor, Tensor]]:
        """Each part's images, as the leaf of a graph if asked for, and what the function makes of them."""

        def ask(function: Function, part: Tensor) -> tuple[Tensor, Tensor]:
            with torch.set_grad_enabled(with_graph):
                leaf = part.detach().requires_grad_(with_graph)
                return leaf, function(leaf)

        return list(self._pool.map(ask, self._functions, parts))

    def back(self, graphs: Sequence[tuple[Tensor, Tensor]], gradients: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of each part's images."""

        def climb(graph: tuple[Tensor, Tensor], gradient: Tensor) -> Tensor:
            leaf, output = graph
            (found,) = torch.autograd.grad(output, leaf, gradient, retain_graph=True, allow_unused=True)
            return torch.zeros_like(leaf) if found is None else found

        return list(self._pool.map(climb, graphs, gradients))


class _InLanes(torch.autograd.Function):
    """The lanes' own graphs as one step of the caller's."""

    @staticmethod
    def forward(ctx: Any, lanes: Lanes, x: Tensor, *parts: Tensor) -> Tensor:
        del x
        ctx.lanes, ctx.graphs = lanes, lanes.each(parts, with_graph=True)
        outputs = [output.detach() for _, output in ctx.graphs]
        result = torch.cat(outputs)
        if not all(output.requires_grad for _, output in ctx.graphs):  # the model lets no gradient through
            ctx.mark_non_differentiable(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        parts = torch.split(gradient, [output.shape[0] for _, output in ctx.graphs])
        found = torch.cat(ctx.lanes.back(ctx.graphs, parts))
        return None, found, *(None for _ in parts)
