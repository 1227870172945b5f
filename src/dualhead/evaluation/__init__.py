"""Evaluation: which samples survive which attacks, measured so that it can be believed."""

from dualhead.evaluation.diagnostics import Finding
from dualhead.evaluation.duplicates import check_duplicates
from dualhead.evaluation.gallery import Gallery, make_gallery
from dualhead.evaluation.generation import (
    Counterfactual,
    auroc,
    calibration_error,
    counterfactual,
    energy,
    frechet_distance,
    nearest_distance,
    noise_seeds,
    ood_score,
    precision_recall,
    sample,
)
from dualhead.evaluation.harness import evaluate
from dualhead.evaluation.paired import compare
from dualhead.evaluation.progress import EvaluationProgress
from dualhead.evaluation.results import Evaluation, Verdicts
from dualhead.statistics import Paired, interval_over_samples, mcnemar, mean_std, wilson

__all__ = [
    "Counterfactual",
    "Evaluation",
    "EvaluationProgress",
    "Finding",
    "Gallery",
    "Paired",
    "Verdicts",
    "auroc",
    "calibration_error",
    "check_duplicates",
    "compare",
    "counterfactual",
    "energy",
    "evaluate",
    "frechet_distance",
    "interval_over_samples",
    "make_gallery",
    "mcnemar",
    "mean_std",
    "nearest_distance",
    "noise_seeds",
    "ood_score",
    "precision_recall",
    "sample",
    "wilson",
]
