"""The splits of a data set: found, named by the recipe, opened, or held out of the training split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_dataset, load_dataset_builder
from huggingface_hub import metadata_load

from ...errors import SurgicalError
from ...validation import nearest
from .summary import listed
from .task import SPLITS, load_or_raise

SHARE = 0.2  # of the training split, held out where there is no validation split
_EVERY = round(1 / SHARE)
FILE_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".parquet": ("parquet", {}),
}
_TABLES = (*FILE_FORMATS.keys() - {".json"},)  # a .json may be some tool's settings


@dataclass(frozen=True)
class DataSource:
    """A file, a folder or a Hub data set whose splits are known and not yet read.

    Attributes:
        name: path or Hub id.
        loaded_as: what `load_dataset` is asked for: the same, or the format of a single file.
        config: name of a configuration, where the data set has several.
        files: for each split its files; empty for a data set of the Hub.
        splits: names of the splits.
        options: further arguments of `load_dataset`.
        features: types of the columns, where the data set says them.
        unlabeled: the split of images that lie in no folder of a class, if there is one.
    """

    name: str
    loaded_as: str
    config: str | None
    files: Mapping[str, Any]
    splits: tuple[str, ...]
    options: Mapping[str, Any]
    features: Any
    unlabeled: str | None = None

    @classmethod
    def find(cls, name: str, config: str | None = None) -> DataSource:
        """Find out which splits a data set has.

        Raises:
            SurgicalError: no such data, or data that `load_dataset` does not read; files of a folder that are in two
                splits, or in none.
        """
        path = Path(name)
        if path.is_file():
            return cls._of_file(path, config)
        for written in ("dataset_dict.json", "dataset_info.json"):
            if (path / written).exists():
                raise SurgicalError(
                    f"{name} was written by save_to_disk: write each split with to_parquet instead, into one folder, "
                    "as train.parquet, validation.parquet and test.parquet."
                )
        script = path / f"{path.resolve().name}.py"
        if script.is_file():
            raise SurgicalError(
                f"{name} holds {script.name}, a loading script, which datasets no longer runs: take it out of the "
                "folder, or save what it makes as Parquet."
            )
        builder = load_or_raise(partial(load_dataset_builder, name=config), name, "data set")
        files = {str(split): paths for split, paths in (builder.config.data_files or {}).items()}
        options: dict[str, Any] = {}
        if builder.name == "imagefolder" and not any(
            "metadata." in str(file) for paths in files.values() for file in paths
        ):
            options["drop_labels"] = False  # else the folders of a split with one class are not taken for classes
        if path.is_dir() and not _is_described(path):
            _check_files(path, files)
        known = tuple(files or builder.info.splits or SPLITS)
        return cls(name, name, config, files if path.exists() else {}, known, options, builder.info.features)

    @classmethod
    def _of_file(cls, path: Path, config: str | None) -> DataSource:
        if (suffix := path.suffix.lower()) not in FILE_FORMATS:
            raise SurgicalError(f"{path} is no data: give a file that ends in {', '.join(FILE_FORMATS)}, or a folder.")
        if config is not None:
            raise SurgicalError(f"data_config={config!r}: {path} is one file, which has none: leave it out.")
        kind, options = FILE_FORMATS[suffix]
        return cls(str(path), kind, None, {"train": [str(path.resolve())]}, ("train",), options, None)

    def with_unlabeled(self, split: str | None) -> DataSource:
        """The same where the images of a split may have no labels: the folder that all lie in is then no class."""
        if split is None or "drop_labels" not in self.options:
            return self
        folders = {name: {Path(str(file)).parent.name for file in files} for name, files in self.files.items()}
        others = [name for name in folders if name != split]
        if not others or len(folders[split]) > 1 or any(folders[split] & folders[name] for name in others):
            return self
        labeled = {name: self.files[name] for name in others}
        build = partial(load_dataset_builder, name=self.config, data_files=labeled, drop_labels=False)
        builder = load_or_raise(build, self.loaded_as, "data set")
        return replace(self, features=builder.info.features, unlabeled=split)

    def open(self, split: str) -> Any:
        """The rows of a split; of a folder only the files of this split are read.

        Raises:
            SurgicalError: they cannot be read, or there are none.
        """
        only = {"data_files": {split: self.files[split]}, "features": self.features} if self.files else {}
        if split == self.unlabeled:
            only |= {"features": None, "drop_labels": True}

        def load(_: str) -> Any:
            return load_dataset(self.loaded_as, self.config, split=split, **{**self.options, **only})

        try:
            rows = load_or_raise(load, self.name, f"split {split} of the data set")
        except SurgicalError as error:
            if "corresponds to no data" not in str(error):  # a file with nothing but the names of its columns
                raise
            rows = ()
        if not len(rows):
            raise SurgicalError(f"{self.name}: the split {split} is empty.")
        return rows


def _is_described(folder: Path) -> bool:
    """Whether the README.md of a folder says which files it is made of."""
    card = folder / "README.md"
    return card.is_file() and "configs" in (metadata_load(card) or {})


def _check_files(folder: Path, files: Mapping[str, Sequence[Any]]) -> None:
    """Refuse a folder where `datasets` takes a file for two splits, or for none: it goes by their names alone."""
    folder = folder.resolve()
    splits = {split: {Path(str(file)).resolve() for file in paths} for split, paths in files.items()}
    counts = Counter(file for paths in splits.values() for file in paths)
    twice = sorted(file for file, count in counts.items() if count > 1)
    if twice:
        both = " and ".join(split for split, paths in splits.items() if twice[0] in paths)
        raise SurgicalError(
            f"{folder}: {_files(len(twice))} both in {both}, such as {_shown(twice[0], folder)}: a folder or file "
            "is in the split that its name says, wherever it lies. Move it out of the other folder, or rename it."
        )
    used = {file.suffix for file in counts}
    if used & {*_TABLES}:
        used |= {*_TABLES}
    left = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in used and path.resolve() not in counts and not _is_hidden(path.relative_to(folder))
    )
    if left and counts:
        raise SurgicalError(
            f"{folder}: {_files(len(left))} in no split, such as {_shown(left[0], folder)}; "
            + "; ".join(f"{split} has {_shown(min(paths), folder)}" for split, paths in splits.items() if paths)
            + ". Name files or folders after their splits, or none of them, and keep one format in a folder."
        )


def _files(count: int) -> str:
    return "1 file is" if count == 1 else f"{count:,} files are"


def _shown(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def assign_splits(source: DataSource, given: Mapping[str, str | None]) -> dict[str, str | None]:
    """Which split of the data is which of a recipe's; None where there is none.

    Args:
        source: the data.
        given: the recipe's `splits`. A split that is named there is not used under its own name as well; None is for
            no split.

    Raises:
        SurgicalError: a split that there is not, or one that is given twice.

    Example:
        >>> assign_splits(DataSource.find("folder"), {"validation": "test"})
        {'train': 'train', 'validation': 'test', 'test': None}
    """
    for role, split in given.items():
        if role not in SPLITS:
            raise SurgicalError(
                f"splits={dict(given)}: {role!r} is none of {', '.join(SPLITS)}: {nearest(str(role), SPLITS)}"
                "Write what a split is to be before its name in the data, such as {validation: test}."
            )
        if split is not None and split not in source.splits:
            raise SurgicalError(
                f"splits={dict(given)}: {source.name} has no split {split!r}: {nearest(str(split), source.splits)}"
                f"It has: {', '.join(source.splits)}."
            )
    used = [split for split in given.values() if split is not None]
    if len(set(used)) != len(used):
        raise SurgicalError(
            f"splits={dict(given)}: a split has two uses; what is chosen on a split cannot be measured on it: give "
            "each its own."
        )
    names: dict[str, str | None] = {}
    for role in SPLITS:
        free = role in source.splits and role not in given.values()
        names[role] = given.get(role, role if free else None)
    return names


def unused_splits(source: DataSource, names: Mapping[str, str | None]) -> str | None:
    """A line on splits that nothing is done with, or None."""
    left = [split for split in source.splits if split not in names.values()]
    if not left:
        return None
    return f"splits that are not used: {listed(left)}; splits: {{validation: {left[0]}}} uses one"


def held_out(labels: np.ndarray, seed: int) -> np.ndarray:
    """Which of some rows are held out for validation: one in five, each class in proportion.

    The only row of a class is never held out.

    Args:
        labels: a number for the class of each row.
        seed: says which rows.

    Returns:
        A boolean for each row; none is true where there are too few.

    Example:
        >>> held_out(np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1]), seed=0).sum()
        2
    """
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    shuffled = np.random.default_rng(seed).permutation(len(codes))
    ordered = shuffled[np.argsort(codes[shuffled], kind="stable")]
    ordered = ordered[counts[codes[ordered]] > 1]
    is_held_out = np.zeros(len(codes), dtype=bool)
    is_held_out[ordered[_EVERY // 2 :: _EVERY]] = True
    return is_held_out
