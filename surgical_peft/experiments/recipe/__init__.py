"""Recipes: one flat YAML file that says everything about a training."""

from __future__ import annotations

from .load import load_recipe
from .recipe import Recipe

__all__ = ["Recipe", "load_recipe"]
