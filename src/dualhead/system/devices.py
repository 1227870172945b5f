"""Devices: which to use, what they hold, what they can do. The one place that names them."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualhead.errors import UserError
from dualhead.system import quota
from dualhead.system.processes import group, local_rank

UNKNOWN_MEMORY = 8 * 2**30
"""Bytes that are taken to be free where the system does not tell."""


def find_device(name: str) -> torch.device:
    """Find a device by name; `auto` takes an accelerator that knows float64 if there is one, else the CPU.

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
    """Return how many bytes of decoded images a process should hold at most: a quarter of the free memory.

    A quarter, since work copies them. The free memory is the smaller of the machine's, shared by the processes that
    torchrun started on it, and the device's own.
    """
    free = _free_memory() // _processes_here()
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return free // 4


def processors() -> int:
    """Return this process's share of the processors that the machine, or the container's quota, has; at least 1."""
    return max(1, quota.processors() // _processes_here())


def _processes_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_memory() -> int:
    """Return the free bytes of this machine or container; half of all memory where the system does not tell."""
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
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def refuse_tf32(device: torch.device) -> None:
    """Refuse TF32 where there is none.

    Raises:
        UserError: on a device that does not have it.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError(f"runtime.precision: tf32 needs a GPU that has it, and this is {device.type}; write float32")


def generator_state(device: torch.device) -> Tensor | None:
    """Return the state of the device's own random number generator; None where the CPU's serves."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_generator_state(state: Tensor, device: torch.device) -> None:
    """Put the device's own generator where `generator_state` found it; other devices have none and stay as they are."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)


@contextmanager
def float32_products(*, tf32: bool = False) -> Iterator[None]:
    """Let GPUs multiply float32 matrices in float32, or in TF32, whose factors have 10 bits of mantissa.

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


def synchronised_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model with batch norm whose statistics are over all processes; parameters and names stay.

    Raises:
        UserError: on a device for which torch does not have it.
    """
    if device.type != "cuda":
        raise UserError(f"runtime.batch_norm: synchronised needs GPUs, and this is {device.type}; write local")
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]  # torch's
    return converted


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Describe what determines the speed and the last bits of a result, without names of hosts or people."""
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
