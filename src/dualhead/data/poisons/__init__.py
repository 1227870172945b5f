"""Poisons, one a file: changes of the training images or their labels, for studies of what training makes of them."""

from dualhead.data.poisons.base import Poison, Poisoned, poisons, triggered

__all__ = ["Poison", "Poisoned", "poisons", "triggered"]
