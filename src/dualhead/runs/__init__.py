"""A run, from a recipe to trained weights, their evaluation and a report."""

from dualhead.runs.clean import CleanModel
from dualhead.runs.entries import Entry, by_output, read_entries
from dualhead.runs.folder import (
    GALLERY,
    RunFolder,
    changes,
    data_facts,
    kept_checkpoints,
    load_stage,
    read_digests,
    read_recipe,
    refuse_other_data,
    without_how,
)
from dualhead.runs.poisoned import parted, triggered_images
from dualhead.runs.run import RunResult, train
from dualhead.runs.standings import normalised, sequences, standings
from dualhead.runs.trial import StageCost, Trial, trial

__all__ = [
    "GALLERY",
    "CleanModel",
    "Entry",
    "RunFolder",
    "RunResult",
    "StageCost",
    "Trial",
    "by_output",
    "changes",
    "data_facts",
    "kept_checkpoints",
    "load_stage",
    "normalised",
    "parted",
    "read_digests",
    "read_entries",
    "read_recipe",
    "refuse_other_data",
    "sequences",
    "standings",
    "train",
    "trial",
    "triggered_images",
    "without_how",
]
