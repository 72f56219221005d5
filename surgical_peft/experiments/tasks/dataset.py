"""The data of a recipe: splits opened and held out, columns found, cells checked, all told in a summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import LargeList, List, Value

from ...errors import SurgicalError
from ..recipe.recipe import Recipe
from .cells import Fault, cells_of
from .columns import ColumnType, empty_columns, find_columns, stored_images, whole_numbers, without_labels
from .splits import SHARE, DataSource, assign_splits, held_out, unused_splits
from .summary import DataSummary, listed

Roles = Mapping[str, ColumnType]
_ROW_EACH = 20  # so many classes may have a row each


@dataclass(frozen=True)
class OpenedData:
    """Rows and columns of a recipe's data.

    Attributes:
        splits: the splits that were asked for and that there are.
        columns: the column of each role.
        reference: the split whose classes count, also where it was not asked for: that of training or, where its
            labels are not used, of validation; None where nothing needs it.
        summary: what was understood.
    """

    splits: dict[str, Any]
    columns: dict[str, str]
    reference: Any
    summary: DataSummary


def open_data(
    recipe: Recipe, splits: Sequence[str], roles: Roles | Callable[[Any], Roles], classes: str | None = None
) -> OpenedData:
    """Open the splits of a recipe's data; of a local folder only the files of these are read.

    Where there is no validation split, a share of the training split is held out, the same one every time. A test
    split that is missing is left out.

    Args:
        recipe: its keys for the data are looked at.
        splits: which ones.
        roles: for each role the type of its column; or a function that tells them by the features of the data.
        classes: the role of the column with classes; they are held out in proportion, and those of the training split
            count for the others, so it is opened in any case. With `unlabelled` in the recipe the training split is
            given without this column, if it has it, and those of the validation split count.

    Raises:
        SurgicalError: data or a split that cannot be opened; no column that fits; cells that are empty or cannot be
            read, all of them; too few rows to hold some out, or with `unlabelled` no validation split.
    """
    source = DataSource.find(recipe.data, recipe.data_config)
    names = assign_splits(source, recipe.splits)
    reference = reference_split(recipe)
    if recipe.unlabelled:
        source = source.with_unlabeled(names["train"])
    if names[reference] is None and recipe.unlabelled:
        raise SurgicalError(
            f"unlabelled: {recipe.data} has no validation split, and none is held out of the training split, whose "
            f"labels are not used: name a labeled split, splits: {{validation: {source.splits[-1]}}}, or add one."
        )
    is_held_out = names["validation"] is None and bool({"train", "validation"} & set(splits))
    is_held_out &= recipe.folds is None or "validation" in splits  # folds of train need no other split
    asked = [split for split in splits if names[split] is not None or split == "train"]
    is_needed = classes or is_held_out or not asked  # columns are found in some split, also if none is to be had
    needed = [*asked, *([reference] if reference not in asked and is_needed else [])]
    if "train" in needed and names["train"] is None:
        raise SurgicalError(
            f"{source.name} has the splits {', '.join(source.splits)}, and none is called train: say which one is, "
            f"splits: {{train: {source.splits[0]}}}."
        )
    opened = {split: stored_images(whole_numbers(source.open(str(names[split])))) for split in needed}
    if callable(roles):
        roles = roles(opened[needed[0]].features)
    labeled = {split: rows for split, rows in opened.items() if split != "train" or not recipe.unlabelled}
    columns = find_columns(recipe, labeled, roles, empty_columns(labeled))
    if len(labeled) < len(opened):
        opened["train"] = without_labels(recipe, opened["train"], columns, classes)
    opened, lines = _check_cells(recipe, opened, columns, roles)
    if classes:
        _check_classes(recipe, opened[reference], columns[classes])
    named = [f"{role} = {column}" for role, column in columns.items() if role != column]
    unused = [column for column in next(iter(labeled.values())).features if column not in columns.values()]
    lines = [*([f"not used: {listed(unused)}"] if unused else []), *lines]
    lines = [*([f"columns: {', '.join(named)}"] if named else []), *lines]
    lines += [f"split {role}: the data's {name}" for role, name in recipe.splits.items() if name and role in splits]
    if is_held_out:
        opened, line = _hold_out(recipe, opened, columns[classes] if classes else None, unused_splits(source, names))
        lines.append(line)
    if "test" in splits and names["test"] is None:
        lines.append("no test split: nothing is measured on one")
    kept = {split: opened[split] for split in splits if split in opened}
    return OpenedData(kept, columns, opened.get(reference), DataSummary(tuple(lines)))


def reference_split(recipe: Recipe) -> str:
    """The split whose classes count for the others."""
    return "validation" if recipe.unlabelled else "train"


def _check_cells(
    recipe: Recipe, opened: dict[str, Any], columns: Mapping[str, str], roles: Mapping[str, ColumnType]
) -> tuple[dict[str, Any], list[str]]:
    """The rows without those that cannot be used, and a line for each fault; an error unless `drop_empty` is given."""
    faults: list[tuple[str, str, Fault]] = [
        (split, column, fault)
        for split, rows in opened.items()
        for role, column in columns.items()
        if column in rows.features  # images without labels have one column
        for fault in roles[role].faults(rows, column)
    ]
    described = [f"split {split}: {fault.describe(column, len(opened[split]))}" for split, column, fault in faults]
    folder = f"{Path(recipe.data).resolve()}/"  # what is left out stands in cards, which say nothing of this machine
    described = [line.replace(folder, "") for line in described]
    if faults and not recipe.drop_empty:
        several = len(described) > 1
        lines = "".join(f"\n- {line}" for line in described) if several else f", {described[0]}"
        all_at_fault = next((split for split, _, fault in faults if len(fault.rows) == len(opened[split])), None)
        cure = "write drop_empty: true to go on without these rows"
        if all_at_fault:
            cure = "name another column"
            cure += f", or use no such split, splits: {{{all_at_fault}: null}}" if all_at_fault != "train" else ""
        hint = " In CSV, NA, None and null are empty as well." if any("empty" in f.problem for *_, f in faults) else ""
        raise SurgicalError(
            f"{recipe.data}{lines}{chr(10) if several else '. '}Rows are counted from 0. Fill or mend these cells, or "
            f"{cure}.{hint}"
        )
    kept = dict(opened)
    for split, rows in opened.items():
        lost = [fault.rows for name, _, fault in faults if name == split]
        if lost:
            left = np.setdiff1d(np.arange(len(rows)), np.concatenate(lost))
            if not len(left):
                raise SurgicalError(
                    f"{recipe.data}: drop_empty leaves no row of the split {split}: {'; '.join(described)}."
                )
            kept[split] = rows.select(left)
    return kept, [f"left out by drop_empty: {line}" for line in described]


def _check_classes(recipe: Recipe, rows: Any, column: str) -> None:
    """Refuse a column where almost every row has a class of its own, such as an id."""
    cells = cells_of(rows, column)
    if isinstance(rows.features[column], Value) and len(rows) > _ROW_EACH:
        values = pc.unique(cells)
        if len(values) > max(_ROW_EACH, len(rows) * 2 // 3):
            raise SurgicalError(
                f"{recipe.data}: the column {column!r} has {len(values):,} different values in {len(rows):,} rows, "
                f"such as {listed(values[:3].to_pylist())}: these are no classes. Name the column that has them, "
                "columns: {label: ...}."
            )


def _hold_out(
    recipe: Recipe, opened: dict[str, Any], column: str | None, unused: str | None
) -> tuple[dict[str, Any], str]:
    rows = opened["train"]
    codes = np.zeros(len(rows), dtype=int)
    if column is not None and isinstance(rows.features[column], List | LargeList):
        column = None
    if column is not None:
        encoded = pc.dictionary_encode(cells_of(rows, column).combine_chunks())
        codes = np.asarray(encoded.indices)
    mask = held_out(codes, recipe.shift_seed)
    share = f"{100 * SHARE:.0f} %"
    if not mask.any():
        raise SurgicalError(
            f"{recipe.data} has no validation split, and {len(rows)} training rows are too few to hold out {share} "
            f"of them{' with each class left' if column else ''}: add rows, or a validation split."
        )
    train, validation = rows.select(np.flatnonzero(~mask)), rows.select(np.flatnonzero(mask))
    line = f"no validation split: {share} of train, seed {recipe.shift_seed}"
    line += ", by class" if column else ""
    return {**opened, "train": train, "validation": validation}, f"{line}; {unused}" if unused else line
