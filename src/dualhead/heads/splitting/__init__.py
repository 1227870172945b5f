"""Cutting a model at a named layer."""

from dualhead.heads.splitting.base import Features, How, Split
from dualhead.heads.splitting.cut import guard_features, split_model

__all__ = ["Features", "How", "Split", "guard_features", "split_model"]
