"""Data sets: a name or path to a `Split` of uint8 images, batches from it, and augmentation in batch."""

from dualhead.data.augmentations import Augmentation, augmentations
from dualhead.data.cutmix import CutMix
from dualhead.data.loader import Batch, Loader, batches
from dualhead.data.source import load_split
from dualhead.data.split import Split, hold_out

__all__ = ["Augmentation", "Batch", "CutMix", "Loader", "Split", "augmentations", "batches", "hold_out", "load_split"]
