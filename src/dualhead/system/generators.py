"""States of the random number generators that other libraries share: Python's, numpy's and torch's.

The package's own draws do not come from them, but from `noise.Streams`.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualhead.system.devices import generator_state, set_generator_state


def generator_states(device: torch.device) -> list[Tensor]:
    """Return the states of torch's own generators: the CPU's, and the device's if it has one of its own."""
    own = generator_state(device)
    return [torch.get_rng_state(), *([] if own is None else [own])]


def set_generator_states(states: Sequence[Tensor], device: torch.device) -> None:
    """Put torch's generators where `generator_states` found them; on another kind of device, the CPU's alone."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        set_generator_state(states[1], device)


def all_generator_states(device: torch.device) -> tuple[Any, ...]:
    """Return the states of the generators of Python, numpy and torch (CPU and device), comparable by `==`."""
    return random.getstate(), pickle.dumps(np.random.get_state()), [s.tolist() for s in generator_states(device)]


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators of Python, numpy and torch: the CPU's and this device's, and no other one's."""
    random.seed(seed)
    np.random.seed(seed)
    where = [torch.device("cpu"), *([] if generator_state(device) is None else [device])]
    set_generator_states([torch.Generator(place).manual_seed(seed).get_state() for place in where], device)


@contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Put the generators of Python, numpy and torch (CPU and device) back at the end."""
    python, arrays, states = random.getstate(), np.random.get_state(), generator_states(device)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        set_generator_states(states, device)
