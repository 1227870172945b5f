"""Poisons, one a file: changes of the training images or their labels, for studies of what training makes of them."""

from dualhead.data.poisons.base import Craft, Poison, Poisoned, Search, Surrogate, poisons, triggered

__all__ = ["Craft", "Poison", "Poisoned", "Search", "Surrogate", "poisons", "triggered"]
