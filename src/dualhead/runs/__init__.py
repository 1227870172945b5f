"""A run, from a recipe to trained weights, their evaluation and a report."""

from dualhead.runs.folder import GALLERY, REPORT, RunFolder, changes, load_stage, read_recipe, without_how
from dualhead.runs.run import RunResult, train

__all__ = [
    "GALLERY",
    "REPORT",
    "RunFolder",
    "RunResult",
    "changes",
    "load_stage",
    "read_recipe",
    "train",
    "without_how",
]
