"""What an adversary may do to an image."""

from dualhead.threats.base import Threat, Where, threats
from dualhead.threats.bounded import Bounded
from dualhead.threats.build import build_threat
from dualhead.threats.lp import Norm, ThreatModel, finite, norm_of, project_l1, steepest

__all__ = [
    "Bounded",
    "Norm",
    "Threat",
    "ThreatModel",
    "Where",
    "build_threat",
    "finite",
    "norm_of",
    "project_l1",
    "steepest",
    "threats",
]
