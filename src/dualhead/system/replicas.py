"""A batch in several threads, each with its share of the rows: what a model asks the CPU for is then independent.

A small network gives each of its layers too little work for several cores: threads that share every layer wait for
one another at each. Threads that have images of their own do not.
"""

from __future__ import annotations

import copy
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

LEAST_ROWS = 16
"""Rows that a lane has at least: with fewer, a pass costs its overhead."""


def pool(lanes: int) -> ThreadPoolExecutor:
    """Return workers, each with its share of torch's threads; the caller's own number stays as it is."""
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
    """Return copies of a model's modules that share its tensors; what a forward stores in one stays there."""
    tensors = [*model.parameters(), *model.buffers()]
    return [copy.deepcopy(model, {id(t): t for t in tensors}) for _ in range(count)]
