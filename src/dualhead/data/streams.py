"""Further streams of the data: images beside a step's batch, from another source or augmentation, or of noise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final, Literal

import torch
from torch import Tensor

from dualhead.components.fields import at_least
from dualhead.components.registry import Registry
from dualhead.components.sections import component
from dualhead.data.augmentations.base import Augmentation, augmentations
from dualhead.data.loader import Batch, Loader
from dualhead.data.split import Split
from dualhead.errors import UserError
from dualhead.noise import Streams
from dualhead.system.processes import ALONE, Group

MOST_VALUES: Final = 12_288
"""Most values of an image whose covariance is fitted: those of 64x64 pixels in colour."""


@dataclass(frozen=True)
class StreamImages:
    """Images of a stream in one step, as many as this process's share of the batch.

    Args:
        x: images, float32 [B, C, H, W] in [0, 1].
        y: labels, int64 [B]; None where there are none.
    """

    x: Tensor
    y: Tensor | None = None


@dataclass(frozen=True)
class StreamSetting:
    """Settings with which a stream is opened.

    Args:
        training: the training images of the run.
        steps: of the run's loader in an epoch.
        batch_size: images in a global batch.
        seed: names order, augmentation and noise.
        device: where images are made.
        group: the processes that share each batch.
        load: reads the images of another source by its name, as `data.source` is read.
        size: height and width that the model takes, where images may be larger, for augmentations to cut from; None:
            those of the images.
        augment: what the stage's own images go through, for streams that belong to them.
    """

    training: Split
    steps: int
    batch_size: int
    seed: int
    device: torch.device
    group: Group = ALONE
    load: Callable[[str], Split] | None = None
    size: tuple[int, int] | None = None
    augment: tuple[Augmentation, ...] = ()

    def as_seen(self, split: Split) -> Split:
        """Return images as the model sees them without augmentation: the middle of those that are larger."""
        return split if self.size is None else split.show_middle(*self.size)


class Stream(ABC):
    """Images beside the batch of each step: as many, as a function of seed, epoch, step and slot.

    So a run that goes on at any step, or on another number of processes, sees the same ones. Subclasses are frozen
    dataclasses registered in `streams`.
    """

    registered_name: ClassVar[str]

    @property
    def named_source(self) -> str | None:
        """The source that is read beside the run's own; None if there is none."""
        return None

    @abstractmethod
    def open(self, setting: StreamSetting) -> OpenStream:
        """Prepare the images.

        Raises:
            UserError: for images that do not fit the run's.
        """


class OpenStream(ABC):
    """A stream that is ready."""

    @abstractmethod
    def epoch(self, epoch: int, first_step: int) -> Iterator[Callable[[Batch], StreamImages]]:
        """Yield for each step of an epoch, from `first_step` on, what gives the images beside that step's batch."""


streams: Registry[Stream] = Registry("stream", "dualhead.data.streams", Stream)


@streams.register("images")
@dataclass(frozen=True)
class Images(Stream):
    """Images in an order of their own.

    Args:
        source: where they come from, as in `data.source`; None for the run's training images.
        augment: applied in turn.
    """

    source: str | None = None
    augment: tuple[Annotated[Augmentation, *component(augmentations)], ...] = ()

    @property
    def named_source(self) -> str | None:
        """The source that is named."""
        return self.source

    def open(self, setting: StreamSetting) -> OpenStream:
        """See `Stream.open`."""
        split = setting.training
        if self.source is not None:
            assert setting.load is not None, "whoever opens a stream of another source must say how it is read"
            split = setting.load(self.source)
            if split.image_shape != setting.training.image_shape:
                raise UserError(
                    f"stream {self.source}: its images are {_told(split)}, the training images "
                    f"{_told(setting.training)}; both must agree"
                )
        if len(split) < setting.batch_size:
            raise UserError(
                f"stream {self.source or 'of the training images'}: has {len(split)} images, less than a batch of "
                f"{setting.batch_size}"
            )
        loader = Loader(
            split if self.augment else setting.as_seen(split), setting.batch_size, seed=setting.seed,
            augment=self.augment, device=setting.device, group=setting.group,
        )  # fmt: skip
        return _OpenImages(loader, setting.steps)


def _told(split: Split) -> str:
    return "x".join(map(str, split.image_shape))


class _OpenImages(OpenStream):
    def __init__(self, loader: Loader, steps: int) -> None:
        self._loader, self._steps = loader, steps

    def epoch(self, epoch: int, first_step: int) -> Iterator[Callable[[Batch], StreamImages]]:
        done, step = divmod(epoch * self._steps + first_step, len(self._loader))
        while True:
            for batch in self._loader.epoch(done, step):
                yield lambda _, found=StreamImages(batch.x, batch.y): found  # type: ignore[misc]
            done, step = done + 1, 0


@streams.register("memory")
@dataclass(frozen=True)
class Memory(Stream):
    """A few of the training images, the same ones throughout, in an order of their own: an episodic memory.

    Classes are in it as evenly as they can be. What is kept is augmented anew each time, as the stage's own images are.

    Args:
        images: how many, at least 1.
        seed: of the choice.
    """

    images: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, "images", self.images)

    def chosen(self, labels: Tensor) -> Tensor:
        """Return positions of the images that are kept, int64 [at most `images`], from all labels int64 [N]."""
        drawn = Streams.of(self.seed, torch.arange(len(labels))).fork("memory").uniform(1)[:, 0]
        order = drawn.argsort(stable=True)
        labels = labels.cpu()[order]
        turn = torch.empty_like(order)  # which one of its class an image is
        for label in torch.unique(labels):
            members = (labels == label).nonzero()[:, 0]
            turn[members] = torch.arange(len(members))
        return order[turn.argsort(stable=True)[: self.images]].sort().values

    def open(self, setting: StreamSetting) -> OpenStream:
        """See `Stream.open`; of fewer images than a batch has, some come twice in it."""
        chosen = self.chosen(setting.training.labels)
        times = -(-setting.batch_size // len(chosen))
        kept = setting.training.take(chosen.repeat(times))
        loader = Loader(
            kept if setting.augment else setting.as_seen(kept), setting.batch_size, seed=setting.seed,
            augment=setting.augment, device=setting.device, group=setting.group,
        )  # fmt: skip
        return _OpenImages(loader, setting.steps)


class _OpenNoise(OpenStream):
    """Noise that belongs to the samples of the batch beside it."""

    def __init__(self, seed: int, draw: Callable[[Streams, Sequence[int]], Tensor]) -> None:
        self._seed, self._draw = seed, draw

    def epoch(self, epoch: int, first_step: int) -> Iterator[Callable[[Batch], StreamImages]]:
        del first_step  # a sample comes once in an epoch

        def images(batch: Batch) -> StreamImages:
            return StreamImages(self._draw(Streams.of(self._seed, batch.index).fork(epoch), batch.x.shape[1:]))

        while True:
            yield images


@streams.register("uniform")
@dataclass(frozen=True)
class Uniform(Stream):
    """Pixels drawn uniformly from [0, 1]."""

    def open(self, setting: StreamSetting) -> OpenStream:
        """See `Stream.open`."""
        return _OpenNoise(setting.seed, lambda noise, shape: noise.uniform(*shape))


@streams.register("gaussian")
@dataclass(frozen=True)
class Gaussian(Stream):
    """Pixels drawn from a normal distribution that is fitted to the training images.

    They are clipped to [0, 1]. Where there are many training images, 4,096 are fitted, spread over all of them.

    Args:
        covariance: `channel`, each channel's mean and deviation, so that pixels are independent; or `full`, mean and
            covariance of all values of an image, so that seeds are as smooth as images (Santurkar et al. 2019, arXiv
            1906.09453, without the classes). The latter takes a matrix of d x d numbers for images of d values, at most
            12,288 of them.
    """

    covariance: Literal["channel", "full"] = "channel"

    def open(self, setting: StreamSetting) -> OpenStream:
        """See `Stream.open`."""
        some = setting.training.spread(4096)
        if self.covariance == "full":
            return _OpenNoise(
                setting.seed, _correlated(torch.as_tensor(setting.as_seen(some).images[:]), setting.device)
            )
        pixels = torch.as_tensor(some.images[:])
        values = pixels.to(torch.float64).div(255.0).transpose(0, 1).flatten(1)
        mean, deviation = (v.float().to(setting.device)[:, None, None] for v in (values.mean(1), values.std(1)))
        return _OpenNoise(setting.seed, lambda noise, shape: (mean + deviation * noise.normal(*shape)).clamp_(0.0, 1.0))


def _correlated(pixels: Tensor, device: torch.device) -> Callable[[Streams, Sequence[int]], Tensor]:
    """Draw images with mean and covariance of the given ones, uint8 [N, C, H, W]."""
    values = pixels.to(torch.float64).div(255.0).flatten(1)
    if values.shape[1] > MOST_VALUES:
        raise UserError(
            f"stream gaussian: a full covariance of images of {values.shape[1]:,} values takes too much memory; use "
            "covariance=channel"
        )
    spread, axes = torch.linalg.eigh(values.T.cov())
    root = (axes * spread.clamp_min(0.0).sqrt() @ axes.T).float().to(device)
    mean = values.mean(0).float().to(device)

    def draw(noise: Streams, shape: Sequence[int]) -> Tensor:
        z = noise.normal(math.prod(shape))
        # A sum of products row by row: that of a matrix product would be rounded otherwise for other numbers of rows.
        rows = [root @ row for row in z]
        return (mean + torch.stack(rows)).clamp_(0.0, 1.0).reshape(-1, *shape)

    return draw
