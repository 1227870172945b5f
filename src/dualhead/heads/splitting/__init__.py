"""Cutting a model at a named layer."""

from dualhead.heads.splitting.base import Cut, Features, How
from dualhead.heads.splitting.cut import guard_features, split_model

__all__ = ["Cut", "Features", "How", "guard_features", "split_model"]
