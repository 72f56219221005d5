"""Loads a recipe from YAML, checks it, and finds the folders and files that it names beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from transformers import TrainingArguments

from ...errors import SurgicalError
from ...typed_json import JsonReader, is_plain
from ...validation import check_count, check_number, nearest
from ..metrics import SHIPPED
from .code import without_code
from .recipe import NOT_KEYS, Recipe
from .training_arguments import check_training
from .yaml_file import read_yaml

_TYPES = {f.name: get_type_hints(Recipe)[f.name] for f in fields(Recipe) if f.name not in NOT_KEYS}
_TRAINING = {f.name: get_type_hints(TrainingArguments)[f.name] for f in fields(TrainingArguments) if f.init}
_REFUSED = {
    "hub_token": "it is a secret, and what a recipe says stands in reports and cards; log in with `hf auth login`",
    "resume_from_checkpoint": "a training that was interrupted goes on by itself when it is run again",
}
RENAMED: dict[str, str] = {}  # a key of an earlier version, and what it is called now
_MANY = 2**31 - 1
_RANGES = {
    "severity": (1, 5),
    **dict.fromkeys(("character_noise", "casing"), (0, 100)),
    "shift_seed": (0, 2**32 - 1),
    **dict.fromkeys(
        ("max_length", "max_new_tokens", "num_blocks", "num_batches", "early_stopping_patience", "rate_seeds"),
        (1, _MANY),
    ),
    **dict.fromkeys(("folds", "copies"), (2, _MANY)),
}
_LISTS = {
    "rates": "[1e-3, 3e-3]",
    "seeds": "[0, 1, 2]",
    "divide": "[attention, mlp]",
    "methods": "[full, head]",
    "sources": "[other-model]",
    "draws": "[target-0, target-1]",
    "test_data": "[target-0, target-1]",
}
_LONGEST = 4096  # characters of one text
_FOLDERS = ("model", "data", "sources", "draws", "test_data", "source_data")


def load_recipe(path: str | Path, *, allow_code: bool = False) -> Recipe:
    """Read and check a recipe; folders named in it are looked up beside the file. Nothing that it names is imported.

    Args:
        path: of the file.
        allow_code: see `Recipe`; a file below the working directory that was not fetched brings its code without.

    Raises:
        SurgicalError: no such file, not YAML, an unknown, duplicate, renamed or missing key, or a value of the wrong
            type; blocks, policy, training arguments or search that cannot be.

    Example:
        >>> load_recipe("recipes/noise.yaml").corruption
        'gaussian_noise'
    """
    return recipe_of(read_yaml(Path(path)), Path(path), allow_code=allow_code)


def recipe_of(keys: Mapping[Any, Any], path: Path | None = None, *, allow_code: bool = False) -> Recipe:
    """The recipe with these keys, such as the `recipe` of a report.

    Args:
        keys: as a file has them.
        path: of the file; folders are looked up beside it, by default in the current one.
        allow_code: as for `load_recipe`; without a path, any code needs it.

    Raises:
        SurgicalError: as `load_recipe`.

    Example:
        >>> recipe_of({"model": "vit", "data": "target-0", "learning_rate": 1e-3}).training
        {'learning_rate': 0.001}
    """
    written, name = dict(keys), str(path or "recipe")
    for key, value in written.items():
        _check_plain(key, value, name)
        _check_key(key, value, name)
    missing = {"model", "data"} - written.keys()
    if missing:
        raise SurgicalError(f"{name}: the key {' and '.join(sorted(missing))} is missing.")
    read = find_folders(path or Path(name), written)
    training = {key: value for key, value in read.items() if key not in _TYPES}
    own = {key: value for key, value in read.items() if key in _TYPES}
    given = {key: (written[key], read[key]) for key in written}
    file = path and path.absolute()  # found again wherever the user goes next
    recipe = Recipe(**own, training=training, given=given, path=file, allow_code=allow_code)
    # What is wrong with blocks, policy or arguments is said now, not after the data are loaded; of code when it runs.
    check_training(recipe.training, recipe.arguments())
    without_code(recipe)[0].check()
    _check_search(recipe)
    return recipe


def _check_key(key: Any, value: Any, path: str) -> None:
    known = {**_TYPES, **_TRAINING}
    if key in RENAMED:
        raise SurgicalError(f"{path}: the key {key!r} is now called {RENAMED[key]!r}: rename it.")
    if key not in known:
        raise SurgicalError(
            f"{path}: unknown key {key!r}: {nearest(str(key), known)}Own keys: {', '.join(sorted(_TYPES))}; all "
            "others are those of transformers.TrainingArguments."
        )
    if key in _REFUSED:
        raise SurgicalError(f"{path}: {key} is not for recipes: {_REFUSED[key]}.")
    if key in _TYPES or is_plain(known[key]):
        JsonReader(path, "docs/recipes.md has all keys").read(known[key], value, key)
    if key in _RANGES and value is not None:
        least, most = _RANGES[key]
        check_number(path, key, value, at_least=least, at_most=most)


def _check_plain(key: str, value: Any, path: str) -> None:
    """Refuse numbers that are none, and text that no name or path can be, wherever they stand in a value."""
    if isinstance(value, list | dict):
        for part in [*value, *(value.values() if isinstance(value, dict) else ())]:
            _check_plain(key, part, path)
    elif isinstance(value, float) and not math.isfinite(value):
        raise SurgicalError(f"{path}: {key}: {value!r} is not a finite number.")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise SurgicalError(f"{path}: {key}: a whole number of {value.bit_length()} bits is too large: 63 at most.")
    elif isinstance(value, str) and (
        len(value) > _LONGEST or "\0" in value or (key in _FOLDERS and not _is_name(value))
    ):
        raise SurgicalError(
            f"{path}: {key}: {value[:60]!r} is too long for a name, or holds characters that cannot be in one."
        )


def _is_name(text: str) -> bool:
    return text.isprintable() and len(text) <= _LONGEST and all(len(part.encode()) <= 255 for part in text.split("/"))


def _check_search(recipe: Recipe) -> None:
    for key, example in _LISTS.items():
        values = getattr(recipe, key)
        if values == []:
            raise SurgicalError(f"{key}: {values!r} is empty; give one entry or more, such as {example}.")
    for rate in recipe.rates or ():
        check_number("a recipe", "rates", rate, "learning rates such as 1e-3, each a finite number", above=0)
    for seed in recipe.seeds or ():
        check_count("a recipe", "seeds", seed, "each", at_least=0, at_most=2**32 - 1)
    for key in ("rates", "seeds"):
        if len(set(getattr(recipe, key) or ())) != len(getattr(recipe, key) or ()):
            raise SurgicalError(f"{key}: {getattr(recipe, key)} has an entry twice: name it once.")
    if recipe.folds is not None and recipe.seeds is not None:
        raise SurgicalError("seeds and folds are both given: a search takes the mean over one of them.")
    for metric, count in recipe.test_metrics.items():
        if count is not None:
            check_count("a recipe", f"test_metrics: {metric}", count, "examples of the test split")
    if recipe.pruner_options and recipe.pruner is None:
        raise SurgicalError(f"pruner_options={recipe.pruner_options} need a pruner that they are for.")


def find_folders(path: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """The keys of the recipe in the file `path`, with paths for the names of what lies beside it.

    That is models and data, a metric's folder, and the results of searches among the methods.

    Example:
        >>> find_folders(Path("recipes/noise.yaml"), {"model": "fashion_mnist/vit"})
        {'model': '/home/me/recipes/fashion_mnist/vit'}
    """
    paths = {key: _beside(path, value) if key in _FOLDERS else value for key, value in keys.items()}
    if isinstance(metric := keys.get("metric"), str):
        paths["metric"] = _metric_beside(path, metric)
    if isinstance(counts := keys.get("test_metrics"), dict):
        paths["test_metrics"] = {_metric_beside(path, metric): count for metric, count in counts.items()}
    if isinstance(methods := keys.get("methods"), list):
        paths["methods"] = [_with_result(path, method) for method in methods]
    return paths


def _beside(path: Path, name: Any) -> Any:
    """The path of what lies beside the file `path` under that name, or the name: it may be one of the Hub.

    Of a list each entry; of a mapping its entry `data`. What begins with a dot is no name on the Hub.
    """
    if isinstance(name, list):
        return [_beside(path, entry) for entry in name]
    if isinstance(name, dict):
        return {key: _beside(path, value) if key == "data" else value for key, value in name.items()}
    neighbor = path.parent / str(name)
    is_local = isinstance(name, str) and (neighbor.exists() or name.startswith("."))
    return str(neighbor.resolve()) if is_local else name


def _metric_beside(path: Path, name: str) -> str:
    folder, colon, number = name.partition(":")
    return name if folder in SHIPPED else f"{_beside(path, folder)}{colon}{number}"


def _with_result(path: Path, method: Any) -> Any:
    options = method.get("searched") if isinstance(method, dict) else None
    if not isinstance(options, dict) or not isinstance(result := options.get("result"), str):
        return method
    return {**method, "searched": {**options, "result": str((path.parent / result).resolve())}}
