"""Adversarial training in stages."""

from dualhead.training.checkpoint import CheckpointStore, Position, Saved
from dualhead.training.fit import Selection, check_choosable
from dualhead.training.interpolation import interpolate
from dualhead.training.layer_decay import layer_scales
from dualhead.training.loop import StageFiles, StageRun
from dualhead.training.metrics import MetricsLog, read_metrics, summary_writer
from dualhead.training.parts import trained_output
from dualhead.training.passes import Passes
from dualhead.training.profiler import StepProfiler
from dualhead.training.progress import Silent, TrainingProgress
from dualhead.training.single_step import SingleStepWatch
from dualhead.training.stage import RESET, Stage
from dualhead.training.validation import Validator

__all__ = [
    "RESET",
    "CheckpointStore",
    "MetricsLog",
    "Passes",
    "Position",
    "Saved",
    "Selection",
    "Silent",
    "SingleStepWatch",
    "Stage",
    "StageFiles",
    "StageRun",
    "StepProfiler",
    "TrainingProgress",
    "Validator",
    "check_choosable",
    "interpolate",
    "layer_scales",
    "read_metrics",
    "summary_writer",
    "trained_output",
]
