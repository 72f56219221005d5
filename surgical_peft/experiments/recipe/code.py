"""The code that a recipe brings, in names to import and in the script of a metric: whether it may run, and what then.

A recipe is text until something runs: `load_recipe` imports nothing that the file names. Code runs unasked only of a
recipe that is the user's own, a file below the working directory that was not fetched from the Hub, or made in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub import constants

from ...errors import SurgicalError
from ...validation import is_reference, nearest, resolve
from ..metrics import SHIPPED

_KEYS = ("task", "criterion", "procedure", "policy", "methods", "metric", "test_metrics")  # each with its `_options`
_WITH_OPTIONS = ("criterion", "procedure", "policy")
_PUSHING = ("push_to_hub", "hub_", "trackio_")  # how keys begin by which results go out
_FETCHED = Path(".cache", "huggingface", "download")  # where `hf download --local-dir` notes what it has fetched
_REPOSITORIES = ("models--", "datasets--", "spaces--")  # how the folders of a Hub's cache are called
_STAYS_HERE: tuple[Any, ...] = (None, "none", "tensorboard", [], ["none"], ["tensorboard"])
ALLOW = "look at what it does, and then allow it: --allow-code, or allow_code=True in Python"


@dataclass(frozen=True)
class Code:
    """Code that a recipe brings.

    Attributes:
        key: of the recipe.
        name: as `package.module:name`; of a metric its folder, or its name on the Hub.
        is_fetched: whether running it means to fetch it from the Hub first.
    """

    key: str
    name: str
    is_fetched: bool = False

    def __str__(self) -> str:
        return f"{self.name.partition(':')[0]} ({self.key})"


def code_of(recipe: Any, *keys: str) -> list[Code]:
    """The code that some keys of a recipe bring; default all.

    Example:
        >>> code_of(Recipe(model="m", data="d", policy="mine.rates:warm"))
        [Code(key='policy', name='mine.rates:warm', is_fetched=False)]
    """
    codes: list[Code] = []
    for key in keys or _KEYS:
        if key in ("metric", "test_metrics"):
            metrics = recipe.test_metrics if key == "test_metrics" else [recipe.metric or ""]
            folders = dict.fromkeys(metric.partition(":")[0] for metric in metrics)
            codes += [Code(key, name, not Path(name).exists()) for name in folders if name and name not in SHIPPED]
            continue
        values = getattr(recipe, key), getattr(recipe, f"{key}_options", None)
        codes += [Code(key, name) for name in dict.fromkeys(_references(values))]
    return codes


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, str) and is_reference(value):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _references(pair)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _references(part)


def check_code(recipe: Any, *keys: str) -> None:
    """Make sure that the code which some keys of a recipe bring may run; default all.

    Raises:
        SurgicalError: it is another's, and nobody has allowed it.
    """
    if recipe.allow_code:
        return
    for code in code_of(recipe, *keys):
        if code.is_fetched:
            raise SurgicalError(
                f"metric {code.name!r} is unknown: {nearest(code.name, SHIPPED)}{', '.join(SHIPPED)} ship with us. "
                f"One of the Hub is code that is fetched and run: {ALLOW}."
            )
        if _is_from_file(recipe, code.key) and not (recipe.path and is_own(recipe.path)):
            where = f"{recipe.path} is not below the working directory, or was fetched" if recipe.path else "a recipe"
            raise SurgicalError(f"{where}, and brings code with its {code.key}, {code.name!r}: {ALLOW}.")


def check_writes(recipe: Any, output: Any = None) -> None:
    """Make sure that a recipe from elsewhere pushes nothing, and writes where it lies or below the working directory.

    Args:
        recipe: to check.
        output: the folder for the results, where it is not the recipe that says so.

    Raises:
        SurgicalError: it would.
    """
    if recipe.path is None or is_own(recipe.path):
        return
    folder = recipe.training.get("output_dir") if _is_from_file(recipe, "output_dir") else None
    rooms = recipe.path.resolve().parent, Path.cwd().resolve()
    if folder and not output and not any(map(Path(str(folder)).resolve().is_relative_to, rooms)):
        raise SurgicalError(
            f"{recipe.path} is not below the working directory, or was fetched, and would write to {str(folder)!r}, "
            "which is neither: give another folder, --output, or copy the recipe here and look at it."
        )
    for key, value in recipe.training.items():
        goes_out = (value and key.startswith(_PUSHING)) or (key == "report_to" and value not in _STAYS_HERE)
        if goes_out and _is_from_file(recipe, key):
            raise SurgicalError(
                f"{recipe.path} is not below the working directory, or was fetched, and would publish what is trained "
                f"({key}): take that out, or copy the recipe here and look at it."
            )


def _is_from_file(recipe: Any, key: str) -> bool:
    """True unless the value was put in its place later: it was given on the command line, or in Python."""
    both = (name for name in (key, f"{key}_options") if name in recipe.given)
    return any(recipe.given[name][1] == getattr(recipe, name, recipe.training.get(name)) for name in both)


def is_own(path: Path) -> bool:
    """True for a file below the working directory, wherever links lead, that was not fetched from the Hub."""
    file, here = path.resolve(), Path.cwd().resolve()
    caches = (Path(cache).resolve() for cache in (constants.HF_HOME, constants.HF_HUB_CACHE))
    if not file.is_relative_to(here) or any(map(file.is_relative_to, caches)):
        return False
    if any(part.startswith(_REPOSITORIES) for part in file.parts):  # of a cache that lies elsewhere
        return False
    return not any((parent / _FETCHED / f"{file.relative_to(parent)}.metadata").exists() for parent in file.parents)


def resolve_key(recipe: Any, key: str, package: ModuleType) -> Callable[..., Any]:
    """The function that a key of a recipe names; its module is imported, if the recipe may do that.

    Raises:
        SurgicalError: as `check_code` and `resolve`.
    """
    check_code(recipe, key)
    return resolve(getattr(recipe, key), package)


def told(recipe: Any) -> list[str]:
    """A line on the code that a recipe brings; none if it brings none.

    Raises:
        SurgicalError: it may not run, see `check_code`.
    """
    check_code(recipe)
    named = ", ".join(dict.fromkeys(map(str, code_of(recipe))))
    return [f"The recipe brings code, which is imported and run: {named}."] if named else []


def for_dry_run(recipe: Any) -> tuple[Any, list[str]]:
    """As `without_code`, where a recipe without its task tells nothing.

    Raises:
        SurgicalError: the task is code.
    """
    for code in code_of(recipe, "task"):
        raise SurgicalError(
            f"--dry-run imports nothing that a file names, and without the task {code.name!r} no model or data can be "
            "loaded: its cost is not known before it runs."
        )
    stripped, notes = without_code(recipe)
    if recipe.methods and not stripped.methods:
        raise SurgicalError(
            "--dry-run imports nothing that a file names, and all methods are code: the cost of the comparison is not "
            "known before it runs."
        )
    return stripped, notes


def without_code(recipe: Any) -> tuple[Any, list[str]]:
    """A recipe without the code that it brings, but for its task; and what is then not known of it, in lines."""
    changes: dict[str, Any] = {"allow_code": False}
    notes = []
    for code in code_of(recipe):
        lost = _LOST.get(code.key)
        if lost is None:
            continue
        notes.append(f"Not imported: {code.key} {code.name}. {lost}")
        changes[code.key] = "sweep" if code.key == "procedure" else None
        if code.key == "test_metrics":
            changes[code.key] = {
                metric: count for metric, count in recipe.test_metrics.items() if metric.partition(":")[0] in SHIPPED
            }
        if code.key in _WITH_OPTIONS:
            changes[f"{code.key}_options"] = {}
    if "methods" in changes:
        changes["methods"] = [method for method in recipe.methods or [] if not list(_references(method))]
    return replace(recipe, **changes), notes


_LOST = {
    "criterion": "What it costs to choose blocks by it is not known.",
    "procedure": "How many trainings it takes is not known: sweep is told in its place.",
    "policy": "Whether it fits, and what it costs in training, is not known.",
    "methods": "Such methods are not counted.",
    **dict.fromkeys(("metric", "test_metrics"), "What it costs to measure is not known."),
}
