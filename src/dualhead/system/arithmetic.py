"""How passes are computed: number format, memory layout, threads, compilation; measured where there is a choice."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, ParamSpec, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from dualhead.errors import RunError, UserError
from dualhead.system import measured
from dualhead.system.devices import synchronize
from dualhead.system.modes import in_eval_mode
from dualhead.system.replicas import LEAST_ROWS, pool, twins

P = ParamSpec("P")
R = TypeVar("R")
Precision = Literal["float32", "bf16", "auto"]
Layout = Literal["contiguous", "channels_last", "auto"]
MOST_PASSES = 100
"""More do not make the shortest time of a small network's pass shorter."""


@dataclass(frozen=True)
class Arithmetic:
    """A choice of number format, memory layout and use of threads for the passes through a model.

    Args:
        bf16: run the passes under bfloat16 autocast; else in float32.
        channels_last: keep images and the weights of convolutions in that layout; False: contiguous; None: the weights
            contiguous, the images as they come.
        lanes: in how many threads, each with images of its own, attacks run; 1 leaves threads to torch.
        compiled: whether the passes of training steps go through `torch.compile`.
        told: how it was chosen, in words for results; empty where it was asked for. It makes no difference.
    """

    bf16: bool
    channels_last: bool | None = None
    lanes: int = 1
    compiled: bool = False
    told: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """As recipes write it."""
        return "bf16" if self.bf16 else "float32"

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context for a forward pass."""
        return torch.autocast(device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def reuse_casts(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return a context in which passes share the casts of weights to bfloat16; weights must not change inside.

        Autocast drops them when the outermost of its contexts ends, even one that is switched off.
        """
        return torch.autocast(device.type, torch.bfloat16, enabled=False) if self.bf16 else nullcontext()

    def lay_out(self, model: nn.Module) -> None:
        """Give the model's weights the layout that suits, in place; values stay."""
        set_layout(model, torch.channels_last if self.channels_last else torch.contiguous_format)

    def images(self, x: Tensor) -> Tensor:
        """Return the images in the layout that suits."""
        if self.channels_last:
            return x.contiguous(memory_format=torch.channels_last)
        if self.channels_last is None or x.stride() == torch.empty(x.shape, device="meta").stride():
            return x
        return x.clone(memory_format=torch.contiguous_format)  # `contiguous` leaves the strides of grey images

    def wrap(self, logits_fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Wrap a function so that it runs under this arithmetic; logits come out in float32."""

        def run(x: Tensor) -> Tensor:
            with self.autocast(x.device):
                return logits_fn(self.images(x)).float()

        return run


def compiled(function: Callable[P, R], what: str) -> Callable[P, R]:
    """Compile a function by `torch.compile`, as one graph for each input shape; never partly eager.

    Args:
        function: a function of tensors.
        what: the function's name in the message.

    Returns:
        A function that raises `RunError` where torch cannot compile it.
    """
    from torch._dynamo.exc import TorchDynamoException  # seconds to import

    made = torch.compile(function, fullgraph=True, dynamic=False)

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return made(*args, **kwargs)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise RunError(f"runtime.compile: torch cannot compile {what}: {reason}; write false") from None

    return run


def set_layout(model: nn.Module, layout: torch.memory_format) -> None:
    """Store the weights of 2-d convolutions in a memory layout, in place; values stay."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)


FLOAT32 = Arithmetic(bf16=False)
FLOAT32_CHANNELS_LAST = Arithmetic(bf16=False, channels_last=True)
BF16 = Arithmetic(bf16=True, channels_last=True)
FLOAT32_CONTIGUOUS = Arithmetic(bf16=False, channels_last=False)
BF16_CONTIGUOUS = Arithmetic(bf16=True, channels_last=False)


OVERRIDE = "DUALHEAD_PRECISION"
"""Environment variable: what `auto` means, `float32` or `bf16`, instead of a measurement."""


def settled_precision(precision: Precision) -> tuple[Precision, str]:
    """Return the precision that counts, and how it was chosen; the latter is empty if it was asked for, or is open.

    Raises:
        UserError: if the environment asks for what is no precision.
    """
    given = os.environ.get(OVERRIDE, "")
    if precision != "auto" or given in ("", "auto"):
        return precision, ""
    if given not in get_args(Precision):
        raise UserError(f"{OVERRIDE}={given}: write float32, bf16 or auto")
    return cast("Precision", given), f"by {OVERRIDE} in the environment"


def choose_arithmetic(
    precision: Precision, model: nn.Module, example: Tensor, layout: Layout = "auto", seconds: float = 1.0
) -> Arithmetic:
    """Choose the arithmetic for a precision and a layout; where they leave a choice, the fastest.

    Which is fastest is measured once for a machine and an architecture, and kept (`dualhead.system.measured`): results
    depend on the choice in their last bits, so it must not depend on what else the machine has to do. A forward pass
    and a backward pass to the input are timed: most of the work of adversarial training and white-box attacks. bf16
    must win clearly, since float32 is exact, and so must channels-last images in float32. bf16 goes with channels-last
    images without a measurement; models that cannot take these get contiguous ones.

    Args:
        precision: `float32`, `bf16` or `auto`.
        model: images to logits; its mode and values are left as they are, its weights in the layout chosen.
        example: a batch of images as the work will use.
        layout: `contiguous`, `channels_last` or `auto`.
        seconds: about how long to measure each.

    Raises:
        UserError: for channels-last images that the model cannot take.
    """
    precision, told = settled_precision(precision)
    with in_eval_mode(model):
        takes = layout != "contiguous" and _takes_channels_last(model, example)
        if layout == "channels_last" and not takes:
            raise UserError("runtime.layout: the model cannot take channels_last images; write contiguous or auto")
        float32 = [FLOAT32_CHANNELS_LAST] if takes else [FLOAT32_CONTIGUOUS]
        if layout == "auto" and takes:
            float32 = [FLOAT32, FLOAT32_CHANNELS_LAST]
        bf16 = [BF16 if takes else BF16_CONTIGUOUS]
        choice = {"float32": float32, "bf16": bf16, "auto": float32 + bf16}[precision]
        chosen = replace(choice[0], told=told)
        if len(choice) > 1:
            described = [_described(arithmetic) for arithmetic in choice]
            known = measured.kept(
                "fastest arithmetic of a pass forward and back", model, example, {"among": described},
                lambda: _described(_clearly_fastest(choice, model, example, seconds)), described.__contains__,
            )  # fmt: skip
            chosen = replace(choice[described.index(known.found)], told=known.told)
    chosen.lay_out(model)
    return chosen


def _described(arithmetic: Arithmetic) -> dict[str, Any]:
    return {"precision": arithmetic.name, "channels_last": arithmetic.channels_last}


def _clearly_fastest(choice: Sequence[Arithmetic], model: nn.Module, example: Tensor, seconds: float) -> Arithmetic:
    """Return the first of several, unless a later one is clearly faster."""
    chosen, least = choice[0], math.inf
    for arithmetic in choice:
        arithmetic.lay_out(model)
        taken = _seconds_per_pass(arithmetic.wrap(model), example, seconds)
        if taken < 0.9 * least:
            chosen, least = arithmetic, taken
    return chosen


def slowdown_by_bf16(chosen: Arithmetic, model: nn.Module, example: Tensor, seconds: float = 0.5) -> float:
    """Measure how many times as long passes take in bf16 as in float32: more than 1 where a CPU emulates it.

    Args:
        chosen: an arithmetic in bf16.
        model: images to logits, laid out for that arithmetic; left as it is.
        example: a batch of images as the work will use.
        seconds: about how long to measure each.
    """
    with in_eval_mode(model):
        slow, fast = (_seconds_per_pass(a.wrap(model), example, seconds) for a in (chosen, replace(chosen, bf16=False)))
    return slow / fast


def with_lanes(arithmetic: Arithmetic, model: nn.Module, example: Tensor, seconds: float = 0.8) -> Arithmetic:
    """Give the arithmetic as many lanes as torch has CPU threads, if attacks are measured to be clearly faster so.

    Args:
        arithmetic: one with a single lane.
        model: images to logits, laid out for that arithmetic; left as it is.
        example: a batch of images as the work will use.
        seconds: about how long to measure each.
    """
    count = torch.get_num_threads()
    if example.device.type != "cpu" or count == 1 or len(example) < count * LEAST_ROWS:
        return arithmetic
    try:
        functions = [arithmetic.wrap(copied.eval()) for copied in twins(model, count)]
        shares = example.tensor_split(count)
        in_lanes = _fastest(lambda: list(pool(count).map(_pass, functions, shares)), example.device, seconds)
    except Exception:  # whatever somebody else's model may raise that is copied or asked from a thread
        return arithmetic
    with in_eval_mode(model):
        alone = _seconds_per_pass(arithmetic.wrap(model), example, seconds)
    return replace(arithmetic, lanes=count) if in_lanes < 0.9 * alone else arithmetic


def _takes_channels_last(model: nn.Module, example: Tensor) -> bool:
    """Try whether a pass runs in that layout: `features.view(len(features), -1)` is code that fails there."""
    arithmetic = Arithmetic(bf16=False, channels_last=True)
    arithmetic.lay_out(model)
    try:
        # A copy, since `contiguous` leaves the strides of grey images.
        _pass(arithmetic.wrap(model), example[:2].clone(memory_format=torch.channels_last))
    except RuntimeError:  # what else it may mean shows again in the contiguous layout
        return False
    return True


def _pass(logits_fn: Callable[[Tensor], Tensor], example: Tensor) -> None:
    x = example.detach().requires_grad_()
    torch.autograd.grad(logits_fn(x).sum(), x)


def _seconds_per_pass(logits_fn: Callable[[Tensor], Tensor], example: Tensor, seconds: float) -> float:
    return _fastest(lambda: _pass(logits_fn, example), example.device, seconds)


def _fastest(do: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the shortest of several measured times, in seconds."""

    def once() -> float:
        began = time.perf_counter()
        do()
        synchronize(device)
        return time.perf_counter() - began

    once()  # pays for allocation and for the choice of kernels
    best, deadline = once(), time.perf_counter() + seconds / 2
    for _ in range(MOST_PASSES):
        if time.perf_counter() > deadline:
            break
        best = min(best, once())
    return best
