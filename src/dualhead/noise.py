"""Randomness that belongs to a sample: one counter-based stream per sample, evaluated in batch.

A number drawn for a sample depends on the sample's key alone, not on the batch it happens to sit in, the order of
the batches, the device, or what was drawn before. So a verdict does not change with the batch size, a resumed run
needs no generator state, and several processes draw what one would have drawn.
"""

from __future__ import annotations

import math
import zlib
from typing import Final, Self

import torch
from torch import Tensor

_GOLDEN: Final = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1: Final = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2: Final = -7723592293110705685  # 0x94D049BB133111EB


def _mix(x: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser (Steele, Lea, Flood 2014) to int64, in place; masks make shifts logical."""
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))


def _tag(part: int | str) -> int:
    """Return a signed 64-bit number for a name; larger numbers wrap."""
    number = zlib.crc32(part.encode()) if isinstance(part, str) else int(part)
    return (number + 2**63) % 2**64 - 2**63


class Streams:
    """A batch of independent random streams, one per sample.

    Every draw is a pure function of the keys: drawing twice gives the same numbers. `fork` makes new streams for a new
    purpose.

    Args:
        keys: int64 [B], one key per sample.
    """

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys

    @classmethod
    def of(cls, seed: int, samples: Tensor) -> Self:
        """Return streams for the samples with the given indices (int64 [B]) under a seed."""
        return cls(samples.to(torch.int64).clone()).fork(seed)

    @classmethod
    def drawn_from(cls, generator: torch.Generator | Streams, batch: int, device: torch.device) -> Streams:
        """`generator` itself if it is streams already, else `batch` streams with keys drawn from it."""
        if isinstance(generator, Streams):
            return generator
        keys = torch.randint(-(2**62), 2**62, (batch,), generator=generator, device=generator.device)
        return Streams(keys.to(device))

    def __len__(self) -> int:
        return self.keys.shape[0]

    def __getitem__(self, index: Tensor) -> Streams:
        return Streams(self.keys[index])

    def fork(self, *names: int | str | Tensor) -> Self:
        """Make independent streams, named by `names`: numbers, words, or one int64 number per sample [B]."""
        keys = self.keys
        for name in names:
            number = name if isinstance(name, Tensor) else _tag(name)
            keys = _mix((keys + _GOLDEN).bitwise_xor_(_mix(torch.zeros_like(keys) + number + 1)))
        return type(self)(keys)

    def bits(self, count: int) -> Tensor:
        """Return int64 [B, count], 64 random bits each."""
        counter = torch.arange(1, count + 1, device=self.keys.device).mul_(_GOLDEN)
        return _mix(self.keys[:, None] + counter)

    def _pairs(self, count: int) -> tuple[Tensor, Tensor]:
        """Return twice [B, count] uniform in [0, 1) with 24 bits each: one 64-bit number serves two draws."""
        bits = self.bits(count)
        low = (bits & 0xFFFFFF).to(torch.float32)
        return ((bits >> 40) & 0xFFFFFF).to(torch.float32).mul_(2.0**-24), low.mul_(2.0**-24)

    def uniform(self, *shape: int) -> Tensor:
        """Return float32 [B, *shape], uniform in [0, 1)."""
        count = math.prod(shape)
        pairs = self._pairs((count + 1) // 2)
        return torch.cat(pairs, 1)[:, :count].reshape(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """Return float32 [B, *shape], standard normal (Box and Muller 1958)."""
        count = math.prod(shape)
        u, v = self._pairs((count + 1) // 2)
        radius = (1.0 - u).log_().mul_(-2.0).sqrt_()
        angle = v.mul_(2.0 * math.pi)
        return torch.cat((radius * angle.cos(), radius * angle.sin()), 1)[:, :count].reshape(-1, *shape)

    def integers(self, high: int | Tensor, *shape: int) -> Tensor:
        """Return int64 [B, *shape], uniform in [0, high); `high` is a positive number or one per sample [B]."""
        bits = ((self.bits(math.prod(shape)) >> 33) & 0x7FFFFFFF).reshape(-1, *shape)
        if isinstance(high, Tensor):
            high = high.reshape(-1, *(1 for _ in shape))
        return (bits * high) >> 31
