"""Tasks: a recipe's model, data and metric; one function each, in a file of its own.

The interface of a task, ours or the user's own, is in `tasks.task`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn
from torch.utils.data import Subset

from ...errors import SurgicalError
from ..recipe.code import check_code, resolve_key
from ..recipe.recipe import Recipe
from .causal_lm import causal_lm
from .image_classification import image_classification
from .question_answering import question_answering
from .seq2seq import seq2seq
from .summary import DataSummary
from .task import SPLITS as SPLITS
from .task import Examples as Examples
from .task import Task as Task
from .task import check_folder, check_keys
from .task import info_of as info_of
from .text_classification import text_classification
from .token_classification import token_classification

__all__ = [
    "causal_lm",
    "image_classification",
    "question_answering",
    "seq2seq",
    "text_classification",
    "token_classification",
]


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
    check_code(recipe, "metric", "test_metrics")
    info = info_of(task)
    if info.keys is not None:
        check_keys(recipe, info.keys)
    for name, kind in ((recipe.model, "model"), (recipe.data, "data set")):
        check_folder(name, kind, recipe.path)
    loaded = task(recipe, tuple(splits))
    if not isinstance(loaded, Task):
        raise SurgicalError(
            f"task: {recipe.task!r} gives a {type(loaded).__name__}, not a Task: it has to return one."
        )
    sizes = ", ".join(f"{len(examples):,} {split}" for split, examples in loaded.splits.items())
    return replace(loaded, summary=DataSummary((f"examples: {sizes or 'none'}",)) + loaded.summary)


def measured_task(recipe: Recipe) -> tuple[str, Task]:
    """A task with the split alone that results are told on: `test` or, where the data have none, `validation`.

    Raises:
        SurgicalError: as `load_task`.
    """
    for split in ("test", "validation"):
        if split in (task := load_task(recipe, (split,))).splits:
            break
    return split, task


def measured_split(recipe: Recipe) -> tuple[str, Examples]:
    """The split of `measured_task`, with its name."""
    split, task = measured_task(recipe)
    return split, task.splits[split]


def further_measure(recipe: Recipe, metric: str) -> tuple[str, Callable[[nn.Module, Examples], float], Examples]:
    """How one of a recipe's `test_metrics` is measured: the split, the measure, and all examples of the split.

    Raises:
        SurgicalError: as `load_task`; a task that does not measure it.
    """
    split, task = measured_task(replace(recipe, metric=metric))
    if task.metric != metric:
        raise SurgicalError(
            f"test_metrics: {metric!r} is not measured by the task {recipe.task!r}, which gives {task.metric!r} "
            "whatever the recipe's metric is: leave it out, or have the task read `recipe.metric`."
        )
    return split, task.measure, task.splits[split]


def spread(examples: Examples, count: int | None) -> Examples:
    """So many of the examples, evenly spread over all; None, or more than there are: all.

    Example:
        >>> list(spread("abcdefgh", 4))
        ['a', 'c', 'e', 'g']
    """
    size = len(examples)
    if count is None or count >= size:
        return examples
    return Subset(examples, [place * size // count for place in range(count)])  # type: ignore[arg-type]


def task_of(recipe: Recipe) -> Callable[..., Task]:
    """The function of a recipe's task.

    Raises:
        SurgicalError: there is none of that name, or it is code that may not run.
    """
    return resolve_key(recipe, "task", sys.modules[__name__])
