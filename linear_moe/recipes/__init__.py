"""Recipes: models that people train, each a list of settings in examples/recipes."""

from linear_moe.recipes.recipe import FOLDER, Recipe, names, read

__all__ = ["FOLDER", "Recipe", "names", "read"]
