"""Model and data that the jobs of a comparison share, loaded once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import ConcatDataset

from ..recipe.recipe import Recipe
from ..recipe.sections import DataSection
from ..tasks import Examples, further_measure, load_task, measured_split, spread
from ..tasks.unlabelled import images_of
from ..training.runner import RecipeRunner, Remembered
from .comparison import Comparison, Job


def make_examples(recipe: Recipe, is_test: bool, folder: Path | None, room: int) -> None:
    """Make each example that is trained or tested on once: one that cannot be made is told as its task tells it.

    At most `room` bytes of a split are kept in a folder, if there is one. Of augmented copies, which take ten times as
    long as their image and as much room, nothing is made.
    """
    for split, examples in _open(recipe, is_test).items():
        images = images_of(examples)
        kept_in = folder if images is examples else None
        Remembered(images, split, room=room if kept_in else 0).make_all(kept_in)


def _open(recipe: Recipe, is_test: bool) -> dict[str, Examples]:
    """What a training is measured on, as `test`; or the splits that it needs."""
    if is_test:
        return {"test": measured_split(recipe)[1]}
    return load_task(recipe, ("train", "validation")).splits


class LoadedData:
    """Keeps the source model and the data of the last job, and the last test data, for the jobs that follow.

    Attributes:
        comparison: has the recipes.
        made: folder with the examples that were made once for all processes; None: each makes its own.
    """

    def __init__(self, comparison: Comparison, made: Path | None = None) -> None:
        self.comparison, self.made = comparison, made
        self._runner: tuple[Any, RecipeRunner] | None = None
        self._measured: dict[str, tuple[Any, ConcatDataset[Any]]] = {}

    def runner(self, job: Job) -> RecipeRunner:
        """The source model and the data of a job, ready to be trained."""
        recipe = self.comparison.recipe_of(job.source, job.seed)
        key = (recipe.model, recipe.data, job.seed if recipe.new_head else None)
        if self._runner is None or self._runner[0] != key:
            self._runner = None  # first let go of the other one
            self._runner = key, RecipeRunner(recipe, made=self.made_of(recipe))
        return self._runner[1]

    def test_examples(self, source: int, seed: int) -> ConcatDataset[Any]:
        """All examples that a training is measured on, as one."""
        return self._examples("test", self.comparison.test_recipes(source, seed))

    def test_metric(
        self, source: int, seed: int, metric: str
    ) -> tuple[Callable[[nn.Module, Examples], float], Examples]:
        """How one of the recipe's `test_metrics` is measured, and the examples for a training to be measured on."""
        recipes = self.comparison.test_recipes(source, seed)
        _, measure, _ = further_measure(recipes[0], metric)
        examples = self._examples(metric, [replace(recipe, metric=metric) for recipe in recipes])
        return measure, spread(examples, self.comparison.recipe.test_metrics[metric])

    def source_examples(self, source: int) -> ConcatDataset[Any]:
        """The test split of a source model's own data."""
        return self._examples("source", [self.comparison.source_recipe(source)])

    def name_of(self, recipe: Recipe) -> str:
        """Name of the examples of a recipe that this comparison trains or measures with."""
        known = repr([getattr(recipe, entry.name) for entry in fields(DataSection)])
        return hashlib.sha256(known.encode()).hexdigest()[:24]

    def made_of(self, recipe: Recipe) -> Path | None:
        """Folder of these examples, if they are made once for all processes."""
        return self.made and self.made / self.name_of(recipe)

    def forget(self) -> None:
        """Free model and data."""
        self._runner = None
        self._measured.clear()

    def _examples(self, kind: str, recipes: list[Recipe]) -> ConcatDataset[Any]:
        key = [(recipe.model, recipe.data) for recipe in recipes]
        if kind not in self._measured or self._measured[kind][0] != key:
            parts = [Remembered(_open(recipe, True)["test"], "test", self.made_of(recipe)) for recipe in recipes]
            self._measured[kind] = key, ConcatDataset(parts)
        return self._measured[kind][1]
