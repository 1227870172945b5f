"""Threats: the changes that an adversary may make to an image."""

from dualhead.threats.base import Threat, Where, refuse_changed_origins, threats
from dualhead.threats.bounded import Bounded
from dualhead.threats.build import THREAT, build_threat, typical_eps
from dualhead.threats.few_pixels import FewPixels
from dualhead.threats.jpeg import JPEG_SIDE, jpeg_cosines, jpeg_steps
from dualhead.threats.lp import Norm, ThreatModel, finite, norm_named, norm_of, project_l1, steepest
from dualhead.threats.patch import Patch
from dualhead.threats.rotation import Rotation

build = build_threat
names = threats.names

__all__ = [
    "JPEG_SIDE",
    "THREAT",
    "Bounded",
    "FewPixels",
    "Norm",
    "Patch",
    "Rotation",
    "Threat",
    "ThreatModel",
    "Where",
    "build",
    "build_threat",
    "finite",
    "jpeg_cosines",
    "jpeg_steps",
    "names",
    "norm_named",
    "norm_of",
    "project_l1",
    "refuse_changed_origins",
    "steepest",
    "threats",
    "typical_eps",
]
