"""A classifier as ONNX, for engines without PyTorch; checked against onnxruntime before it counts as written."""

from __future__ import annotations

import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from dualhead.errors import UserError
from dualhead.system.files import write_atomically

NEEDED: Final = ("onnx", "onnxscript", "onnxruntime")
BATCHES: Final = (1, 2, 5)
"""Batch sizes at which the file is held to the model: others than the one it was made with among them."""
TOLERANCE: Final = 1e-4
"""Largest difference of a logit that may be, relative to the largest logit (or to 1): float32 in another order."""


@dataclass(frozen=True)
class OnnxCheck:
    """The difference between the file and the model.

    Args:
        path: the file.
        difference: largest absolute difference of a logit between onnxruntime on the CPU and PyTorch.
        scale: largest absolute logit.
        images: number of random images compared.
    """

    path: Path
    difference: float
    scale: float
    images: int


def require_onnx() -> None:
    """See that what ONNX needs is installed.

    Raises:
        UserError: saying what to install.
    """
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"ONNX needs {name} ({reason}); install it with: pip install 'dualhead[onnx]'") from None


def write_onnx(model: nn.Module, image_shape: tuple[int, int, int], path: Path) -> OnnxCheck:
    """Write a classifier as one ONNX file: `images` float32 [N, C, H, W] in [0, 1] to `logits` [N, classes], N free.

    Args:
        model: in eval mode, in float32, on the CPU.
        image_shape: channels, height, width.
        path: the file, written whole or not at all.

    Returns:
        How far onnxruntime is from PyTorch.

    Raises:
        UserError: if the extra is not installed, the model cannot be written as ONNX, or the file computes something
            else.
    """
    require_onnx()
    images = torch.rand(sum(BATCHES), *image_shape, generator=torch.Generator().manual_seed(0))
    content = _converted(model, images[:2])
    difference, scale = _compare(model, content, images)
    if not difference <= TOLERANCE * max(1.0, scale):
        raise UserError(
            f"{path.name}: as ONNX the model gives other logits: they differ by up to {difference:.2g} where the "
            f"largest is {scale:.2g}; nothing is written"
        )
    write_atomically(path, lambda aside: aside.write_bytes(content))
    return OnnxCheck(path, difference, scale, len(images))


def _converted(model: nn.Module, example: torch.Tensor) -> bytes:
    """Convert the model to ONNX's format, with a free batch size."""
    batch = torch.export.Dim("batch")
    file = io.BytesIO()
    with _quiet():
        try:
            program: Any = torch.onnx.export(
                model, (example,), dynamo=True, verbose=False, dynamic_shapes=({0: batch},),
                input_names=["images"], output_names=["logits"],
            )  # fmt: skip
            program.save(file)
        except Exception as error:  # torch.export raises whatever the model's own code does to its tracer
            cause = error.__cause__ or error
            reason = " ".join(str(cause).split())[:200]
            raise UserError(f"the model cannot be written as ONNX: {type(cause).__name__}: {reason}") from error
    return file.getvalue()


def _compare(model: nn.Module, content: bytes, images: torch.Tensor) -> tuple[float, float]:
    """Return the largest absolute difference of a logit, and largest logit, over batches of several sizes."""
    session = importlib.import_module("onnxruntime").InferenceSession(content, providers=["CPUExecutionProvider"])
    differences, scale = [], 0.0
    for batch in torch.split(images, list(BATCHES)):
        with torch.no_grad():
            expected = model(batch)
        found = torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0])
        if found.shape != expected.shape:
            return float("inf"), scale
        differences.append((found - expected).abs().max())
        scale = max(scale, float(expected.abs().max()))
    return float(torch.stack(differences).max()), scale  # NaN if one of them is


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's log about packages that nobody asked for, and about its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
