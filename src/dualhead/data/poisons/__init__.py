"""Poisons, one a file: changes of the training images or their labels, for studies of what training makes of them."""

from dualhead.data.poisons.base import (
    Aligning,
    Alternating,
    Craft,
    Entangling,
    Poison,
    Poisoned,
    Search,
    Seen,
    Surrogate,
    poisons,
    triggered,
)

__all__ = [
    "Aligning",
    "Alternating",
    "Craft",
    "Entangling",
    "Poison",
    "Poisoned",
    "Search",
    "Seen",
    "Surrogate",
    "poisons",
    "triggered",
]
