"""Evaluation: which samples survive which attacks, measured so that it can be believed."""

from dualhead.evaluation.corruptions import asks_for_corruptions
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
from dualhead.evaluation.given import read_all
from dualhead.evaluation.harness import evaluate
from dualhead.evaluation.model import outputs_of, read_logits
from dualhead.evaluation.once import attack
from dualhead.evaluation.paired import compare
from dualhead.evaluation.poisoned import (
    TRIGGERED,
    TriggeredImages,
    answers,
    confused,
    learnt_by_heart,
    measure_triggered,
    successes,
)
from dualhead.evaluation.progress import EvaluationProgress
from dualhead.evaluation.results import Evaluation, Verdicts, balanced
from dualhead.evaluation.routes import ESTIMATE, KINDS, RouteSetting, evaluate_routes, parse_kinds
from dualhead.evaluation.union import against_specialists
from dualhead.statistics import Paired, interval_over_samples, mcnemar, mean_std, wilson

__all__ = [
    "ESTIMATE",
    "KINDS",
    "TRIGGERED",
    "Counterfactual",
    "Evaluation",
    "EvaluationProgress",
    "Finding",
    "Gallery",
    "Paired",
    "RouteSetting",
    "TriggeredImages",
    "Verdicts",
    "against_specialists",
    "answers",
    "asks_for_corruptions",
    "attack",
    "auroc",
    "balanced",
    "calibration_error",
    "check_duplicates",
    "compare",
    "confused",
    "counterfactual",
    "energy",
    "evaluate",
    "evaluate_routes",
    "frechet_distance",
    "interval_over_samples",
    "learnt_by_heart",
    "make_gallery",
    "mcnemar",
    "mean_std",
    "measure_triggered",
    "nearest_distance",
    "noise_seeds",
    "ood_score",
    "outputs_of",
    "parse_kinds",
    "precision_recall",
    "read_all",
    "read_logits",
    "sample",
    "successes",
    "wilson",
]
