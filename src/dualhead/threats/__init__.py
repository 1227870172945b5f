"""What an adversary may do to an image."""

from dualhead.threats.lp import Norm, ThreatModel, finite

__all__ = ["Norm", "ThreatModel", "finite"]
