"""Aggregators, one a file: from the logits of all heads to the logits of the deployed classifier."""

from dualhead.heads.aggregators.base import Aggregator, Chosen, SeesFeatures, aggregators, default_aggregator

__all__ = ["Aggregator", "Chosen", "SeesFeatures", "aggregators", "default_aggregator"]
