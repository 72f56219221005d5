"""Tasks: a recipe's model, data and metric; one function each, in a file of its own.

The interface of a task, ours or the user's own, is in `tasks.task`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from ...errors import SurgicalError
from ..recipe.code import check_code, resolve_key
from ..recipe.recipe import Recipe
from .causal_lm import causal_lm
from .image_classification import image_classification
from .seq2seq import seq2seq
from .summary import DataSummary
from .task import SPLITS as SPLITS
from .task import Examples as Examples
from .task import Task as Task
from .task import check_keys
from .task import info_of as info_of
from .text_classification import text_classification
from .token_classification import token_classification

__all__ = ["causal_lm", "image_classification", "seq2seq", "text_classification", "token_classification"]


def load_task(recipe: Recipe, splits: Sequence[str] = SPLITS) -> Task:
    """The task of a recipe.

    Args:
        recipe: says which task, model and data.
        splits: which splits to load; the others are not opened.

    Raises:
        SurgicalError: unknown task, or one that gives no `Task`; code of the recipe that may not run; model or data
            that cannot be found or do not fit the task.

    Example:
        >>> load_task(recipe, ("train", "validation")).splits.keys()
        dict_keys(['train', 'validation'])
    """
    task = task_of(recipe)
    check_code(recipe, "metric")
    info = info_of(task)
    if info.keys is not None:
        check_keys(recipe, info.keys)
    loaded = task(recipe, tuple(splits))
    if not isinstance(loaded, Task):
        raise SurgicalError(
            f"task: {recipe.task!r} gives a {type(loaded).__name__}, not a Task: it has to return one."
        )
    sizes = ", ".join(f"{len(examples):,} {split}" for split, examples in loaded.splits.items())
    return replace(loaded, summary=DataSummary((f"examples: {sizes or 'none'}",)) + loaded.summary)


def measured_split(recipe: Recipe) -> tuple[str, Examples]:
    """The split that results are told on, with its name: `test` or, where the data have none, `validation`.

    Raises:
        SurgicalError: as `load_task`.
    """
    for split in ("test", "validation"):
        if split in (splits := load_task(recipe, (split,)).splits):
            break
    return split, splits[split]


def task_of(recipe: Recipe) -> Callable[..., Task]:
    """The function of a recipe's task.

    Raises:
        SurgicalError: there is none of that name, or it is code that may not run.
    """
    return resolve_key(recipe, "task", sys.modules[__name__])
