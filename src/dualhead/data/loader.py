"""Batches from images that lie on the device as uint8, or on disk; order and augmentation are functions of the seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee

import torch
from torch import Tensor

from dualhead.components.fields import at_least
from dualhead.data.augmentations.base import Augmentation
from dualhead.data.cutmix import CutMix
from dualhead.data.split import Split
from dualhead.data.stored import in_turn
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.system.processes import ALONE, Group


@dataclass(frozen=True, eq=False)
class Batch:
    """Images as a model takes them.

    Args:
        index: position of each image in its split, int64 [B].
        x: images, float32 [B, C, H, W] in [0, 1].
        y: labels, int64 [B], or shares of the classes, float32 [B, K].
        total: images of the batch that this one is a process's share of; None: it is the whole.
    """

    index: Tensor
    x: Tensor
    y: Tensor
    total: int | None = None

    def __len__(self) -> int:
        return len(self.y)


def _as_float(images: Tensor) -> Tensor:
    return images.to(torch.float32).div_(255.0)


class Loader:
    """Batches for training.

    The order of an epoch depends on seed and epoch alone, the augmentation of a sample on seed, epoch and its position
    in the split. So a run that goes on at any step, or on another number of processes, sees the same global batches.

    What remains of an epoch after the last full batch is left out (batch norm does badly on tiny batches); it differs
    from epoch to epoch. A split smaller than one batch is one batch.

    With a second source, a fraction of each batch comes from it, evenly spread over the batch. An epoch keeps its
    number of steps, so it costs the same; of the split's own images it shows as many fewer, others each time.

    Images on disk are decoded ahead, each by the process whose share it is in; the batches are the same to the bit.

    Args:
        split: images and labels; moved to the device once, unless the images are on disk.
        batch_size: images in a global batch, over all processes.
        seed: names order and augmentation.
        augment: applied in turn.
        cutmix: applied after them; labels are then shares.
        extra: the second source, of the same classes and shape.
        fraction: fraction of each batch that comes from it, in [0, 1).
        balanced: show each class of the split equally often in an epoch, to within one image. An epoch has as many
            images as before: those of rare classes come several times, of frequent ones a part, another one each time.
        device: where batches are made.
        group: the processes that share each batch, this one among them; shares differ by one image at most.

    Raises:
        UserError: if the batch size is impossible.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int,
        augment: Sequence[Augmentation] = (),
        cutmix: CutMix | None = None,
        extra: Split | None = None,
        fraction: float = 0.0,
        balanced: bool = False,
        device: torch.device | str,
        group: Group = ALONE,
    ) -> None:
        at_least(1, "batch_size", batch_size)
        self.global_batch = min(batch_size, len(split))
        if self.global_batch < group.world:
            small = f" (the split has {len(split)} images)" if self.global_batch < batch_size else ""
            raise UserError(
                f"batch_size: a batch of {self.global_batch}{small} is less than an image for each of {group.world} "
                "processes; use a larger one, or fewer processes"
            )
        self._own = len(split)
        sources = [split] if extra is None else [split, extra]
        self._device = torch.device(device)
        self._sources = [source.images for source in sources]
        held = [source.images for source in sources if isinstance(source.images, Tensor)]
        self._images = torch.cat([images.to(device) for images in held]) if len(held) == len(sources) else None
        home = torch.device("cpu") if self._images is None else self._device  # where it is decided what comes next
        self._labels = torch.cat([source.labels.to(home) for source in sources])
        self._seed, self._augment, self._cutmix, self._balanced = seed, tuple(augment), cutmix, balanced
        self._classes = len(split.class_names)
        slots = torch.arange(self.global_batch + 1, dtype=torch.float64, device=home)
        slots = (slots * (0.0 if extra is None else fraction)).floor()
        self._own_slots, self._extra_slots = ((slots.diff() == part).nonzero()[:, 0] for part in (0, 1))
        self._share = group.share_of(self.global_batch)

    def __len__(self) -> int:
        """Return the number of steps an epoch."""
        return self._own // self.global_batch

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Return this process's batches of an epoch, from a step on.

        Args:
            epoch: which, from 0.
            first_step: steps left out, in [0, len(self)]; the rest is as if they had been taken.
        """
        if not 0 <= first_step <= len(self):
            raise ValueError(f"first_step must lie in [0, {len(self)}], got {first_step}")
        return self._batches(epoch, first_step)

    def order(self, epoch: int) -> Tensor:
        """Return the positions in the split of an epoch's images, in their order; the same on every device.

        Returns:
            A permutation, int64 [N]; if the loader is balanced, N positions, each class equally often.
        """
        shuffled = self._permutation("order", epoch)
        if not self._balanced:
            return shuffled
        labels = self._labels[: self._own][shuffled]
        members = [shuffled[labels == label] for label in torch.unique(labels)]
        first = epoch % len(members)  # whose turn it is to be shown once more, where N is no multiple of the classes
        slots = torch.arange(self._own, device=labels.device)
        turn, nth = (slots + first) % len(members), slots // len(members)
        drawn = torch.empty_like(shuffled)
        for number, own in enumerate(members):
            drawn[turn == number] = own[nth[turn == number] % len(own)]
        return drawn[self._permutation("balanced order", epoch)]

    def _permutation(self, purpose: str, epoch: int) -> Tensor:
        positions = torch.arange(self._own, device=self._labels.device)
        return Streams.of(self._seed, positions).fork(purpose, epoch).bits(1)[:, 0].argsort(stable=True)

    def _global_batches(self, epoch: int, first_step: int) -> Iterator[Tensor]:
        """Return positions int64 [global batch] of each step, those of the second source after those of the split."""
        own, count = self.order(epoch), len(self._own_slots)
        extra = torch.arange(self._own, len(self._labels), device=self._labels.device)
        extra = extra[Streams.of(self._seed, extra).fork("extra", epoch).bits(1)[:, 0].argsort(stable=True)]
        for step in range(first_step, len(self)):
            index = own.new_empty(self.global_batch)
            index[self._own_slots] = own[step * count : (step + 1) * count]
            if len(self._extra_slots):
                drawn = torch.arange(len(self._extra_slots), device=index.device) + step * len(self._extra_slots)
                index[self._extra_slots] = extra[drawn % len(extra)]
            yield index

    def _augmented(self, images: Tensor, index: Tensor, epoch: int) -> Tensor:
        streams = Streams.of(self._seed, index).fork("augment", epoch)
        for number, augmentation in enumerate(self._augment):
            before, images = images, augmentation(images, streams.fork(number))
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[:2] != before.shape[:2]:
                wanted, got = [*before.shape[:2], "H", "W"], f"{images.dtype} {list(images.shape)}"
                raise UserError(f"augment: {augmentation.registered_name} must return uint8 images {wanted}; got {got}")
        return images

    def _pixels(self, steps: Iterable[Tensor]) -> Iterator[Tensor]:
        """Return the images at the positions of each step, on the device."""
        if self._images is not None:
            yield from (self._images[positions] for positions in steps)
            return
        steps, start, read = list(steps), 0, []
        for images in self._sources:
            inside = [(start <= positions) & (positions < start + len(images)) for positions in steps]
            pieces = [positions[its] - start for positions, its in zip(steps, inside, strict=True)]
            read.append(zip(inside, in_turn(images, pieces, self._device), strict=True))
            start += len(images)
        for step in zip(*read, strict=True):
            whole = step[0][1].new_empty(len(step[0][0]), *step[0][1].shape[1:])
            for its, images in step:
                whole[its.to(self._device)] = images
            yield whole

    def _partners(self, index: Tensor, epoch: int) -> Tensor:
        """Return positions of the images that CutMix mixes in."""
        if self._cutmix is None:
            return index[:0]
        return self._cutmix.partners(Streams.of(self._seed, index).fork("cutmix", epoch), len(self._labels))

    def _batches(self, epoch: int, first_step: int) -> Iterator[Batch]:
        shares = (whole[self._share] for whole in self._global_batches(epoch, first_step))
        ours, needed = tee(torch.cat((index, self._partners(index, epoch))) for index in shares)
        count = self._share.stop - self._share.start
        for positions, pixels in zip(ours, self._pixels(needed), strict=True):
            labels = self._labels[positions].to(self._device)
            index, partners = positions.to(self._device).tensor_split([count])
            images = self._augmented(pixels[:count], index, epoch)
            if self._cutmix is None:
                yield Batch(index, _as_float(images), labels, self.global_batch)
                continue
            streams = Streams.of(self._seed, index).fork("cutmix", epoch)
            others = self._augmented(pixels[count:], partners, epoch)
            images, shared = self._cutmix(images, others, labels[:count], labels[count:], streams, self._classes)
            yield Batch(index, _as_float(images), shared, self.global_batch)


def batches(split: Split, batch_size: int, device: torch.device | str, share: slice = slice(None)) -> Iterator[Batch]:
    """Return all images of a split in order, without augmentation; the last batch may be smaller.

    Args:
        split: images and labels.
        batch_size: images in a batch, at least 1.
        device: where batches are put.
        share: only these images, a range without a step.
    """
    at_least(1, "batch_size", batch_size)
    first, end, _ = share.indices(len(split))
    pieces = [torch.arange(start, min(start + batch_size, end)) for start in range(first, end, batch_size)]
    for index, images in zip(pieces, in_turn(split.images, pieces, device), strict=True):
        yield Batch(index.to(device), _as_float(images), split.labels[index].to(device))
