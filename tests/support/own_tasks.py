"""Tasks as a user writes them, in a file of their own."""

from __future__ import annotations

from collections.abc import Sequence

from surgical_peft.experiments.recipe import Recipe
from surgical_peft.experiments.tasks import Task, info_of, text_classification
from surgical_peft.experiments.tasks.task import with_info


def plain(recipe: Recipe, splits: Sequence[str]) -> Task:
    return text_classification(recipe, splits)


@with_info(keys=["label_map"], pipeline="text-classification", tiny=info_of(text_classification).tiny)
def own(recipe: Recipe, splits: Sequence[str]) -> Task:
    return text_classification(recipe, splits)
