"""Base methods, one a file: logits in, loss terms out."""

from dualhead.objectives.base import LossTerms, Objective, objectives

__all__ = ["LossTerms", "Objective", "objectives"]
