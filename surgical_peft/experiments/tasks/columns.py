"""The columns of a data set: found by type, or named in the recipe."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
from datasets import ClassLabel, Image, LargeList, List, Value

from ...errors import SurgicalError
from ...validation import nearest
from ..recipe.recipe import Recipe
from .cells import Fault, cells_of, empty_cells, label_faults, list_faults, text_faults


@dataclass(frozen=True)
class ColumnType:
    """The type of a column.

    Attributes:
        description: of what it holds, in the plural.
        fits: whether a feature of `datasets` is of it.
        faults: the cells of such a column that cannot be used, given the rows of a split and the column.
    """

    description: str
    fits: Callable[[Any], bool]
    faults: Callable[[Any, str], list[Fault]] = empty_cells


_MANY = 20  # rows, each with a number of its own
_OF_NUMBERS = "; to predict numbers, write problem_type: regression and new_head: true"


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _is_label(feature: Any) -> bool:
    return isinstance(feature, ClassLabel) or (isinstance(feature, Value) and (_is_text(feature) or _is_int(feature)))


TEXT = ColumnType("texts", _is_text, text_faults)
LABEL = ColumnType("classes: names, whole numbers or a ClassLabel", _is_label, label_faults)


def list_of(kind: ColumnType) -> ColumnType:
    """A list of `kind` in each row."""
    return ColumnType(
        f"lists of {kind.description}",
        lambda feature: isinstance(feature, List | LargeList) and kind.fits(feature.feature),
        list_faults,
    )


def whole_numbers(rows: Any) -> Any:
    """The rows with columns of whole numbers as such: with empty cells among them, CSV has them as fractions."""
    for name, feature in rows.features.items():
        if isinstance(feature, Value) and feature.dtype == "float64":
            cells = cells_of(rows, name)
            numbers = cells.drop_null()
            is_whole = pc.and_(pc.is_finite(numbers), pc.equal(numbers, pc.round(numbers)))
            if cells.null_count and len(numbers) and pc.all(is_whole).as_py():
                rows = rows.cast_column(name, Value("int64"))
    return rows


def stored_images(rows: Any) -> Any:
    """The rows with columns of stored images as such: in Parquet `datasets` notes which they are, pandas does not."""
    for name, feature in rows.features.items():
        if isinstance(feature, dict) and feature.keys() == {"bytes", "path"}:
            rows = rows.cast_column(name, Image())
    return rows


def empty_columns(data: Mapping[str, Any]) -> set[str]:
    """The columns with nothing in them, in some split: their type says nothing."""
    return {
        name
        for rows in data.values()
        for name, feature in rows.features.items()
        if isinstance(feature, Value) and feature.dtype in ("float64", "null", "string", "large_string")
        if cells_of(rows, name).null_count == len(rows)
    }


def find_columns(
    recipe: Recipe, data: Mapping[str, Any], roles: Mapping[str, ColumnType], empty: Collection[str] = ()
) -> dict[str, str]:
    """The column of each role: the one that the recipe names, else the one of that name, else the only one that fits.

    Args:
        recipe: its `columns` are looked at.
        data: the splits; all of them must have the columns.
        roles: for each role the type of its column.
        empty: columns with nothing in them, which may be any role, and are taken where no other fits.

    Raises:
        SurgicalError: a role or column that does not exist, no column that fits, or more than one.
    """
    for role in recipe.columns:
        if role not in roles:
            raise SurgicalError(
                f"columns={recipe.columns}: {recipe.task} has no {role!r}: {nearest(str(role), roles)}It has: "
                f"{', '.join(roles)}."
            )
    features = next(iter(data.values())).features
    fit = {
        role: [name for name in features if name in empty or kind.fits(features[name])] for role, kind in roles.items()
    }
    namesakes = {role: role for role in roles if role in fit[role]}
    columns = {**namesakes, **{role: str(column) for role, column in recipe.columns.items()}}
    for role, kind in roles.items():
        if role not in columns:
            free = [name for name in fit[role] if name not in columns.values()]
            if kind is LABEL and len(free) > 1:
                free = [name for name in free if not _is_identifier(data, name)] or free
            columns[role] = _only(role, kind, [name for name in free if name not in empty] or free, recipe, features)
    for split, rows in data.items():
        for role, column in columns.items():
            _check_there(recipe, split, rows, role, column)
            if column not in empty and not roles[role].fits(rows.features[column]):
                numbers = _OF_NUMBERS if role == "label" and _is_float(rows.features[column]) else ""
                raise SurgicalError(
                    f"{recipe.data}: the column {column!r} cannot be the {role} of {recipe.task}: it is "
                    f"{_type(rows.features[column])}, and it takes {roles[role].description}"
                    f"{numbers}. The split {split} has: {_shown(rows.features)}."
                )
    return columns


def without_labels(recipe: Recipe, rows: Any, columns: Mapping[str, str], classes: str | None) -> Any:
    """The rows of the training split without the column of the role `classes`, which they need not have.

    Raises:
        SurgicalError: another column that they do not have.
    """
    others = {role: column for role, column in columns.items() if role != classes}
    for role, column in others.items():
        _check_there(recipe, "train", rows, role, column)
    return rows.select_columns(list(others.values()))


def _check_there(recipe: Recipe, split: str, rows: Any, role: str, column: str) -> None:
    if column not in rows.features:
        raise SurgicalError(
            f"{recipe.data}: the split {split} has no column {column!r} for the {role}: "
            f"{nearest(column, rows.features)}It has: {_shown(rows.features)}."
        )


def _is_identifier(data: Mapping[str, Any], column: str) -> bool:
    """Whether no two of many rows have the same whole number in a column: that of the row, say."""
    rows = next(iter(data.values()))
    cells = cells_of(rows, column).drop_null()
    is_number = isinstance(rows.features[column], Value) and _is_int(rows.features[column])
    return is_number and len(cells.unique()) == len(cells) >= _MANY


def _only(role: str, kind: ColumnType, fitting: list[str], recipe: Recipe, features: Any) -> str:
    # A ClassLabel is a label before any text or number is.
    left = [name for name in fitting if isinstance(features[name], ClassLabel)] or fitting
    if len(left) == 1:
        return left[0]
    which, cure = "none of its columns can be", f"it takes {kind.description}"
    if left:
        which, cure = f"{' and '.join(left)} may each be", f"name it in the recipe, columns: {{{role}: ...}}"
    raise SurgicalError(f"{recipe.data}: {which} the {role} of {recipe.task}: {cure}. It has: {_shown(features)}.")


def _is_int(feature: Any) -> bool:
    return isinstance(feature, Value) and (feature.dtype.startswith(("int", "uint")) or feature.dtype == "bool")


def _is_float(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype.startswith("float")


def _shown(features: Any) -> str:
    return ", ".join(f"{name} ({_type(feature)})" for name, feature in features.items())


def _type(feature: Any) -> str:
    if isinstance(feature, List | LargeList):
        return f"list of {_type(feature.feature)}"
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__
