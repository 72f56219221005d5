"""What a model with a head for labels predicts: one class, several at once, or a number; with its loss and metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import List, Value
from torch import Tensor, nn

from ...errors import SurgicalError
from ...validation import check_choice
from ..metrics import load_metric
from ..recipe.recipe import Recipe
from .cells import cells_of, empty_cells, number_faults
from .columns import LABEL, ColumnType, list_of
from .dataset import OpenedData
from .evaluation import UNWEIGHTED, Batch, Measure, check_metric, read_class
from .labels import LabeledRows, class_names, class_numbers, fit_labels, label_rows
from .marginal_entropy import MarginalEntropy
from .summary import DataSummary
from .tiny_data import label_feature

NUMBER = ColumnType(
    "numbers", lambda feature: isinstance(feature, Value) and feature.dtype.startswith(("int", "float")), number_faults
)
LABELS = ColumnType(list_of(LABEL).description, list_of(LABEL).fits, empty_cells)  # of a list that may be empty
_FOR_CLASSES = ("label_map", "imbalance", "class_weights")


@dataclass(frozen=True)
class Target:
    """What a model predicts of an example.

    Attributes:
        column: the type of the column `label`.
        metrics: that fit and ship; the first is the default.
        read: predictions and references of a batch, as `Measure` takes them.
        label_rows: the labels of a recipe's data.
        classes: the role of the column with classes, or None.
        tiny: for `--tiny`: the type of the column `label`, given the names of the classes, and what stands there for
            a class.
    """

    column: ColumnType
    metrics: tuple[str, ...]
    read: Callable[[nn.Module, Batch], tuple[list[Any], list[Any]]]
    label_rows: Callable[[Recipe, OpenedData, Any], LabeledRows]
    classes: str | None
    tiny: tuple[Callable[[list[str]], Any], Callable[[int], Any]]

    def measure(self, metric: str | None, **kwargs: Any) -> Measure:
        """The metric of a recipe, or the default; `kwargs` are those of `Measure`.

        Raises:
            SurgicalError: it ships and is for other tasks.
        """
        name = metric or self.metrics[0]
        check_metric(name, *self.metrics)
        return Measure(load_metric(name), self.read, **kwargs)


def target_of(recipe: Recipe) -> Target:
    """What the model of a recipe predicts, by its `problem_type`.

    Raises:
        SurgicalError: an unknown type, or keys that do not fit it.
    """
    check_choice("a recipe", "problem_type", recipe.problem_type or SINGLE, TARGETS)
    if recipe.problem_type not in (None, SINGLE):
        for key in _FOR_CLASSES:
            if getattr(recipe, key):
                raise SurgicalError(f"{key}={getattr(recipe, key)} is not for problem_type {recipe.problem_type!r}.")
    return TARGETS[recipe.problem_type or SINGLE]


def load_with_loss(
    load: Callable[[], nn.Module], recipe: Recipe, weights: list[float] | None
) -> Callable[[], nn.Module]:
    """A function that loads a model with the loss of a recipe: of its problem type, class weights or unlabeled copies.

    Args:
        load: loads the model.
        recipe: says which loss.
        weights: of the classes.
    """
    return partial(_load, load, recipe.problem_type or SINGLE, weights, bool(recipe.unlabelled))


def _load(load: Callable[[], Any], problem_type: str, weights: list[float] | None, is_unlabeled: bool) -> nn.Module:
    model = load()
    model.config.problem_type = problem_type
    if is_unlabeled:
        MarginalEntropy().put_on(model)
    if weights is not None:
        model.register_forward_hook(WeightedLoss(torch.tensor(weights)), with_kwargs=True)
    return model


@dataclass(frozen=True)
class WeightedLoss:
    """Forward hook that replaces the loss of a classifier: the mean over the examples of weight times cross-entropy.

    Attributes:
        weights: of the classes.
    """

    weights: Tensor

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """The output with the weighted loss, where there are labels and `UNWEIGHTED` is not set."""
        if (labels := kwargs.get("labels")) is None or UNWEIGHTED.get():
            return output
        losses = nn.functional.cross_entropy(output.logits.float(), labels, reduction="none")
        count = kwargs.get("num_items_in_batch")  # of all batches of a step, where gradients are accumulated
        losses = losses * self.weights.to(losses.device)[labels]
        output.loss = losses.mean() if count is None else losses.sum() / count
        return output


def _label_sets(recipe: Recipe, data: OpenedData, config: Any) -> LabeledRows:
    """For each row a 1 or 0 for each label."""
    column = data.columns["label"]
    classes = class_names(data.reference.features[column].feature, pc.list_flatten(cells_of(data.reference, column)))
    label_map, count, summary = fit_labels(recipe, column, classes, config)
    rows, labels = {}, {}
    for split, split_rows in data.splits.items():
        cells = cells_of(split_rows, column).combine_chunks()
        where = f"{recipe.data}, split {split}"
        numbers = class_numbers(split_rows.features[column], cells, classes, where)
        matrix = np.zeros((len(split_rows), count))
        matrix[np.asarray(pc.list_parent_indices(cells)), np.array(label_map, dtype=int)[numbers]] = 1
        rows[split], labels[split] = list(range(len(split_rows))), matrix.tolist()
    return LabeledRows(rows, labels, count, classes, summary)


def _numbers(recipe: Recipe, data: OpenedData, config: Any) -> LabeledRows:
    """For each row its number."""
    if not recipe.new_head and config.num_labels != 1:
        raise SurgicalError(
            f"{recipe.model} has {config.num_labels} labels, and problem_type 'regression' takes a head with one: "
            "write new_head: true."
        )
    column, lines = data.columns["label"], []
    rows, labels = {}, {}
    for split, split_rows in data.splits.items():
        numbers = np.asarray(pc.cast(cells_of(split_rows, column), pa.float64()))
        rows[split], labels[split] = list(range(len(numbers))), numbers.tolist()
        if split == "train":
            low, high = numbers.min(), numbers.max()
            if low == high:
                raise SurgicalError(
                    f"{recipe.data}: all {len(numbers):,} rows of the split train have the number {low:g} (column "
                    f"{column!r}): there is nothing to learn. Name the column that has the numbers."
                )
            lines = [f"numbers to predict: {low:g} to {high:g}, mean {numbers.mean():.4g}"]
    head = ("new head for one number",) if recipe.new_head else ()
    return LabeledRows(rows, labels, 1, None, DataSummary((*lines, *head)))


def _read_label_sets(model: nn.Module, batch: Batch) -> tuple[list[list[int]], list[list[int]]]:
    """Of each example a 1 for each label with a positive logit, and the right ones."""
    labels = batch.pop("labels")
    return (model(**batch).logits > 0).int().tolist(), labels.int().tolist()


def _read_numbers(model: nn.Module, batch: Batch) -> tuple[list[float], list[float]]:
    """The number that is predicted for each example, and the right one."""
    labels = batch.pop("labels")
    return model(**batch).logits.squeeze(-1).tolist(), labels.tolist()


SINGLE = "single_label_classification"
TARGETS = {
    SINGLE: Target(
        column=LABEL,
        metrics=("accuracy", "macro_f1", "matthews_correlation"),
        read=read_class,
        label_rows=label_rows,
        classes="label",
        tiny=(label_feature, int),
    ),
    "multi_label_classification": Target(
        column=LABELS,
        metrics=("micro_f1",),
        read=_read_label_sets,
        label_rows=_label_sets,
        classes="label",
        tiny=(lambda classes: List(label_feature(classes)), lambda label: [label]),
    ),
    "regression": Target(
        column=NUMBER,
        metrics=("r2", "pearson", "neg_mean_squared_error"),
        read=_read_numbers,
        label_rows=_numbers,
        classes=None,
        tiny=(lambda classes: Value("float32"), float),
    ),
}
