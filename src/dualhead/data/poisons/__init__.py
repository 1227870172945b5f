"""Poisons, one a file: changes of the training images or their labels, for studies of what training makes of them."""

from dualhead.data.poisons.base import REMOVED, Poison, Poisoned, poisons, triggered
from dualhead.data.poisons.search import Craft, Found, Projected, Search, Surrogate, Workbench
from dualhead.data.poisons.searched import Searched

__all__ = [
    "REMOVED",
    "Craft",
    "Found",
    "Poison",
    "Poisoned",
    "Projected",
    "Search",
    "Searched",
    "Surrogate",
    "Workbench",
    "poisons",
    "triggered",
]
