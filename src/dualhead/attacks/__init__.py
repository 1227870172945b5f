"""Attacks, one a file. An attack sees logits, images and labels: never a module, an optimiser or a recipe."""

from dualhead.attacks.base import (
    Attack,
    Climb,
    LogitsFn,
    LooksAhead,
    LossFn,
    Maximiser,
    Query,
    Search,
    State,
    attacks,
    maximise_within,
    predictions,
    refuse_untrainable,
    slope,
)
from dualhead.attacks.msd import SteepestOfSeveral
from dualhead.attacks.random_point import RandomPoint

build = attacks.build
names = attacks.names

__all__ = [
    "Attack",
    "Climb",
    "LogitsFn",
    "LooksAhead",
    "LossFn",
    "Maximiser",
    "Query",
    "RandomPoint",
    "Search",
    "State",
    "SteepestOfSeveral",
    "attacks",
    "build",
    "maximise_within",
    "names",
    "predictions",
    "refuse_untrainable",
    "slope",
]
