"""Data sets: a name or path to a `Split` of uint8 images, batches from it, and augmentation in batch."""

from dualhead.data.augmentations import Augmentation, augmentations
from dualhead.data.cutmix import CutMix
from dualhead.data.decode import decode_single
from dualhead.data.loader import Batch, Loader, batches
from dualhead.data.source import Storage, load_split
from dualhead.data.split import Split, hold_out
from dualhead.data.stored import in_turn
from dualhead.data.streams import OpenStream, Stream, StreamImages, StreamSetting, streams

__all__ = [
    "Augmentation",
    "Batch",
    "CutMix",
    "Loader",
    "OpenStream",
    "Split",
    "Storage",
    "Stream",
    "StreamImages",
    "StreamSetting",
    "augmentations",
    "batches",
    "decode_single",
    "hold_out",
    "in_turn",
    "load_split",
    "streams",
]
