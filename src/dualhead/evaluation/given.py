"""Labelled images as people hold them: a `DataLoader`, a data set, or any iterable, kept in a file while measured."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from dualhead.errors import UserError

IMAGE_KEYS = ("image", "images", "img", "pixel_values", "x")
LABEL_KEYS = ("label", "labels", "fine_label", "target", "y")


def read_all(source: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Read labelled images once, into a temporary file that is mapped to memory: what is not looked at takes no room.

    The file has no name, and goes with the tensor. A loader that shuffles is read in the order of its data set, so that
    each image keeps its number.

    Args:
        source: pairs (image, label) or batches (images, labels), as tuples that may go on, or dicts that name them.
            Images are tensors or arrays [C, H, W] or [B, C, H, W], uint8 or floating, or PIL images.

    Returns:
        Images [N, C, H, W] and labels [N].

    Raises:
        UserError: for entries that are no labelled images, of several shapes or types, or none at all.
    """
    # The file lives as long as the map of it does.
    file = tempfile.TemporaryFile()  # noqa: SIM115
    labels: list[Tensor] = []
    first: Tensor | None = None
    for place, entry in enumerate(_entries(source)):
        images, named = _pair(entry, place)
        if first is None:
            first = images[:1]
        if images.shape[1:] != first.shape[1:] or images.dtype != first.dtype:
            raise UserError(
                f"entry {place}: its images are {images.dtype} {list(images.shape[1:])}, those before "
                f"{first.dtype} {list(first.shape[1:])}; let the data set bring all to one size and type"
            )
        if len(named) != len(images):
            raise UserError(
                f"entry {place}: {len(images)} images {list(images.shape[1:])} and {len(named)} labels; one image is "
                "[C, H, W] with one number, a batch [B, C, H, W] (grey: C = 1) with labels [B]"
            )
        _append(file, images)
        labels.append(named)
    count = sum(map(len, labels))
    if first is None or not count:
        raise UserError("there are no images to evaluate on; a generator that was read once gives nothing again")
    file.flush()
    numbers = first.view(torch.uint8) if first.dtype == torch.bfloat16 else first
    mapped = np.memmap(file, numbers.numpy().dtype, "r+", shape=(count, *numbers.shape[1:]))
    whole = torch.from_numpy(mapped)
    return whole.view(first.dtype), torch.cat(labels)


def tensors_of(images: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Return images and labels that stand apart as tensors.

    Args:
        images: a tensor, an array, or a list of tensors or arrays of one shape.
        labels: a tensor, an array or a list of numbers.

    Raises:
        UserError: for anything else, or a data set, which gives labels itself.
    """
    return _stacked(images), _numbers(labels)


def _stacked(images: Any) -> Tensor:
    if isinstance(images, Tensor):
        return images
    arrays = isinstance(images, list | tuple | np.ndarray) or hasattr(images, "__array__")
    if not arrays and (hasattr(images, "__iter__") or hasattr(images, "__getitem__")):
        raise UserError(
            f"images: {type(images).__name__} beside labels; give a tensor or a list of tensors; for a data set, "
            "which gives labels too, leave labels out"
        )
    try:
        if isinstance(images, list | tuple):
            return torch.stack([one if isinstance(one, Tensor) else torch.tensor(np.asarray(one)) for one in images])
        return torch.as_tensor(np.asarray(images))
    except (TypeError, ValueError, RuntimeError):
        raise UserError(
            "images: must be a tensor or an array [N, C, H, W], or a list of tensors [C, H, W] of one shape, got "
            f"{type(images).__name__}"
        ) from None


def _numbers(labels: Any) -> Tensor:
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(
            f"labels: must be integers, one per image, in the order of the model's logits; got {labels!r:.40}"
        ) from None


def _append(file: IO[bytes], images: Tensor) -> None:
    try:
        file.write(images.contiguous().view(torch.uint8).numpy().tobytes())
    except OSError as error:
        raise UserError(f"{tempfile.gettempdir()}: no room for the images ({error}); set TMPDIR") from None


def _entries(source: Iterable[Any]) -> Iterator[Any]:
    if isinstance(source, DataLoader) and isinstance(source.sampler, RandomSampler) and not source.drop_last:
        sampler = source.sampler
        if not sampler.replacement and sampler.num_samples == len(source.dataset) and source.batch_size is not None:  # type: ignore[arg-type]
            yield from DataLoader(
                source.dataset, batch_size=source.batch_size, collate_fn=source.collate_fn,
                num_workers=source.num_workers,
            )  # fmt: skip
            return
    if not hasattr(source, "__iter__") and hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        yield from (source[place] for place in range(len(cast("Any", source))))  # a map-style data set
        return
    try:
        entries = iter(source)
    except TypeError:
        raise UserError(
            f"images: {type(source).__name__} gives no labelled images; give a tensor with labels, a DataLoader, a "
            "data set or an iterable of (images, labels)"
        ) from None
    yield from entries


def _pair(entry: Any, place: int) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] on the CPU and labels [B] of one entry."""
    if isinstance(entry, Mapping):
        named = [next((key for key in keys if key in entry), None) for keys in (IMAGE_KEYS, LABEL_KEYS)]
        if None in named:
            raise UserError(
                f"entry {place} has the keys {', '.join(map(str, entry))}; images are looked for under "
                f"{', '.join(IMAGE_KEYS)}, labels under {', '.join(LABEL_KEYS)}"
            )
        image, label = (entry[key] for key in named)
    elif isinstance(entry, tuple | list) and len(entry) >= 2:
        image, label = entry[0], entry[1]
    else:
        raise UserError(f"entry {place} is {type(entry).__name__}, not (images, labels): there are no labels")
    images = _images(image, place)
    try:
        labels = torch.as_tensor(label).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"entry {place}: labels must be integers, got {type(label).__name__} {label!r:.40}") from None
    return images, labels.reshape(-1) if labels.ndim == 0 or labels.shape[-1:] == (1,) else labels


def _images(image: Any, place: int) -> Tensor:
    if isinstance(image, Tensor):
        images = image.detach().cpu()
    else:
        pixels = np.asarray(image)
        if pixels.dtype == object or pixels.dtype.kind in "SU":
            raise UserError(f"entry {place}: its image is {type(image).__name__}, not numbers")
        if not isinstance(image, np.ndarray) and hasattr(image, "mode"):  # a PIL image
            if image.mode not in ("L", "RGB"):
                raise UserError(f"entry {place}: a PIL image of mode {image.mode}; convert it to RGB or L")
            pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        elif pixels.ndim == 3 and pixels.shape[2] in (1, 3) and pixels.shape[0] not in (1, 3):
            pixels = pixels.transpose(2, 0, 1)
        images = torch.from_numpy(np.array(pixels))
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4:
        raise UserError(f"entry {place}: images must be [C, H, W] or [B, C, H, W], got {list(images.shape)}")
    return images
