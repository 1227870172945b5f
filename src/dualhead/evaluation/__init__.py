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
from dualhead.evaluation.progress import EvaluationProgress
from dualhead.evaluation.results import Evaluation, Verdicts, balanced
from dualhead.evaluation.routes import ESTIMATE, KINDS, RouteSetting, evaluate_routes, parse_kinds
from dualhead.evaluation.sequence import MEASURES, Visit, describe_sequence, of_specialists, plasticity
from dualhead.evaluation.union import against_specialists, column, threat_labels
from dualhead.statistics import Paired, interval_over_samples, mcnemar, mean_std, wilson

__all__ = [
    "ESTIMATE",
    "KINDS",
    "MEASURES",
    "Counterfactual",
    "Evaluation",
    "EvaluationProgress",
    "Finding",
    "Gallery",
    "Paired",
    "RouteSetting",
    "Verdicts",
    "Visit",
    "against_specialists",
    "asks_for_corruptions",
    "attack",
    "auroc",
    "balanced",
    "calibration_error",
    "check_duplicates",
    "column",
    "compare",
    "counterfactual",
    "describe_sequence",
    "energy",
    "evaluate",
    "evaluate_routes",
    "frechet_distance",
    "interval_over_samples",
    "make_gallery",
    "mcnemar",
    "mean_std",
    "nearest_distance",
    "noise_seeds",
    "of_specialists",
    "ood_score",
    "outputs_of",
    "parse_kinds",
    "plasticity",
    "precision_recall",
    "read_all",
    "read_logits",
    "sample",
    "threat_labels",
    "wilson",
]
