"""The rows of a data set: its splits, each opened by itself, and its columns, found by type or named in the recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, LargeList, List, Value, load_dataset, load_dataset_builder

from ...errors import SurgicalError
from ...validation import nearest
from ..recipe.recipe import Recipe
from .task import load_or_raise

Fits = Callable[[Any], bool]


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
    files = {str(split): each for split, each in (builder.config.data_files or {}).items()}
    known = list(files or builder.info.splits or splits)
    missing = [split for split in splits if split not in known]
    if missing:
        raise SurgicalError(
            f"{name} has the splits {', '.join(known)}; it needs {', '.join(splits)}. A file of a folder is the "
            "split that its name says, e.g. validation.parquet."
        )
    options: dict[str, Any] = {}
    if builder.name == "imagefolder" and not any("metadata." in str(file) for each in files.values() for file in each):
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


_TAKEN = {
    "image": "images",
    "label": "classes: names, whole numbers or a ClassLabel",
    "text": "texts",
    "target": "texts",
    "tokens": "lists of texts",
    "tags": "lists of classes: names, whole numbers or a ClassLabel",
}


def is_text(feature: Any) -> bool:
    """Whether a column holds texts."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def is_label(feature: Any) -> bool:
    """Whether a column holds one label a row: a class, its name or its number."""
    return isinstance(feature, ClassLabel) or (isinstance(feature, Value) and (is_text(feature) or _is_int(feature)))


def is_list_of(fits: Fits) -> Fits:
    """Whether a column holds a list a row, of what `fits` takes."""
    return lambda feature: isinstance(feature, List | LargeList) and fits(feature.feature)


def find_columns(recipe: Recipe, data: dict[str, Any], roles: dict[str, Fits]) -> dict[str, str]:
    """The column of each role: the one that the recipe names, else the one of that name, else the only one that fits.

    Args:
        recipe: its `columns` are looked at.
        data: the splits; all of them must have the columns.
        roles: for each role, whether a column's type fits.

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
    own = {role: role for role, fits in roles.items() if role in features and fits(features[role])}
    columns = {**own, **{role: str(column) for role, column in recipe.columns.items()}}
    for role, fits in roles.items():
        if role not in columns:
            left = [name for name in features if fits(features[name]) and name not in columns.values()]
            columns[role] = _only(role, left, recipe, features)
    for split, each in data.items():
        for role, column in columns.items():
            if column not in each.features:
                raise SurgicalError(
                    f"{recipe.data}: the split {split} has no column {column!r} for the {role}: "
                    f"{nearest(column, each.features)}It has: {_shown(each.features)}."
                )
            if not roles[role](each.features[column]):
                raise SurgicalError(
                    f"{recipe.data}: the column {column!r} cannot be the {role} of {recipe.task}: it is "
                    f"{_type(each.features[column])}, and {_takes(role)}. The split {split} has: "
                    f"{_shown(each.features)}."
                )
    return columns


def _only(role: str, fitting: list[str], recipe: Recipe, features: Any) -> str:
    # A ClassLabel is a label before any text or number is.
    left = [name for name in fitting if isinstance(features[name], ClassLabel)] or fitting
    if len(left) == 1:
        return left[0]
    which, cure = "none of its columns can be", _takes(role)
    if left:
        which, cure = f"{' and '.join(left)} may each be", f"name it in the recipe, columns: {{{role}: ...}}"
    raise SurgicalError(f"{recipe.data}: {which} the {role} of {recipe.task}: {cure}. It has: {_shown(features)}.")


def _takes(role: str) -> str:
    return f"it takes {_TAKEN[role]}" if role in _TAKEN else "none has a type that fits"


def _is_int(feature: Any) -> bool:
    return isinstance(feature, Value) and (feature.dtype.startswith(("int", "uint")) or feature.dtype == "bool")


def _shown(features: Any) -> str:
    return ", ".join(f"{name} ({_type(feature)})" for name, feature in features.items())


def _type(feature: Any) -> str:
    if isinstance(feature, List | LargeList):
        return f"list of {_type(feature.feature)}"
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__
