"""One part of a data set: uint8 images in memory or on disk, labels, class names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dualhead.data.stored import Images, StoredImages, middle
from dualhead.errors import UserError
from dualhead.noise import Streams

_log = logging.getLogger(__name__)

HELD_OUT: Final = "hold_out"
"""The purpose under which validation images are drawn."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images with labels.

    Args:
        images: uint8 [N, C, H, W], 0 to 255: a tensor, or images on disk that are decoded when they are indexed.
        labels: int64 [N], each in [0, number of classes).
        class_names: one name per class, in the order of the labels; at least two.
        skipped: why images of the source are left out that cannot be read, one line for each.

    Raises:
        UserError: if shape, type or a label is impossible, or there is no image.
    """

    images: Images
    labels: Tensor
    class_names: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        images, labels = self.images, self.labels
        if isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.dim() != 4):
            raise UserError(f"images must be uint8 [N, C, H, W], got {_described(images)}")
        if labels.dtype != torch.int64 or labels.dim() != 1:
            raise UserError(f"labels must be int64 [N], got {_described(labels)}")
        if len(images) != len(labels):
            raise UserError(f"there must be one label per image, got {len(images)} images and {len(labels)} labels")
        if 0 in images.shape:
            raise UserError(f"there must be at least one image, got shape {list(images.shape)}")
        if self.num_classes < 2:
            raise UserError(f"a classifier needs at least 2 classes, got {self.num_classes}")
        wrong = ((labels < 0) | (labels >= self.num_classes)).nonzero()[:, 0]
        if len(wrong):
            index = int(wrong[0])
            allowed = f"must lie in 0..{self.num_classes - 1}, as there are {self.num_classes} classes"
            raise UserError(f"label {int(labels[index])} of image {index} {allowed}")

    def numbered(self, places: Sequence[int], class_names: Sequence[str]) -> Split:
        """The same images among the classes of somebody who knows as many or more.

        Args:
            places: for each class of this split its position in `class_names`.
            class_names: of the other.
        """
        labels = torch.tensor(places)[self.labels.cpu()].to(self.labels.device)
        return replace(self, labels=labels, class_names=tuple(class_names))

    def warn_if_sorted(self, count: int, option: str) -> None:
        """A word where the first so many images leave out classes, as in a set that is sorted by class.

        Args:
            count: how many are used.
            option: what said so.
        """
        shown, present = (int(part.bincount().count_nonzero()) for part in (self.labels[:count], self.labels))
        if count < len(self) and shown < present and count >= 3 * present:  # of so many, chance would leave out few
            _log.warning(
                "%s: the first %d test images show %d of the %d classes that all of them show, as in a set that is "
                "sorted by class; what is measured is of those classes alone", option, count, shown, present,
            )  # fmt: skip

    @classmethod
    def from_arrays(
        cls, images: ArrayLike | Tensor, labels: ArrayLike | Tensor, class_names: Sequence[str] | None = None
    ) -> Split:
        """A split from numpy arrays, tensors, or what `numpy.asarray` takes.

        Args:
            images: uint8, 0 to 255. Three dimensions are [N, H, W], grey. Four are [N, H, W, C] or [N, C, H, W],
                whichever has 1 or 3 (the channels) in its place; it is an error if both have, or neither.
                `Split(...)` itself takes any number of channels.
            labels: integers [N].
            class_names: names in the order of the labels; None for the numbers "0" to the largest label.

        Raises:
            UserError: if the arrays are not of that form; float images are refused, not scaled.
        """
        pixels, numbers = _as_numpy(images), _as_numpy(labels)
        if pixels.dtype != np.uint8:
            hint = "; if they lie in [0, 1], pass (images * 255).round() as uint8" if pixels.dtype.kind == "f" else ""
            raise UserError(f"images must be uint8 from 0 to 255, got {pixels.dtype}{hint}")
        if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
            raise UserError(f"labels must be integers [N], got {numbers.dtype} {list(numbers.shape)}")
        if class_names is None:
            class_names = [str(label) for label in range(int(numbers.max(initial=-1)) + 1)]
        stacked = torch.from_numpy(np.array(_channels_first(pixels), order="C"))
        return cls(stacked, torch.from_numpy(numbers.astype(np.int64)), tuple(class_names))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes, whether or not each has an image here."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def is_stored(self) -> bool:
        """Whether the images are on disk."""
        return isinstance(self.images, StoredImages)

    def take(self, indices: Tensor | Sequence[int]) -> Split:
        """The images at the given positions, in that order; those on disk stay there."""
        chosen = torch.as_tensor(indices, dtype=torch.int64, device=self.labels.device)
        images = self.images.select(chosen) if isinstance(self.images, StoredImages) else self.images[chosen]
        return replace(self, images=images, labels=self.labels[chosen])

    def show_middle(self, height: int, width: int) -> Split:
        """The middle of each image, of that height and width; all of it where it is no larger."""
        if self.image_shape[1:] == (height, width):
            return self
        if isinstance(self.images, StoredImages):
            return replace(self, images=self.images.show_middle(height, width))
        return replace(self, images=middle(self.images[:], height, width))

    def count(self, limit: int | None) -> int:
        """Return the number of images, of which there may be a limit; None: none."""
        return min(limit or len(self), len(self))

    def first(self, n: int) -> Split:
        """The first n images, or all if there are fewer.

        Raises:
            UserError: if n is less than 1.
        """
        if n < 1:
            raise UserError(f"the number of images must be at least 1, got {n}")
        return self.take(range(min(n, len(self))))

    def spread(self, n: int) -> Split:
        """So many of the images, evenly spread over all of them, or all if there are fewer.

        A sample that stands for all also where they are in the order of their classes.
        """
        count = min(n, len(self))
        return self.take(torch.arange(count) * len(self) // max(count, 1))


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _as_numpy(array: ArrayLike | Tensor) -> NDArray[Any]:
    return np.asarray(array.detach().cpu().numpy() if isinstance(array, Tensor) else array)


def _channels_first(pixels: NDArray[Any]) -> NDArray[Any]:
    """[N, C, H, W] from the forms that `Split.from_arrays` takes."""
    if pixels.ndim == 3:
        return pixels[:, None]
    if pixels.ndim != 4:
        raise UserError(f"images must be [N, H, W], [N, H, W, C] or [N, C, H, W], got shape {list(pixels.shape)}")
    first, last = pixels.shape[1] in (1, 3), pixels.shape[3] in (1, 3)
    if first == last:
        fault = "either axis could be" if first else "neither axis can be"
        detail = f"{fault} the 1 or 3 channels; use Split(images, labels, class_names) with uint8 [N, C, H, W]"
        raise UserError(f"images of shape {list(pixels.shape)}: {detail}")
    return pixels if first else pixels.transpose(0, 3, 1, 2)


def hold_out(split: Split, amount: float, seed: int) -> tuple[Split, Split]:
    """Part a split in two, with the classes in proportion in both.

    Every class that has images gets at least one on either side; what remains of `amount` is shared out in proportion
    (largest remainders). Which images are held out depends on the seed and their positions alone.

    Args:
        split: what is parted.
        amount: how much is held out: a fraction in (0, 1) if a float, a number of images if an int.
        seed: names the choice.

    Returns:
        Training and validation part: disjoint, together all images, each in the order of `split`.

    Raises:
        UserError: if that is impossible.
    """
    chosen = held_rows(split.labels.cpu(), split.class_names, amount, seed, HELD_OUT)
    return split.take((~chosen).nonzero()[:, 0]), split.take(chosen.nonzero()[:, 0])


def held_rows(labels: Tensor, class_names: Sequence[str], amount: float, seed: int, purpose: str) -> Tensor:
    """Choose the images that are held out of a set, as `hold_out` does.

    Args:
        labels: of the set, int64 [N].
        class_names: of the classes.
        amount: how much is held out.
        seed: names the choice, together with the purpose.
        purpose: what they are held out for.

    Returns:
        Bool [N].

    Raises:
        UserError: if that is impossible.
    """
    counts = torch.bincount(labels, minlength=len(class_names))
    held = _share_out(counts, _number_held(amount, len(labels)), tuple(class_names))
    lot = Streams.of(seed, torch.arange(len(labels))).fork(purpose).bits(1)[:, 0]
    order = lot.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]  # by class, and by lot within a class
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    rank = torch.arange(len(labels)) - starts  # within its class
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[order] = rank < held.repeat_interleave(counts)
    return chosen


def _number_held(amount: float, total: int) -> int:
    if isinstance(amount, bool):
        raise UserError(f"the amount to hold out must be a number, got {amount}")
    if isinstance(amount, int):
        if not 0 < amount < total:
            raise UserError(f"cannot hold out {amount} of {total} images; give a number from 1 to {total - 1}")
        return amount
    if not 0.0 < amount < 1.0:
        raise UserError(f"a fraction to hold out must lie between 0 and 1, got {amount}; for a count write an integer")
    return round(amount * total)


def _share_out(counts: Tensor, number: int, names: tuple[str, ...]) -> Tensor:
    """How many images of each class are held out, int64 [classes]: from 1 to count - 1 wherever there are any."""
    present = counts > 0
    classes, total = int(present.sum()), int(counts.sum())
    lonely = (counts == 1).nonzero()[:, 0]
    if len(lonely):
        raise UserError(f"cannot hold out: class {names[int(lonely[0])]!r} has 1 image, and needs one on either side")
    if not classes <= number <= total - classes:
        fault = f"cannot hold out {number} of {total} images: that is fewer than 1 image for each of {classes} classes"
        side = "" if number < classes else " on the training side"
        raise UserError(f"{fault}{side}; hold out {classes} to {total - classes}")
    spare = torch.where(present, counts - 2, 0)
    # number - classes <= total - 2 classes = sum(spare), so no class is asked for more than it has.
    numerator = (number - classes) * spare
    denominator = max(total - 2 * classes, 1)
    held = numerator // denominator
    by_remainder = (numerator % denominator).argsort(descending=True, stable=True)
    held[by_remainder[: number - classes - int(held.sum())]] += 1
    return held + present.long()


def to_bytes(images: Tensor) -> Tensor:
    """Return the nearest bytes of images, uint8 of the same shape, where they lie.

    Args:
        images: floating, in [0, 1], beyond which they are cut off; bytes are given back as they are.
    """
    return images if images.dtype == torch.uint8 else images.mul(255.0).round().clamp(0, 255).to(torch.uint8)
