"""The labels of a data set: the model's label of each class, and the rows that are used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Value

from ...errors import SurgicalError
from ...validation import nearest
from ..recipe.recipe import Recipe
from ..shifts import keep_share, read_label_map
from ..shifts.classes import class_number
from .columns import open_splits


@dataclass(frozen=True)
class LabeledRows:
    """The rows that a recipe uses and their labels.

    Attributes:
        rows: for each split the places of its rows.
        labels: for each split the label of each of these rows, a number from 0.
        count: how many labels the model has.
        names: the names of the labels of a new head, or None where the labels are not the classes of the data.
    """

    rows: dict[str, list[int]]
    labels: dict[str, list[int]]
    count: int
    names: list[str] | None


def label_rows(recipe: Recipe, data: dict[str, Any], column: str, config: Any) -> LabeledRows:
    """The labels of each split, after the recipe's `label_map` and `imbalance`.

    Without a `label_map`, classes are matched with the model's labels by name where it knows all the names, else by
    number: classes as a `ClassLabel` has them, other names in alphabetical order.

    Args:
        recipe: says how classes become labels.
        data: the splits.
        column: where the labels are: classes, names or numbers.
        config: of the model, which knows its labels.

    Raises:
        SurgicalError: a column or class that the training split lacks, a row without label, a label that the model
            has not, a split left without rows, or only one class to train on.
    """
    train = data["train"] if "train" in data else open_splits(recipe.data, ["train"])["train"]
    if column not in train.features:
        raise SurgicalError(
            f"{recipe.data}: the split train has no column {column!r} for the label, as {next(iter(data))} has: "
            f"{nearest(column, train.features)}It has: {', '.join(train.features)}."
        )
    classes = class_names(train.features[column], list(train[column]), f"{recipe.data}, split train")
    label_map, count = fit_labels(recipe, column, classes, config)
    rows, labels = {}, {}
    for split, split_rows in data.items():
        numbers = _classes_of(split_rows, column, classes, f"{recipe.data}, split {split}")
        places = [index for index, number in enumerate(numbers) if label_map[number] is not None]
        if split == "train" and recipe.imbalance:
            shares = _read_shares(recipe.imbalance, classes)
            kept = keep_share([numbers[index] for index in places], shares, recipe.shift_seed)
            places = [places[number] for number in kept]
        if not places:
            raise SurgicalError(f"label_map={recipe.label_map}: no row of the split {split} of {recipe.data} is left.")
        rows[split] = places
        labels[split] = [int(label_map[numbers[index]]) for index in places]  # type: ignore[arg-type]
    if "train" in labels and len(set(labels["train"])) < 2:
        raise SurgicalError(
            f"{recipe.data}: all {len(rows['train'])} rows of the split train have the label {labels['train'][0]} "
            f"(column {column!r}): {_TWO}. The classes are {', '.join(classes)}."
        )
    return LabeledRows(rows, labels, count, classes if recipe.label_map is None else None)


_TWO = "to choose between classes there must be two"


def fit_labels(recipe: Recipe, column: str, classes: list[str], config: Any) -> tuple[list[int | None], int]:
    """The label of each class of a column, None for those left out, and how many labels the model has.

    Raises:
        SurgicalError: one class or label only, or a label that the model has not.
    """
    if len(classes) < 2:
        only = f"one class only, {classes[0]!r}" if classes else "no class"
        raise SurgicalError(
            f"{recipe.data}: the column {column!r} of the split train has {only}: {_TWO}. Add rows of another one, or "
            "name the column that has the classes."
        )
    label_map = read_label_map(recipe.label_map, classes)
    if recipe.new_head:
        count = max((label for label in label_map if label is not None), default=0) + 1
    else:
        count = config.num_labels
        known = {name: label for label, name in config.id2label.items()}
        if recipe.label_map is None and all(name in known for name in classes):
            label_map = [known[name] for name in classes]
    if count < 2:
        one = f"label_map={recipe.label_map} leaves" if recipe.new_head else f"the model {recipe.model} has"
        cure = "Give the classes different labels" if recipe.new_head else "Write new_head: true"
        raise SurgicalError(f"{one} one label only: {_TWO}. {cure}; they are {', '.join(classes)}.")
    if any(label is not None and label >= count for label in label_map):
        given, cure = f"{len(classes)} classes", "Write a label_map"
        if recipe.label_map is not None:
            given, cure = f"label_map={recipe.label_map}", f"Map to the labels from 0 to {count - 1}"
        raise SurgicalError(
            f"{given} does not fit: the labels of {recipe.model} are 0 to {count - 1}, the classes of {recipe.data} "
            f"are {', '.join(classes)}. {cure}, or new_head: true for a head of its own."
        )
    return label_map, count


def class_names(feature: Any, values: list[Any], where: str) -> list[str]:
    """The names of the classes in a column, in the order of their numbers."""
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    known = {value for value in values if value is not None}
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        return sorted(known)
    if min(known, default=0) < 0:
        raise SurgicalError(f"{where}: the label {min(known)} is below 0: numbers of classes begin at 0.")
    return [str(number) for number in range(int(max(known, default=-1)) + 1)]


def class_numbers(feature: Any, values: list[Any], classes: list[str], where: str) -> list[int]:
    """The class of each value of a column, as a number in `classes`."""
    if isinstance(feature, ClassLabel):
        numbers: dict[Any, int | None] = {
            number: classes.index(name) if name in classes else None for number, name in enumerate(feature.names)
        }
    elif isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        numbers = {name: number for number, name in enumerate(classes)}
    else:
        numbers = {number: number for number in range(len(classes))}
    for row, value in enumerate(values):
        if numbers.get(value) is None:
            name = feature.names[value] if isinstance(feature, ClassLabel) and value in numbers else value
            raise SurgicalError(
                f"{where}: row {row} has the label {name!r}, which is no class of the split train: "
                f"{nearest(str(name), classes)}There are: {', '.join(classes)}."
            )
    return [numbers[value] for value in values]  # type: ignore[misc]


def _classes_of(data: Any, column: str, classes: list[str], where: str) -> list[int]:
    return class_numbers(data.features[column], list(data[column]), classes, where)


def _read_shares(imbalance: dict[Any, Any], classes: list[str]) -> dict[int, float]:
    for name, share in imbalance.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise SurgicalError(f"imbalance={imbalance}: {name}: {share!r} is no share: more than 0, 1 at most.")
    return {class_number("imbalance", name, classes): float(share) for name, share in imbalance.items()}
