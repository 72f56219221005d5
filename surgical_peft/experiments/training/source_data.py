"""Data of the task that a source model was trained for: what tuning makes the model forget there."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils.data import Subset
from transformers import TrainingArguments

from ...errors import SurgicalError
from ...validation import nearest
from ..recipe.recipe import Recipe
from ..tasks import Examples, Task, measured_task
from ..tasks.evaluation import mean_loss

MOST = 1000  # examples whose loss is measured where that is done after each of many trainings
SOURCE_LOSS = "source loss"  # heading of a column with its rise
OPENING = ("data_config", "splits", "drop_empty")  # how data are opened
SHIFTS = ("corruption", "severity", "character_noise", "casing", "label_map", "shift_seed", "columns")


class SourceData:
    """The split that results are told on of a recipe's `source_data`.

    Args:
        recipe: has `source_data`.
        most: examples that `loss` looks at, drawn once; default is all.

    Attributes:
        task: of the data.
        split: its name, `test` or, where the data have none, `validation`.
        examples: all of it.
        sample: those that `loss` looks at.

    Raises:
        SurgicalError: as `source_recipe` and `load_task`.

    Example:
        >>> source = SourceData(load_recipe("recipes/fashion_mnist_noise.yaml"))
        >>> source.loss(tuned) - source.loss(model)
        0.31
    """

    def __init__(self, recipe: Recipe, most: int | None = None) -> None:
        own = source_recipe(recipe)
        try:
            self.split, self.task = measured_task(own)
        except SurgicalError as error:
            raise SurgicalError(f"source_data: {error}") from error
        self.examples = self.sample = self.task.splits[self.split]
        self._args = recipe.arguments()
        if most is not None and most < len(self.examples):
            places = sorted(random.Random(0).sample(range(len(self.examples)), most))
            self.sample = Subset(self.examples, places)  # type: ignore[arg-type]

    def loss(self, model: nn.Module, examples: Examples | None = None) -> float:
        """The mean loss of a model, see `source_loss`; `examples` stand for those of `sample`."""
        return source_loss(model, self.sample if examples is None else examples, self.task, self._args)

    def metric(self, model: nn.Module, examples: Examples | None = None) -> float:
        """The task's metric of a model; `examples` stand for all."""
        return self.task.measure(model, self.examples if examples is None else examples)


def source_loss(model: nn.Module, examples: Examples, task: Task, args: TrainingArguments) -> float:
    """The mean loss of a model on examples of its source: nats for classes and tokens, squared units for numbers."""
    return mean_loss(model, examples, task.collate, max(args.train_batch_size, args.eval_batch_size))


def source_recipe(recipe: Recipe) -> Recipe:
    """The recipe with the data of its source model, unshifted.

    Raises:
        SurgicalError: `source_data` that is neither data nor keys for them, or that is given for a new head.
    """
    given = recipe.source_data
    check_source(recipe)
    keys = {"data": given} if isinstance(given, str) else given
    known = ("data", *OPENING, *SHIFTS)
    if not isinstance(keys, dict) or "data" not in keys or not set(keys) <= set(known):
        wrong = next((nearest(str(key), known) for key in keys if key not in known), "") if keys else ""
        raise SurgicalError(
            f"source_data: {given!r} is neither data nor a mapping with the key data: {wrong}Keys: {', '.join(known)}."
        )
    plain = Recipe(model="", data="")
    unshifted: dict[str, Any] = {key: getattr(plain, key) for key in (*OPENING, *SHIFTS) if key != "columns"}
    return replace(recipe, **{**unshifted, **keys, "imbalance": {}, "unlabelled": False})


def check_source(recipe: Recipe) -> None:
    """Refuse `source_data` for a new head, which knows nothing of the source's labels.

    Raises:
        SurgicalError: both are given.
    """
    if recipe.source_data is not None and recipe.new_head:
        raise SurgicalError(
            "source_data: a model with new_head cannot be measured on the source model's task: leave one out."
        )


def unit_of_loss(keys: Mapping[str, Any]) -> str:
    """The unit of the loss of a recipe's task, given the recipe's keys."""
    return "squared units" if keys.get("problem_type") == "regression" else "nats"
