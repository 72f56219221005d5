"""The methods of a comparison whose recipe names none: those of a common set that fit the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..recipe.recipe import Recipe
from ..training.runner import RecipeRunner
from .comparison import Comparison
from .preflight import misfits_of

DEFAULT: list[Any] = ["nothing", "full", "head", "first", "middle", "last", {"lora": {"rank": 8}}, "auto"]


def with_default_methods(recipe: Recipe) -> tuple[Recipe, dict[str, str]]:
    """The recipe with the methods of `DEFAULT` that fit its model, and why the others do not.

    Example:
        >>> recipe, left_out = with_default_methods(load_recipe("gpt2.yaml"))
        >>> left_out.keys()
        dict_keys(['head'])
    """
    asked = replace(recipe, methods=DEFAULT)
    comparison = Comparison(asked)
    job = comparison.firsts[0]
    misfits = misfits_of(comparison, job, RecipeRunner(comparison.recipe_of(job.source, job.seed)))
    kept = [entry for entry, title in zip(DEFAULT, comparison.methods, strict=True) if title not in misfits]
    return replace(asked, methods=kept), misfits
