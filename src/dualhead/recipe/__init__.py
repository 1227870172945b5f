"""The recipe: what a run is, as data."""

from dualhead.recipe.schema import REGISTRIES, Recipe, Runtime, Statistics, parse_recipe
from dualhead.recipe.yaml import load_recipe, read_recipe_file, shipped_recipes, stages_as_named

__all__ = [
    "REGISTRIES",
    "Recipe",
    "Runtime",
    "Statistics",
    "load_recipe",
    "parse_recipe",
    "read_recipe_file",
    "shipped_recipes",
    "stages_as_named",
]
