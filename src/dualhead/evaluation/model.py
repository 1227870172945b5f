"""The model under evaluation: frozen, asked in float32 for verdicts and, where it pays, in bf16 for the search."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualhead.attacks import LogitsFn, Query, predictions
from dualhead.attacks.losses import cross_entropy
from dualhead.errors import UserError
from dualhead.models import other_types, output_of_one
from dualhead.system import measured
from dualhead.system.arithmetic import BF16, FLOAT32, Arithmetic, Precision, set_layout, settled_precision
from dualhead.system.devices import float32_products, synchronize
from dualhead.system.modes import in_eval_mode
from dualhead.system.outputs import logits_of, two_at_least, writes_to_images

ROWS = 16
"""Batches are padded to a multiple of this many rows. Matrix kernels treat the last few rows of a batch differently,
in another order of summation, so that an image's logits would depend in the last bit on how many images it came with,
and a sign of a gradient with it. Measured with oneDNN: with multiples of 4 rows on AVX512, and of 16 on AVX512 with AMX
(linear layers, convolutions of 1x1 and 3x3), logits and gradients are equal to the bit for every batch size up to 64
and every order. `batch_invariant` checks it for the model at hand."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode and its parameters without gradients, and put both back at the end."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with in_eval_mode(model):
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, required in flags:
                parameter.requires_grad_(required)


def device_of(model: nn.Module) -> torch.device:
    """Where the model lies: its first parameter or buffer decides."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def padded(count: int, unit: int = ROWS) -> int:
    """The next multiple of `unit`."""
    return -(-count // unit) * unit


def pad_rows(x: Tensor, unit: int = ROWS) -> Tensor:
    """Rows [B, ...] with copies of the first up to a multiple of `unit`."""
    missing = padded(x.shape[0], unit) - x.shape[0]
    return torch.cat((x, x[:1].expand(missing, *x.shape[1:]))) if missing else x


def read_logits(model: nn.Module, x: Tensor) -> Tensor:
    """Logits [B, C] of a model on images; one logit z per image is read as [0, z]."""
    return two_at_least(logits_of(model(x)), len(x))


@float32_products()
def answers(model: nn.Module, images: Tensor, batch_size: int = 256) -> NDArray[np.int64]:
    """Return the class that a model takes each image for, int64 [N]; -1 where its logits are not numbers.

    Args:
        model: images float32 [B, C, H, W] in [0, 1] to logits; in eval mode meanwhile.
        images: uint8 [N, C, H, W].
        batch_size: images at once.
    """
    device, said = device_of(model), []
    with torch.no_grad(), frozen(model):
        for chosen in torch.split(images, batch_size):
            logits = read_logits(model, chosen.to(device).float() / 255)
            said.append(predictions(logits.float()).cpu())
    return np.asarray(torch.cat(said).numpy(), np.int64)


def outputs_of(model: nn.Module, heads: LogitsFn | None) -> LogitsFn | None:
    """Images to the logits of all heads and, last, of the aggregate, [B, H + 1, C]; None if there are no heads.

    A model that has `all_logits` says itself what it shows, which may be more than heads.
    """
    if heads is None and hasattr(model, "all_logits"):
        return cast("LogitsFn", model.all_logits)
    if heads is None and not hasattr(model, "head_logits"):
        return None
    ask = cast("LogitsFn", heads or model.head_logits)
    aggregator = getattr(model, "aggregate", None) if heads is None else None

    def outputs(x: Tensor) -> Tensor:
        each = ask(x.clone() if aggregator is None else x)  # it may change its images
        whole = read_logits(model, x) if aggregator is None else aggregator(each)
        return torch.cat((each, whole[:, None]), 1)  # of the wider type: an aggregate is float32 also beside bf16

    return outputs


def _padded_call(function: LogitsFn, x: Tensor) -> Tensor:
    return function(pad_rows(x))[: x.shape[0]]


def worth_reducing(seconds: Mapping[str, float], left: int, audited: int) -> bool:
    """Whether to search without gradients in bf16: where it is clearly faster, also with its audit in float32.

    Args:
        seconds: of a forward pass for an image, by precision; empty where there is no choice.
        left: images to search.
        audited: images of those at most that are searched again in float32.
    """
    if not seconds:
        return False
    full, reduced = seconds[FLOAT32.name], seconds[BF16.name]
    return 1.2 * reduced < full and left * reduced + min(audited, left) * full < left * full


def differ(first: Tensor, second: Tensor, share: float) -> bool:
    """Whether logits differ by more than a share of the largest one; NaN equals NaN."""
    largest = float(first.abs().nan_to_num(0.0, 0.0, 0.0).amax())
    return not torch.allclose(first, second, rtol=0.0, atol=share * max(largest, 1e-6), equal_nan=True)


class Subject:
    """Access to a frozen model in the two ways that an evaluation needs.

    Args:
        model: images [B, C, H, W] in [0, 1] to logits, or to anything that `logits_of` reads.
        heads: images to the logits of all heads [B, H, C]; None for the model's own `head_logits`, if it has one.
        batch_size: images at once at most, rounded up to a multiple of `ROWS`.
    """

    def __init__(self, model: nn.Module, heads: LogitsFn | None, batch_size: int) -> None:
        self.model = model
        self.device = device_of(model)
        self.batch_size = self.forward_batch_size = padded(batch_size)
        self.arithmetic: Arithmetic = FLOAT32
        self.repeatable = False  # see `Query.repeatable`
        self._heads = heads
        self._in_place: bool | None = None  # whether the model changes its images; None: not known yet
        self._search_model, self._layout = model, torch.contiguous_format
        self._copied: tuple[nn.Module, torch.memory_format] | None = None  # the model as the search has it, once tried

    @property
    def reduced(self) -> bool:
        """Whether the search sees less than float32."""
        return self.arithmetic != FLOAT32

    def logits(self, x: Tensor) -> Tensor:
        """Logits of the float32 model [B, C], which alone decide; with a graph if gradients are enabled."""
        if self._in_place is None:
            self._in_place = writes_to_images(self.model, pad_rows(x[:ROWS]))
        return _padded_call(lambda images: read_logits(self.model, self._given(images)).float(), x)

    def _given(self, x: Tensor) -> Tensor:
        """Images as the model may have them: copies, if it changes what it is given."""
        return x.clone() if self._in_place else x

    def verify(self, x: Tensor) -> Tensor:
        """`logits` in batches of `batch_size`, without a graph."""
        with torch.no_grad():
            return torch.cat([self.logits(chunk) for chunk in torch.split(x, self.batch_size)])

    @property
    def layout(self) -> str:
        """How the search lays out images in memory."""
        return str(self._layout).removeprefix("torch.")

    def query(self, render: LogitsFn = lambda x: x) -> Query:
        """The model as the search sees it, at points that `render` makes images of."""
        model, outputs = self._search_model, outputs_of(self._search_model, self._heads)
        # Somebody's own function of the images may not take another layout.
        layout = self._layout if self._heads is None else torch.contiguous_format
        query = Query(
            self._searching(lambda x: read_logits(model, x), self._layout, render),
            None if outputs is None else self._searching(outputs, layout, render),
        )
        query.repeatable = self.repeatable
        return query

    def _searching(self, function: LogitsFn, layout: torch.memory_format, render: LogitsFn) -> LogitsFn:
        def ask(point: Tensor) -> Tensor:
            x = render(point)
            with self.arithmetic.autocast(self.device):
                return function(self._given(x.contiguous(memory_format=layout))).float()

        return lambda x: _padded_call(ask, x)

    def use(self, arithmetic: Arithmetic, example: Tensor) -> None:
        """Search in this arithmetic from now on. Verdicts stay with the float32 model, which is left as it is.

        The search asks a copy whose convolutions are laid out channels last where that suits the device: always in
        bf16, and on a CPU in float32 too (measured with oneDNN on AVX512: 1.6 times faster forwards on a small
        WideResNet). A model that cannot be copied, or cannot take images so, is asked as it is.

        Args:
            arithmetic: of the search.
            example: some images to try the copy on.
        """
        self.arithmetic = arithmetic
        self._search_model, self._layout = self.model, torch.contiguous_format
        if arithmetic == FLOAT32 and self.device.type != "cpu":
            return
        if self._copied is None:
            self._copied = self._channels_last(example) or (self.model, torch.contiguous_format)
        self._search_model, self._layout = self._copied

    def _channels_last(self, example: Tensor) -> tuple[nn.Module, torch.memory_format] | None:
        """Copy the model for that layout; None where it cannot be copied, or cannot take images so."""
        try:
            copied = copy.deepcopy(self.model)
            set_layout(copied, torch.channels_last)
            images = pad_rows(example[:ROWS]).contiguous(memory_format=torch.channels_last)
            images = images.detach().requires_grad_()
            logits = read_logits(copied, self._given(images)).float()
            if logits.requires_grad:
                torch.autograd.grad(logits.sum(), images, allow_unused=True)
        except Exception:  # whatever somebody else's model may raise; the layout in the results says what was used
            return None
        with torch.no_grad():
            expected = self.logits(example[:ROWS])
        return None if differ(expected, logits.detach()[: len(expected)], 1e-3) else (copied, torch.channels_last)

    def settle(self, precision: Precision, x: Tensor, y: Tensor, work: int) -> dict[str, Any]:
        """Choose precision and batch sizes for speed, none of which changes what a verdict means.

        Under `auto` gradients are searched in float32. For searches without gradients the times of a forward pass in
        float32 and in bf16 are told, measured once for a machine and kept: with them `worth_reducing` decides. The
        batch grows from 32, up to `batch_size`, while that makes an image cheaper: on a CPU a batch that outgrows the
        cache is slower. A size is tried only if that costs little beside the work.

        Args:
            precision: what was asked for.
            x: at least one image.
            y: its label.
            work: passes that lie ahead at most.

        Returns:
            `precision`, of searches by gradients; `chosen`, how; `seconds_per_image` of a forward pass by precision,
            empty where all is searched in the same.
        """
        sizes = [size for size in (32 * 2**k for k in range(16)) if size < self.batch_size] + [self.batch_size]
        precision, told = settled_precision(precision)
        seconds: dict[str, float] = {}
        if precision == "auto":
            known = self._seconds_without_gradients(x, y, sizes[0])
            seconds, told = known.found, known.told
        self.use(BF16 if precision == "bf16" else FLOAT32, x)
        self._settle_sizes([size for size in sizes if size <= 0.005 * work], sizes[0], x, y)
        return {"precision": self.arithmetic.name, "chosen": told or "as asked for", "seconds_per_image": seconds}

    def _seconds_without_gradients(self, x: Tensor, y: Tensor, size: int) -> measured.Measured:
        """Return the time of a forward pass for an image, by precision."""

        def measure() -> dict[str, float]:
            taken = {}
            for arithmetic in (FLOAT32, BF16):
                self.use(arithmetic, x)
                taken[arithmetic.name] = round(self.seconds_per_image(x, y, size, backward=False), 8)
            return taken

        def fits(found: Any) -> bool:
            names = {FLOAT32.name, BF16.name}
            return isinstance(found, dict) and set(found) == names and all(type(s) is float for s in found.values())

        return measured.kept(
            "seconds of a forward pass for an image", self.model, x[:1], {"batch": size}, measure, fits
        )

    def _settle_sizes(self, affordable: list[int], smallest: int, x: Tensor, y: Tensor) -> None:
        """Choose the sizes of batches. On a CPU, where they do not depend on free memory, they are kept too."""
        if not affordable:
            self.batch_size = self.forward_batch_size = smallest
            return

        def fits(found: Any) -> bool:
            return isinstance(found, list) and len(found) == 2 and all(size in affordable for size in found)

        found = self._fastest_sizes
        if self.device.type == "cpu":
            settings = {"among": affordable, "precision": self.arithmetic.name}
            known = measured.kept(
                "batch sizes of passes back and forth, and forward", self.model, x[:1], settings,
                lambda: found(affordable, x, y), fits,
            )  # fmt: skip
            self.batch_size, self.forward_batch_size = known.found
        else:
            self.batch_size, self.forward_batch_size = found(affordable, x, y)

    def _fastest_sizes(self, affordable: list[int], x: Tensor, y: Tensor) -> list[int]:
        """Measure the size for passes with gradients, and the one for passes without."""
        best, chosen = math.inf, affordable[0]
        for size in affordable:
            seconds = self.seconds_per_image(x, y, size)
            if seconds > 0.95 * best:
                break
            best, chosen = seconds, size
        # The largest of nearly the best: a batch that is not full, or costs its search something, then weighs less.
        forward = {size: self.seconds_per_image(x, y, size, backward=False) for size in affordable}
        return [chosen, max(size for size in affordable if forward[size] <= 1.1 * min(forward.values()))]

    def _gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.query().gradient(x, lambda logits: cross_entropy(logits, y))

    def seconds_per_image(
        self, x: Tensor, y: Tensor, size: int, *, backward: bool = True, budget: float = 0.15
    ) -> float:
        """The best time of a pass of the search: forward, and back to the images unless told otherwise.

        Args:
            x: at least one image.
            y: its label.
            size: images at once; those of x, again and again.
            backward: both passes, or the forward one alone.
            budget: seconds to measure for, about.

        Returns:
            Seconds; infinite if memory does not suffice. The first pass, a warm-up, does not count.
        """
        rows = torch.arange(size, device=x.device) % len(x)
        x, y = x[rows], y[rows]
        query, begun = self.query(), time.perf_counter()
        times: list[float] = []
        try:
            while len(times) < 3 or (len(times) < 10 and time.perf_counter() - begun < budget):
                start = time.perf_counter()
                if backward:
                    query.gradient(x, lambda logits: cross_entropy(logits, y))
                else:
                    query.logits(x)
                synchronize(self.device)
                times.append(time.perf_counter() - start)
        except torch.OutOfMemoryError:
            return math.inf
        return min(times[1:]) / size

    def batch_invariant(self, x: Tensor, y: Tensor) -> bool:
        """Whether logits and gradients are equal to the bit in a batch of `ROWS` and in all of x, in another order."""
        if x.shape[0] <= ROWS:
            return True
        order = torch.arange(x.shape[0] - 1, -1, -1, device=x.device)
        few, many = self._gradient(x[:ROWS], y[:ROWS]), self._gradient(x[order], y[order])
        back = order[:ROWS]
        return all(torch.equal(a, b[back]) for a, b in zip(few, many, strict=True))


def check_module(model: object, name: str, instead: str) -> None:
    """Refuse a model that is no module.

    Args:
        model: what was given.
        name: of the argument.
        instead: says of anything but a path what would be right.

    Raises:
        UserError: if it is none.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, str | Path):
        instead = f"dualhead.load({str(model)!r}) gives that of a run or a saved model"
    elif isinstance(model, type) and issubclass(model, nn.Module):
        instead = f"that is a class; give {model.__name__}(...)"
    raise UserError(f"{name}: must be a torch.nn.Module, got {type(model).__name__}; {instead}")


@contextmanager
def told_if_unfit(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Tell an error of a model that cannot even take one of the images, [N, C, H, W], as its cause; leave any other.

    The model is asked again only where it failed, so that one that draws random numbers draws the same.

    Raises:
        UserError: if it cannot.
    """
    try:
        yield
    except UserError:
        raise
    except Exception:  # whatever somebody else's forward may raise
        channels, height, width = images.shape[1:]
        output_of_one(model, (channels, height, width), type(model).__name__)
        if wrong := other_types(model):
            raise UserError(
                f"model: its parameters are {wrong}, and images are torch.float32; give model.float()"
            ) from None
        raise


def check_images(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Refuse what cannot be evaluated, and clamp what only rounding put outside [0, 1].

    Args:
        images: uint8 or floating [N, C, H, W].
        labels: integers [N]; also bool, or floating numbers that are integers, and [N, 1].

    Returns:
        Images, and labels as integers [N].

    Raises:
        UserError: for wrong shapes or types, or images outside [0, 1], each cause in its own words.
    """
    if images.ndim != 4:
        raise UserError(f"images must have shape [N, C, H, W], got {list(images.shape)}")
    if not len(images):
        raise UserError("there are no images to evaluate on")
    if images.shape[3] in (1, 3) and images.shape[1] == images.shape[2] > 4:
        raise UserError(
            f"images must have shape [N, C, H, W], got {list(images.shape)}, which is [N, H, W, C]; give "
            "images.permute(0, 3, 1, 2)"
        )
    return _check_values(images), _check_labels(labels, len(images))


def refuse_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels [N] beyond the logits of a model.

    Raises:
        UserError: if there are any.
    """
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UserError(
            f"labels must lie in 0 to {classes - 1}, since the model gives {classes} logits; got {low} to {high}"
        )


def _check_labels(labels: Tensor, count: int) -> Tensor:
    if labels.shape == (count, 1):
        labels = labels[:, 0]
    if labels.shape != (count,):
        raise UserError(f"labels must have shape [{count}], one per image, got {list(labels.shape)}")
    whole = labels.is_floating_point() and torch.equal(labels, labels.round())
    if labels.is_complex() or (labels.is_floating_point() and not whole):
        raise UserError(f"labels must be integers, got {labels.dtype}")
    return labels if labels.dtype not in (torch.bool,) and not whole else labels.long()


def _check_values(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        fits = not images.is_complex() and images.min() >= 0 and images.max() <= 255
        hint = "; these values fit images.to(torch.uint8)" if fits else ""
        raise UserError(f"images must be uint8, or floating point in [0, 1], got {images.dtype}{hint}")
    low, high = float(images.min()), float(images.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = (~images.isfinite()).flatten(1).any(1).nonzero()[:, 0]
        raise UserError(
            f"{len(bad)} of {len(images)} images hold NaN or infinite values, which are not finite and not in "
            f"[0, 1]; the first is image {int(bad[0])}; leave them out or mend them"
        )
    if low >= 0.0 and high <= 1.0:
        return images
    rounding = min(16 * torch.finfo(images.dtype).eps, 0.01)
    if low >= -rounding and high <= 1.0 + rounding:
        return images.clamp(0.0, 1.0)
    said = f"images must lie in [0, 1], got values from {low:g} to {high:g}"
    if low >= -rounding and high > 2.0:
        raise UserError(f"{said}; divide by {255 if high <= 256 else 65535 if high > 4096 else 'the largest value'}")
    if -1.0 - rounding <= low < -0.5 and high <= 1.0 + rounding:
        raise UserError(f"{said}, as if scaled to [-1, 1]; give (images + 1) / 2, and leave scaling to the model")
    outside = float(((images < 0) | (images > 1)).float().mean())
    if low > -0.5 and high < 1.5 and outside < 0.25:
        raise UserError(f"{said}, as bicubic resizing overshoots; give images.clamp(0, 1)")
    raise UserError(f"{said}, as if normalised; leave normalisation to the model, and give the raw images")
