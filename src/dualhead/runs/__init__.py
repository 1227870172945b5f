"""A run, from a recipe to trained weights, their evaluation and a report."""

from dualhead.runs.folder import changes, read_digests, read_recipe, without_how
from dualhead.runs.run import BASE, GALLERY, REPORT, RunResult, load_stage, train

__all__ = [
    "BASE",
    "GALLERY",
    "REPORT",
    "RunResult",
    "changes",
    "load_stage",
    "read_digests",
    "read_recipe",
    "train",
    "without_how",
]
