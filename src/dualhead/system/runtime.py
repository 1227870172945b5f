"""Where and how to compute: the one place that names devices."""

from __future__ import annotations

import math
import os
import pickle
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dualhead.errors import RunError, UserError
from dualhead.system.processes import group, local_rank
from dualhead.system.replicas import LEAST_ROWS, pool, twins

P = ParamSpec("P")
R = TypeVar("R")
Precision = Literal["float32", "bf16", "auto"]
Layout = Literal["contiguous", "channels_last", "auto"]
UNKNOWN_MEMORY = 8 * 2**30
"""Bytes that are taken to be free where the system does not tell."""


def find_device(name: str) -> torch.device:
    """A device by name; `auto` takes an accelerator if there is one that knows float64, else the CPU.

    Budgets are checked in float64, which Apple's GPUs do not have. Of several processes on a machine each gets the
    accelerator of its number, unless the name itself has one.

    Raises:
        UserError: if torch does not know the device or this machine lacks it.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = "cpu" if accelerator is None or accelerator.type == "mps" else accelerator.type
    number = local_rank()
    if number is not None and name.isalpha() and name != "cpu":
        here = torch.accelerator.device_count()
        if number >= here:
            raise UserError(
                f"device {name!r}: there are {here} on this machine, too few for process {number + 1}; "
                f"start --nproc-per-node {here}"
            )
        torch.accelerator.set_device_index(number)
        name = f"{name}:{number}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"device {name!r} is not usable here; write auto, cpu, cuda or cuda:0") from None
    return device


def room_for_images(device: torch.device) -> int:
    """Bytes of decoded images that a process should hold at most: a quarter of what is free, since work copies them.

    What is free is the smaller of this machine's memory, shared by the processes that torchrun started on it, and the
    device's own.
    """
    free = _free_memory() // _processes_here()
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return free // 4


def processors() -> int:
    """This process's share of the processors of the machine, at least 1."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // _processes_here())


def _processes_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_memory() -> int:
    """Bytes that this machine, or the container that it is, has left; of a system that does not tell, half of all."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        limit, used = (Path("/sys/fs/cgroup", f"memory.{name}").read_text("ascii") for name in ("max", "current"))
        if limit.strip() != "max":
            stat = Path("/sys/fs/cgroup/memory.stat").read_text("ascii").splitlines()
            files = sum(int(line.split()[1]) for line in stat if line.startswith("inactive_file "))
            found.append(max(0, int(limit) - int(used) + files))
    except (OSError, ValueError):
        pass  # another system, or a container without these files: what was found counts
    if not found and hasattr(os, "sysconf"):
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    return min(found, default=UNKNOWN_MEMORY)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def refuse_tf32(device: torch.device) -> None:
    """Refuse TF32 where there is none.

    Raises:
        UserError: on a device that does not have it.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError(f"runtime.precision: tf32 needs a GPU that has it, and this is {device.type}; write float32")


@contextmanager
def float32_products(*, tf32: bool = False) -> Iterator[None]:
    """Inside, what a GPU multiplies in float32 is float32, or TF32, whose factors have 10 bits of mantissa.

    torch's own default is TF32 for convolutions and float32 for matrix products. Elsewhere than on GPUs both are
    float32 anyway.
    """
    matrices, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matrices.allow_tf32, convolutions.allow_tf32
    matrices.allow_tf32 = convolutions.allow_tf32 = tf32
    try:
        yield
    finally:
        matrices.allow_tf32, convolutions.allow_tf32 = before


def generator_states(device: torch.device) -> list[Tensor]:
    """The states of torch's own generators: of the CPU, and of the device if it is another."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_generator_states(states: Sequence[Tensor], device: torch.device) -> None:
    """Put torch's generators where `generator_states` found them; on another kind of device, that of the CPU alone."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def all_generator_states(device: torch.device) -> tuple[Any, ...]:
    """Where the generators of Python, numpy and torch (the CPU's and the device's) stand; comparable by `==`."""
    return random.getstate(), pickle.dumps(np.random.get_state()), [s.tolist() for s in generator_states(device)]


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators of Python, numpy and torch: the CPU's and this device's, and no other one's."""
    random.seed(seed)
    np.random.seed(seed)
    where = [torch.device("cpu"), *([device] if device.type == "cuda" else [])]
    set_generator_states([torch.Generator(place).manual_seed(seed).get_state() for place in where], device)


@contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Puts the generators of Python, numpy and torch (the CPU's and the device's) back behind."""
    python, arrays, states = random.getstate(), np.random.get_state(), generator_states(device)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        set_generator_states(states, device)


def synchronised_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch norm that takes its statistics over all processes; parameters and names stay.

    Raises:
        UserError: on a device for which torch does not have it.
    """
    if device.type != "cuda":
        raise UserError(f"runtime.batch_norm: synchronised needs GPUs, and this is {device.type}; write local")
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]  # torch's
    return converted


@dataclass(frozen=True)
class Arithmetic:
    """A choice of number format, memory layout and use of threads for the passes through a model.

    Args:
        bf16: run the passes under bfloat16 autocast; else in float32.
        channels_last: keep images and the weights of convolutions in that layout; False: contiguous; None: the weights
            contiguous, the images as they come.
        lanes: in how many threads, each with images of its own, attacks run; 1 leaves threads to torch.
        compiled: whether the passes of training steps go through `torch.compile`.
    """

    bf16: bool
    channels_last: bool | None = None
    lanes: int = 1
    compiled: bool = False

    @property
    def name(self) -> str:
        """As recipes write it."""
        return "bf16" if self.bf16 else "float32"

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context for a forward pass."""
        return torch.autocast(device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def reuse_casts(self, device: torch.device) -> AbstractContextManager[Any]:
        """A context in which passes share the casts of weights to bfloat16; the weights must not change inside.

        Autocast drops them when the outermost of its contexts ends, even one that is switched off.
        """
        return torch.autocast(device.type, torch.bfloat16, enabled=False) if self.bf16 else nullcontext()

    def lay_out(self, model: nn.Module) -> None:
        """Give the model's weights the layout that suits, in place; values stay."""
        set_layout(model, torch.channels_last if self.channels_last else torch.contiguous_format)

    def images(self, x: Tensor) -> Tensor:
        """Images in the layout that suits."""
        if self.channels_last:
            return x.contiguous(memory_format=torch.channels_last)
        if self.channels_last is None or x.stride() == torch.empty(x.shape, device="meta").stride():
            return x
        return x.clone(memory_format=torch.contiguous_format)  # `contiguous` leaves the strides of grey images

    def wrap(self, logits_fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The function under this arithmetic; logits come out in float32."""

        def run(x: Tensor) -> Tensor:
            with self.autocast(x.device):
                return logits_fn(self.images(x)).float()

        return run


def compiled(function: Callable[P, R], what: str) -> Callable[P, R]:
    """The function as `torch.compile` makes it, as one graph for each shape that it meets; never partly eager.

    Args:
        function: of tensors.
        what: it is, for the message.

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


def choose_arithmetic(
    precision: Precision, model: nn.Module, example: Tensor, layout: Layout = "auto", seconds: float = 1.0
) -> Arithmetic:
    """The arithmetic that a precision and a layout stand for; where they leave a choice the fastest one, measured.

    What is timed is a forward pass and a backward pass to the input: most of what adversarial training and white-box
    attacks do. bf16 must win clearly, since float32 is exact, and so must channels-last images in float32. bf16 goes
    with channels-last images without a measurement; models that cannot take these get contiguous ones.

    Args:
        precision: `float32`, `bf16` or `auto`.
        model: images to logits; its mode and values are left as they are, its weights in the layout chosen.
        example: a batch of images as the work will use.
        layout: `contiguous`, `channels_last` or `auto`.
        seconds: about how long to measure each.

    Raises:
        UserError: for channels-last images that the model cannot take.
    """
    with in_eval_mode(model):
        takes = layout != "contiguous" and _takes_channels_last(model, example)
        if layout == "channels_last" and not takes:
            raise UserError("runtime.layout: the model cannot take channels_last images; write contiguous or auto")
        float32 = [FLOAT32_CHANNELS_LAST] if takes else [FLOAT32_CONTIGUOUS]
        if layout == "auto" and takes:
            float32 = [FLOAT32, FLOAT32_CHANNELS_LAST]
        bf16 = [BF16 if takes else BF16_CONTIGUOUS]
        choice = {"float32": float32, "bf16": bf16, "auto": float32 + bf16}[precision]
        chosen = choice[0] if len(choice) == 1 else _clearly_fastest(choice, model, example, seconds)
    chosen.lay_out(model)
    return chosen


def _clearly_fastest(choice: Sequence[Arithmetic], model: nn.Module, example: Tensor, seconds: float) -> Arithmetic:
    """The first of several, unless a later one is clearly faster."""
    chosen, least = choice[0], math.inf
    for arithmetic in choice:
        arithmetic.lay_out(model)
        taken = _seconds_per_pass(arithmetic.wrap(model), example, seconds)
        if taken < 0.9 * least:
            chosen, least = arithmetic, taken
    return chosen


def slowdown_by_bf16(chosen: Arithmetic, model: nn.Module, example: Tensor, seconds: float = 0.5) -> float:
    """How many times as long passes take in bf16 as in float32, measured: more than 1 where a CPU has to emulate it.

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
    """The arithmetic with as many lanes as torch has threads on a CPU, if attacks are clearly faster so: measured.

    Args:
        arithmetic: with one lane.
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
    """Whether a pass runs in that layout: `features.view(len(features), -1)` fails there, among others' code."""
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
    """The shortest of several times that something takes."""

    def once() -> float:
        began = time.perf_counter()
        do()
        synchronize(device)
        return time.perf_counter() - began

    once()  # pays for allocation and for the choice of kernels
    best, deadline = once(), time.perf_counter() + seconds / 2
    while time.perf_counter() < deadline:
        best = min(best, once())
    return best


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, each module's own mode restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def describe_environment(device: torch.device) -> dict[str, Any]:
    """What determines speed and last bits of a result, without names of hosts or people."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("dualhead")
    except PackageNotFoundError:
        own = "unknown"
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "dualhead": own,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "accelerator": accelerator,
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": group().world,
    }


def _cpu_name() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123  # a stream of the kernel's, not a path
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
