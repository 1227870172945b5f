"""Adversarial training in stages."""

from dualhead.training.checkpoint import Position, Saved, load_position, save_position
from dualhead.training.loop import StageFiles, StageRun, Validator
from dualhead.training.metrics import MetricsLog, read_metrics
from dualhead.training.program import Program, trained_output
from dualhead.training.progress import Silent, TrainingProgress
from dualhead.training.stage import Stage

__all__ = [
    "MetricsLog",
    "Position",
    "Program",
    "Saved",
    "Silent",
    "Stage",
    "StageFiles",
    "StageRun",
    "TrainingProgress",
    "Validator",
    "load_position",
    "read_metrics",
    "save_position",
    "trained_output",
]
