"""Augmentations: uint8 images in batch to uint8 images, drawn per sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from dualhead.components.registry import Registry
from dualhead.noise import Streams


class Augmentation(ABC):
    """A random change of a training image that keeps its label.

    The result for a sample depends on the sample and its stream alone, not on the batch around it. Subclasses are
    frozen dataclasses registered in `augmentations`.
    """

    registered_name: ClassVar[str]

    @abstractmethod
    def __call__(self, images: Tensor, streams: Streams) -> Tensor:
        """Augmented images.

        Args:
            images: uint8 [B, C, H, W], not changed.
            streams: randomness of these samples, on the images' device.

        Returns:
            uint8 [B, C, H, W], of the same shape, unless the augmentation has a size of its own.
        """


augmentations: Registry[Augmentation] = Registry("augmentation", "dualhead.data.augmentations", Augmentation)
