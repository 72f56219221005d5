"""The labels of a data set: the model's label of each class, and the rows that are used."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, LargeList, List

from ...errors import SurgicalError
from ...validation import check_number, nearest
from ..recipe.recipe import Recipe
from ..shifts import keep_share, read_label_map
from ..shifts.classes import class_number
from .cells import cells_of, is_text
from .dataset import OpenedData, reference_split
from .marginal_entropy import UNLABELED
from .summary import DataSummary, listed


@dataclass(frozen=True)
class LabeledRows:
    """The rows that a recipe uses and their labels.

    Attributes:
        rows: for each split the places of its rows.
        labels: for each split the label of each of these rows: a number from 0; of other targets than one class
            what the loss takes.
        count: how many labels the model has.
        names: the names of the labels of a new head, or None where the labels are not the classes of the data.
        summary: how classes became labels.
        weights: of the labels in the loss, or None where all count alike.
    """

    rows: dict[str, list[int]]
    labels: dict[str, list[Any]]
    count: int
    names: list[str] | None
    summary: DataSummary
    weights: list[float] | None = None


def label_rows(recipe: Recipe, data: OpenedData, config: Any) -> LabeledRows:
    """The labels of each split, after the recipe's `label_map` and `imbalance`.

    Args:
        recipe: says how classes become labels.
        data: with a column for the role `label`: classes, names or numbers.
        config: of the model, which knows its labels.

    Raises:
        SurgicalError: as `fit_labels`; a class that the training split lacks, a split left without rows, or only one
            class to train on.
    """
    column, reference = data.columns["label"], data.reference
    classes = class_names(reference.features[column], cells_of(reference, column))
    label_map, count, summary = fit_labels(recipe, column, classes, config)
    if recipe.unlabelled and None in label_map:
        raise SurgicalError(
            f"label_map={recipe.label_map} leaves classes out, and with unlabelled nobody knows which training images "
            "are of these: take them out of the data, and map every class."
        )
    rows, labels = {}, {}
    for split, split_rows in data.splits.items():
        if column not in split_rows.features:  # images without labels
            rows[split], labels[split] = list(range(len(split_rows))), [UNLABELED] * len(split_rows)
            continue
        where, known = f"{recipe.data}, split {split}", reference_split(recipe)
        numbers = class_numbers(split_rows.features[column], cells_of(split_rows, column), classes, where, known)
        places = [index for index, number in enumerate(numbers) if label_map[number] is not None]
        if split == "train" and recipe.imbalance:
            shares = _read_shares(recipe.imbalance, classes)
            kept = keep_share([numbers[index] for index in places], shares, recipe.shift_seed)
            places = [places[number] for number in kept]
        if not places:
            raise SurgicalError(f"label_map={recipe.label_map}: no row of the split {split} of {recipe.data} is left.")
        rows[split] = places
        labels[split] = [int(label_map[numbers[index]]) for index in places]  # type: ignore[arg-type]
    if "train" in labels and len(set(labels["train"])) < 2 and not recipe.unlabelled:
        raise SurgicalError(
            f"{recipe.data}: all {len(rows['train'])} rows of the split train have the label {labels['train'][0]} "
            f"(column {column!r}): {_TWO}. The classes are {listed(classes)}."
        )
    names = classes if recipe.label_map is None else None
    weights = None
    if recipe.class_weights is not None and "train" in labels:
        weights = _read_weights(recipe, labels["train"], count)
        labeled = [(name, label) for name, label in zip(classes, label_map, strict=True) if label is not None]
        pairs = [f"{name} {weights[label]:.3g}" for name, label in labeled]
        summary += DataSummary((f"class weights: {listed(pairs)}",))
    return LabeledRows(rows, labels, count, names, summary, weights)


_TWO = "to choose between classes there must be two"


def fit_labels(
    recipe: Recipe, column: str, classes: list[str], config: Any
) -> tuple[list[int | None], int, DataSummary]:
    """The label of each class of a column, None for those left out; how many labels the model has; and what was done.

    Classes are matched with the model's labels by name where both have names, whatever their case; else by number:
    numbers as they are or, where they begin with another one than 0, in their order; names in alphabetical order, or
    as a `ClassLabel` has them.

    Raises:
        SurgicalError: one class or label only, a label that the model has not, or classes of which the model knows
            some by name and some not.
    """
    if len(classes) < 2:
        only = f"one class only, {classes[0]!r}" if classes else "no class"
        raise SurgicalError(
            f"{recipe.data}: the column {column!r} of the split {reference_split(recipe)} has {only}: {_TWO}. Add "
            "rows of another one, or name the column that has the classes."
        )
    label_map = read_label_map(recipe.label_map, classes)
    known = [str(config.id2label.get(label, label)) for label in range(config.num_labels)]
    if recipe.new_head:
        count = max((label for label in label_map if label is not None), default=0) + 1
        by_map = recipe.label_map is not None
        shown = _in_words(label_map, classes, None) if by_map else listed(classes)
        summary = DataSummary((f"new head with {count} labels{' by label_map' * by_map}: {shown}",))
    else:
        count = config.num_labels
        if recipe.label_map is None and count >= 2:
            label_map, summary = _matched(recipe, classes, known)
        else:
            summary = DataSummary((f"labels by label_map: {_in_words(label_map, classes, known)}",))
    if count < 2:
        one = f"label_map={recipe.label_map} leaves" if recipe.new_head else f"the model {recipe.model} has"
        cure = "Give the classes different labels" if recipe.new_head else "Write new_head: true"
        raise SurgicalError(f"{one} one label only: {_TWO}. {cure}; they are {listed(classes)}.")
    if any(label is not None and not 0 <= label < count for label in label_map):
        given, cure = f"{len(classes)} classes do", "Write a label_map"
        if recipe.label_map is not None:
            given, cure = f"label_map={recipe.label_map} does", f"Map to the labels from 0 to {count - 1}"
        raise SurgicalError(
            f"{given} not fit: the labels of {recipe.model} are 0 to {count - 1} ({listed(known)}), the classes "
            f"of {recipe.data} are {listed(classes)}. {cure}, or new_head: true for a head of its own."
        )
    return label_map, count, summary


def _matched(recipe: Recipe, classes: list[str], known: list[str]) -> tuple[list[int | None], DataSummary]:
    """The label of each class by its name, or by its number where classes or labels are not named."""
    for same in (str, str.casefold):
        labels = {same(name): label for label, name in enumerate(known)}
        matched: list[int | None] = [labels.get(same(name)) for name in classes]
        if None not in matched and len(set(matched)) == len(matched):
            return matched, DataSummary((f"labels matched by name: {_in_words(matched, classes, known)}",))
    unknown = [name for name, label in zip(classes, matched, strict=True) if label is None]
    if len(unknown) < len(classes):
        raise SurgicalError(
            f"{recipe.data}: of {len(classes)} classes {recipe.model} knows {len(classes) - len(unknown)} by name, "
            f"not {listed(unknown)}; its labels are {listed(known)}. Write new_head: true for a head with the classes "
            "of the data, or a label_map with the label of each class."
        )
    are_numbers = all(_is_number(name) for name in classes)
    numbers: list[int | None] = [int(name) for name in classes] if are_numbers else list(range(len(classes)))
    first = numbers[0] or 0
    shifted = are_numbers and first != 0 and numbers == list(range(first, first + len(known)))
    if shifted:
        numbers = list(range(len(classes)))
    summary = DataSummary((f"labels matched by number: {_in_words(numbers, classes, known)}",))
    if not all(_PLACEHOLDER.fullmatch(name) for name in known) and (shifted or not are_numbers):
        warning = (
            f"labels fit by number only: the data have {listed(classes)}, the model has {listed(known)}. If these are "
            "not the same, write new_head: true or a label_map"
        )
        summary = DataSummary(summary.lines, (warning,))
    return numbers, summary


_PLACEHOLDER = re.compile(r"LABEL_\d+")  # what transformers calls labels without a name


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _in_words(labels: list[int | None], classes: list[str], known: list[str] | None) -> str:
    """The label of each class, by its name where that is known and another one than that of the class."""
    pairs = []
    for name, label in zip(classes, labels, strict=True):
        if label is None:
            continue
        named = known[label] if known is not None and 0 <= label < len(known) else str(label)
        pairs.append(name if named == name else f"{name} = {named}")
    return listed(pairs)


_MOST_GAPS = 1000  # a column of numbers up to this has classes, if they begin with 0; else it may be of ids


def class_names(feature: Any, cells: Any) -> list[str]:
    """The names of the classes in a column, in the order of their numbers; of numbers from 0 all up to the largest.

    Args:
        feature: the type of the column.
        cells: the column as Arrow has it.
    """
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = pc.unique(cells).drop_null()
    if is_text(values.type):
        return sorted(values.to_pylist())
    numbers = sorted(int(value) for value in values.to_pylist())
    if numbers and numbers[0] == 0 and numbers[-1] < _MOST_GAPS:  # few examples may lack some of the classes
        numbers = list(range(numbers[-1] + 1))
    return [str(number) for number in numbers]


def class_numbers(feature: Any, cells: Any, classes: list[str], where: str, reference: str = "train") -> list[int]:
    """The class of each cell of a column, as a number in `classes`; of a column of lists that of each entry.

    For an error: `where` the cells are, and the split that has all the classes.

    Raises:
        SurgicalError: there is a class that is none of them.
    """
    rows = None
    if isinstance(feature, List | LargeList):
        rows = np.asarray(pc.list_parent_indices(cells))
        feature, cells = feature.feature, pc.list_flatten(cells)
    if isinstance(feature, ClassLabel):
        known = pc.if_else(pc.less(cells, 0), None, cells)  # -1 stands for no label
        names = pc.take(pa.array(feature.names), known)
    elif is_text(cells.type):
        names = cells
    else:
        names = pc.cast(pc.cast(cells, pa.int64()), pa.string())
    numbers = pc.index_in(names, value_set=pa.array(classes, names.type))
    if numbers.null_count:
        missing = np.flatnonzero(np.asarray(pc.is_null(numbers)))
        name = names[int(missing[0])].as_py()
        places = missing if rows is None else np.unique(rows[missing])
        rows_of_it = "1 row has" if len(places) == 1 else f"{len(places):,} rows have"
        hint = nearest(str(name), classes)
        raise SurgicalError(
            f"{where}: {rows_of_it} a class, such as {name!r}, that no row of the split {reference} has (from 0: "
            f"{listed(places.tolist())}). {hint[:1].upper()}{hint[1:]}There are: {listed(classes)}."
        )
    return np.asarray(numbers).tolist()


def _read_weights(recipe: Recipe, labels: list[int], count: int) -> list[float]:
    """The weight of each label in the loss; `balanced` as scikit-learn has it, so that every label counts as much."""
    given = recipe.class_weights
    if recipe.training.get("label_smoothing_factor"):
        raise SurgicalError(f"class_weights={given}: label_smoothing_factor has a loss of its own: drop one of them.")
    if given == "balanced":
        sizes = np.bincount(labels, minlength=count)
        return [float(len(labels) / ((sizes > 0).sum() * size)) if size else 0.0 for size in sizes]
    if not isinstance(given, list) or len(given) != count:
        raise SurgicalError(f"class_weights={given!r} is neither balanced nor a list of {count} weights, one a label.")
    for weight in given:
        check_number("a recipe", "class_weights", weight, at_least=0)
    return [float(weight) for weight in given]


def _read_shares(imbalance: dict[Any, Any], classes: list[str]) -> dict[int, float]:
    for name, share in imbalance.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise SurgicalError(f"imbalance={imbalance}: {name}: {share!r} is no share: more than 0, 1 at most.")
    return {class_number("imbalance", name, classes): float(share) for name, share in imbalance.items()}
