"""The recipe: what a run is, as data."""

from dualhead.recipe.schema import REGISTRIES, Data, Recipe, Runtime, Statistics, parse_recipe
from dualhead.recipe.yaml import (
    Override,
    Overrides,
    load_recipe,
    override,
    parse_overrides,
    parse_yaml,
    read_recipe_file,
    recipe_content,
    shipped_recipes,
    stages_as_named,
)

__all__ = [
    "REGISTRIES",
    "Data",
    "Override",
    "Overrides",
    "Recipe",
    "Runtime",
    "Statistics",
    "load_recipe",
    "override",
    "parse_overrides",
    "parse_recipe",
    "parse_yaml",
    "read_recipe_file",
    "recipe_content",
    "shipped_recipes",
    "stages_as_named",
]
