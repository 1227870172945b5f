"""Augmentations, one a file: uint8 images in batch, on whatever device they lie."""

from dualhead.data.augmentations.base import Augmentation, augmentations

__all__ = ["Augmentation", "augmentations"]
