"""Threats: the changes that an adversary may make to an image."""

from dualhead.threats.base import Threat, Where, threats
from dualhead.threats.bounded import Bounded
from dualhead.threats.build import THREAT, build_threat
from dualhead.threats.lp import Norm, ThreatModel, finite, norm_of, project_l1, steepest

build = build_threat
names = threats.names

__all__ = [
    "THREAT",
    "Bounded",
    "Norm",
    "Threat",
    "ThreatModel",
    "Where",
    "build",
    "build_threat",
    "finite",
    "names",
    "norm_of",
    "project_l1",
    "steepest",
    "threats",
]
