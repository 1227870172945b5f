"""A run, from a recipe to trained weights, their evaluation and a report."""

from dualhead.runs.folder import (
    GALLERY,
    RunFolder,
    changes,
    data_facts,
    load_stage,
    read_digests,
    read_recipe,
    refuse_other_data,
    without_how,
)
from dualhead.runs.run import RunResult, train

__all__ = [
    "GALLERY",
    "RunFolder",
    "RunResult",
    "changes",
    "data_facts",
    "load_stage",
    "read_digests",
    "read_recipe",
    "refuse_other_data",
    "train",
    "without_how",
]
