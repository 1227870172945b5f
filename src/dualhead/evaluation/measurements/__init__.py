"""Evaluations that are no attacks, one a file: images as the world changes them, not as an adversary would."""

from dualhead.evaluation.measurements.base import Measurement, measurements, right_when_changed, summary

__all__ = ["Measurement", "measurements", "right_when_changed", "summary"]
