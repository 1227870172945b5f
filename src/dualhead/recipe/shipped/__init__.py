"""Recipes that ship with the package: `dualhead list recipes`."""
