"""Data sets: a name or path to a `Split` of uint8 images, batches from it, and augmentation in batch."""

from dualhead.data.augmentations import Augmentation, augmentations
from dualhead.data.cache import folder as cache_folder
from dualhead.data.cutmix import CutMix
from dualhead.data.decode import Framing, Resample, decode_single
from dualhead.data.duplicates import Digests, digests, shared_images
from dualhead.data.given import GIVEN, GivenImages, Labelled, holding
from dualhead.data.loader import Batch, Loader, batches
from dualhead.data.names import among, are_numbers, match, one_form
from dualhead.data.poisons import (
    REMOVED,
    Craft,
    Found,
    Poison,
    Poisoned,
    Projected,
    Search,
    Searched,
    Surrogate,
    Workbench,
    poisons,
    triggered,
)
from dualhead.data.reading import Storage
from dualhead.data.source import load_split, resolve
from dualhead.data.split import HELD_OUT, Split, held_rows, hold_out, to_bytes
from dualhead.data.stored import in_turn
from dualhead.data.streams import Memory, OpenStream, Stream, StreamImages, StreamSetting, Uniform, streams

__all__ = [
    "GIVEN",
    "HELD_OUT",
    "REMOVED",
    "Augmentation",
    "Batch",
    "Craft",
    "CutMix",
    "Digests",
    "Found",
    "Framing",
    "GivenImages",
    "Labelled",
    "Loader",
    "Memory",
    "OpenStream",
    "Poison",
    "Poisoned",
    "Projected",
    "Resample",
    "Search",
    "Searched",
    "Split",
    "Storage",
    "Stream",
    "StreamImages",
    "StreamSetting",
    "Surrogate",
    "Uniform",
    "Workbench",
    "among",
    "are_numbers",
    "augmentations",
    "batches",
    "cache_folder",
    "decode_single",
    "digests",
    "held_rows",
    "hold_out",
    "holding",
    "in_turn",
    "load_split",
    "match",
    "one_form",
    "poisons",
    "resolve",
    "shared_images",
    "streams",
    "to_bytes",
    "triggered",
]
