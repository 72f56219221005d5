"""The rows of a data set: its splits, each opened by itself, and its columns, found by type or named in the recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, LargeList, List, Value, load_dataset, load_dataset_builder

from ...errors import SurgicalError
from ...validation import nearest
from ..recipe.recipe import Recipe
from .task import load_or_raise


def open_splits(name: str, splits: Sequence[str]) -> dict[str, Any]:
    """The asked-for splits of a local folder or a Hub data set.

    Of a local folder only the files of these splits are opened. A Hub data set is fetched whole.

    Raises:
        SurgicalError: no such data, a split that is missing or empty.
    """
    if (Path(name) / "dataset_dict.json").exists() or (Path(name) / "dataset_info.json").exists():
        raise SurgicalError(
            f"{name} was written by save_to_disk: write each split with to_parquet instead, into one folder, as "
            "train.parquet, validation.parquet and test.parquet."
        )
    if Path(name).is_file():
        raise SurgicalError(
            f"{name} is one file: give a folder with a file for each split, such as train.csv and validation.csv."
        )
    builder = load_or_raise(load_dataset_builder, name, "data set")
    files = {str(split): paths for split, paths in (builder.config.data_files or {}).items()}
    known = list(files or builder.info.splits or splits)
    missing = [split for split in splits if split not in known]
    if missing:
        raise SurgicalError(
            f"{name} has the splits {', '.join(known)}; it needs {', '.join(splits)}. A file of a folder is the "
            "split that its name says, e.g. validation.parquet."
        )
    options: dict[str, Any] = {}
    if builder.name == "imagefolder" and not any(
        "metadata." in str(file) for paths in files.values() for file in paths
    ):
        options["drop_labels"] = False  # else the folders of a split with one class are not taken for classes
    opened = {}
    for split in splits:
        only = {"data_files": {split: files[split]}, "features": builder.info.features} if Path(name).exists() else {}
        opened[split] = load_or_raise(
            load_dataset, name, f"split {split} of the data set", split=split, **only, **options
        )
        if not len(opened[split]):
            raise SurgicalError(f"{name}: the split {split} is empty.")
    return opened


@dataclass(frozen=True)
class ColumnType:
    """The type of a column.

    Attributes:
        description: of what it holds, in the plural.
        fits: whether a feature of `datasets` is of it.
    """

    description: str
    fits: Callable[[Any], bool]


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _is_label(feature: Any) -> bool:
    return isinstance(feature, ClassLabel) or (isinstance(feature, Value) and (_is_text(feature) or _is_int(feature)))


TEXT = ColumnType("texts", _is_text)
LABEL = ColumnType("classes: names, whole numbers or a ClassLabel", _is_label)


def list_of(kind: ColumnType) -> ColumnType:
    """A list of `kind` in each row."""
    return ColumnType(
        f"lists of {kind.description}",
        lambda feature: isinstance(feature, List | LargeList) and kind.fits(feature.feature),
    )


def find_columns(recipe: Recipe, data: dict[str, Any], roles: dict[str, ColumnType]) -> dict[str, str]:
    """The column of each role: the one that the recipe names, else the one of that name, else the only one that fits.

    Args:
        recipe: its `columns` are looked at.
        data: the splits; all of them must have the columns.
        roles: for each role the type of its column.

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
    namesakes = {role: role for role, kind in roles.items() if role in features and kind.fits(features[role])}
    columns = {**namesakes, **{role: str(column) for role, column in recipe.columns.items()}}
    for role, kind in roles.items():
        if role not in columns:
            fitting = [name for name in features if kind.fits(features[name]) and name not in columns.values()]
            columns[role] = _only(role, kind, fitting, recipe, features)
    for split, rows in data.items():
        for role, column in columns.items():
            if column not in rows.features:
                raise SurgicalError(
                    f"{recipe.data}: the split {split} has no column {column!r} for the {role}: "
                    f"{nearest(column, rows.features)}It has: {_shown(rows.features)}."
                )
            if not roles[role].fits(rows.features[column]):
                raise SurgicalError(
                    f"{recipe.data}: the column {column!r} cannot be the {role} of {recipe.task}: it is "
                    f"{_type(rows.features[column])}, and it takes {roles[role].description}. The split {split} has: "
                    f"{_shown(rows.features)}."
                )
    return columns


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


def _shown(features: Any) -> str:
    return ", ".join(f"{name} ({_type(feature)})" for name, feature in features.items())


def _type(feature: Any) -> str:
    if isinstance(feature, List | LargeList):
        return f"list of {_type(feature.feature)}"
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__
