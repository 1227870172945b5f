"""A run, from a recipe to trained weights, their evaluation and a report."""

from dualhead.runs.folder import GALLERY, RunFolder, changes, load_stage, read_digests, read_recipe, without_how
from dualhead.runs.run import RunResult, train

__all__ = [
    "GALLERY",
    "RunFolder",
    "RunResult",
    "changes",
    "load_stage",
    "read_digests",
    "read_recipe",
    "train",
    "without_how",
]
