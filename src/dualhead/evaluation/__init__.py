"""Evaluation: which samples survive which attacks, measured so that it can be believed."""

from dualhead.evaluation.asked import Asked, located, split_names
from dualhead.evaluation.calibration import calibration_error
from dualhead.evaluation.diagnostics import Finding, check_single_steps
from dualhead.evaluation.duplicates import check_duplicates
from dualhead.evaluation.gallery import Gallery, make_gallery
from dualhead.evaluation.generation import (
    Counterfactual,
    auroc,
    counterfactual,
    energy,
    frechet_distance,
    nearest_distance,
    noise_seeds,
    ood_score,
    precision_recall,
    sample,
    sample_at,
)
from dualhead.evaluation.given import LABEL_KEYS, read_all
from dualhead.evaluation.harness import evaluate
from dualhead.evaluation.journal import finite, weights_fingerprint, write_arrays
from dualhead.evaluation.measurements import Measurement, measurements
from dualhead.evaluation.model import answers, outputs_of, read_logits
from dualhead.evaluation.once import attack
from dualhead.evaluation.ood import auroc_interval, measure_ood
from dualhead.evaluation.paired import compare, refuse_unlike, rendered_alike
from dualhead.evaluation.poisoned import (
    TRIGGERED,
    TriggeredImages,
    confused,
    finders,
    last_linear,
    learnt_by_heart,
    measure_triggered,
    successes,
)
from dualhead.evaluation.progress import EvaluationProgress
from dualhead.evaluation.quality import FILE as SAMPLES_FILE
from dualhead.evaluation.quality import (
    SCORED,
    STEPS,
    Generation,
    Judge,
    Sampling,
    Sets,
    check_compression,
    held_out_distances,
    kernel_distance,
    measure_generation,
)
from dualhead.evaluation.results import Evaluation, Verdicts, balanced
from dualhead.evaluation.routers import RouterSetting, evaluate_routers
from dualhead.evaluation.routes import ESTIMATE, KINDS, RouteSetting, evaluate_routes, parse_kinds
from dualhead.evaluation.sequence import MEASURES, Visit, describe_sequence, of_specialists, plasticity
from dualhead.evaluation.union import against_specialists, column, threat_labels
from dualhead.statistics import Paired, interval_over_samples, mcnemar, mean_std, paired_shares, wilson

__all__ = [
    "ESTIMATE",
    "KINDS",
    "LABEL_KEYS",
    "MEASURES",
    "SAMPLES_FILE",
    "SCORED",
    "STEPS",
    "TRIGGERED",
    "Asked",
    "Counterfactual",
    "Evaluation",
    "EvaluationProgress",
    "Finding",
    "Gallery",
    "Generation",
    "Judge",
    "Measurement",
    "Paired",
    "RouteSetting",
    "RouterSetting",
    "Sampling",
    "Sets",
    "TriggeredImages",
    "Verdicts",
    "Visit",
    "against_specialists",
    "answers",
    "attack",
    "auroc",
    "auroc_interval",
    "balanced",
    "calibration_error",
    "check_compression",
    "check_duplicates",
    "check_single_steps",
    "column",
    "compare",
    "confused",
    "counterfactual",
    "describe_sequence",
    "energy",
    "evaluate",
    "evaluate_routers",
    "evaluate_routes",
    "finders",
    "finite",
    "frechet_distance",
    "held_out_distances",
    "interval_over_samples",
    "kernel_distance",
    "last_linear",
    "learnt_by_heart",
    "located",
    "make_gallery",
    "mcnemar",
    "mean_std",
    "measure_generation",
    "measure_ood",
    "measure_triggered",
    "measurements",
    "nearest_distance",
    "noise_seeds",
    "of_specialists",
    "ood_score",
    "outputs_of",
    "paired_shares",
    "parse_kinds",
    "plasticity",
    "precision_recall",
    "read_all",
    "read_logits",
    "refuse_unlike",
    "rendered_alike",
    "sample",
    "sample_at",
    "split_names",
    "successes",
    "threat_labels",
    "weights_fingerprint",
    "wilson",
    "write_arrays",
]
