"""What people read of a run, made from the files it left and from nothing else."""

from dualhead.report.model_card import model_card

__all__ = ["model_card"]
