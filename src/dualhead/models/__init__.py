"""Backbones, one a file: each makes an ordinary classifier of images in [0, 1], which normalises them itself."""

from dualhead.models.base import Backbone, Wrapped, backbones, count_parameters, last_layer, other_types, output_of_one
from dualhead.models.factory import maker
from dualhead.models.given import address_of, at_hand, at_hand_by_name, describe_given
from dualhead.models.normalize import Normalize, channel_statistics
from dualhead.models.weights import load_state, normalisation_in, read_state, with_tied, write_state
from dualhead.system.outputs import logits_of

__all__ = [
    "Backbone",
    "Normalize",
    "Wrapped",
    "address_of",
    "at_hand",
    "at_hand_by_name",
    "backbones",
    "channel_statistics",
    "count_parameters",
    "describe_given",
    "last_layer",
    "load_state",
    "logits_of",
    "maker",
    "normalisation_in",
    "other_types",
    "output_of_one",
    "read_state",
    "with_tied",
    "write_state",
]
