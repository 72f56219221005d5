"""Recipes: one flat YAML file that says everything about a training."""

from __future__ import annotations

from .keys import RecipeKey, recipe_keys
from .load import load_recipe, recipe_of
from .recipe import Recipe

__all__ = ["Recipe", "RecipeKey", "load_recipe", "recipe_keys", "recipe_of"]
