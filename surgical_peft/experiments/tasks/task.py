"""The interface of a task: a model to load, data to tune it on, and how to measure it.

A task is a function `(recipe, splits) -> Task`. It opens only these splits, refuses what does not fit before anything
is trained, and gives the same examples for the same recipe every time. With the decorator `with_info` it says more
about itself. One of the user's own goes into a recipe as `task: package.module:name`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol, TypeVar

from numpy.random import Generator
from torch import Tensor, nn

from ...errors import SurgicalError, reason_of
from ..recipe.code import ALLOW
from ..recipe.recipe import Recipe
from .summary import DataSummary

SPLITS = ("train", "validation", "test")


class Examples(Protocol):
    """Examples as a model takes them; a list of them will do."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Task:
    """A model to load, data to tune it on, and how to measure it.

    Attributes:
        load_model: gives the source model, freshly loaded.
        splits: the splits that were asked for, without `test` where the data have none; examples as the model takes
            them, with `labels`. The same index gives the same example every time.
        collate: makes a batch of examples.
        metric: the name of what `measure` gives; larger is better.
        measure: that metric of a model on examples. It works in eval mode, on the model's device and in batches of a
            fixed size, and leaves the model in the mode that it had.
        names_labels: whether the labels that the model's config names are what it predicts; a card lists them.
        processor: the tokenizer or image processor that made the examples; it is saved beside the adapter.
        summary: what was understood of the data.
    """

    load_model: Callable[[], nn.Module]
    splits: dict[str, Examples]
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    metric: str
    measure: Callable[[nn.Module, Examples], float]
    names_labels: bool = False
    processor: Any = None
    summary: DataSummary = field(default_factory=DataSummary)


DATA_KEYS = (
    *("unlabelled", "corruption", "label_map", "imbalance", "new_head", "problem_type", "class_weights"),
    *("character_noise", "casing", "max_length", "max_new_tokens"),
)
F = TypeVar("F", bound=Callable[..., Task])


@dataclass(frozen=True)
class TinyTask:
    """A small random model and generated data of a task, for `--tiny`.

    Attributes:
        auto: the Auto class of transformers that makes the model of a config.
        features: for each role of a column the type of `datasets`, made of the names of the classes.
        row: makes a row of its place, randomness and the names of the classes.
        save_reader: saves the tokenizer or image processor for a config to a folder.
        classes: names of the classes of a recipe's data; none where there are no classes.
        config: keys of the config that follow from the data.
        roles: which of the roles of columns the data of a recipe have, where that depends on it; default is all.
    """

    auto: Any
    features: Mapping[str, Callable[[list[str]], Any]]
    row: Callable[[int, Generator, list[str]], dict[str, Any]]
    save_reader: Callable[[Any, Path], None]
    classes: Callable[[Recipe], list[str]] = lambda recipe: []
    config: Mapping[str, Any] = field(default_factory=dict)
    roles: Callable[[Recipe], Collection[str]] | None = None


@dataclass(frozen=True)
class TaskInfo:
    """Facts about a task that are known before there is a model or data.

    Attributes:
        keys: which of `DATA_KEYS` it reads; the others are refused. None: it checks them itself.
        pipeline: the Hub's name for such models, for a model card.
        tiny: makes a model and data for `--tiny`.
    """

    keys: tuple[str, ...] | None = None
    pipeline: str | None = None
    tiny: TinyTask | None = None


def with_info(
    *, keys: Sequence[str] | None = None, pipeline: str | None = None, tiny: TinyTask | None = None
) -> Callable[[F], F]:
    """Marks a task with the facts of `TaskInfo`; a plain function is a task, too.

    Example:
        >>> @with_info(keys=["new_head"], pipeline="audio-classification")
        ... def audio_classification(recipe, splits):
        ...     return Task(...)
    """

    def mark(function: F) -> F:
        function.info = TaskInfo(None if keys is None else tuple(keys), pipeline, tiny)  # type: ignore[attr-defined]
        return function

    return mark


def info_of(function: Callable[..., Task]) -> TaskInfo:
    """The facts that a task was marked with by `with_info`."""
    return getattr(function, "info", TaskInfo())


def check_keys(recipe: Recipe, known: Sequence[str]) -> None:
    """Refuse a key of the recipe that is for other tasks, or a seed that no shift takes.

    Raises:
        SurgicalError: one of them is given.
    """
    if recipe.shift_seed < 0:
        raise SurgicalError(f"shift_seed={recipe.shift_seed} is below 0.")
    for key in DATA_KEYS:
        if key not in known and getattr(recipe, key) not in (None, False, {}):
            raise SurgicalError(
                f"{key}={getattr(recipe, key)!r} is not for {recipe.task}, which knows: {', '.join(known) or 'none'}."
            )


def check_folder(name: str, kind: str, recipe: Path | None = None) -> None:
    """Refuse a path where nothing is, with what the header of the recipe in a file says it needs.

    Raises:
        SurgicalError: there is nothing.
    """
    if not name.startswith((".", "/")) or Path(name).exists():
        return
    needs = ""
    if recipe is not None and recipe.is_file():
        lines = takewhile(lambda line: line.startswith("#"), recipe.read_text(encoding="utf-8").splitlines())
        sentences = re.split(r"\n{2,}|(?<=\.)\s+", "\n".join(line.strip("# ") for line in lines))
        needs = "".join(f": {' '.join(text.split())}" for text in sentences if text.startswith("Needs "))
    raise SurgicalError(
        f"the {kind} {name!r} cannot be loaded: there is no folder {Path(name).resolve()}. A recipe names "
        f"folders relative to itself, and its header says what makes them{needs or '.'}"
    )


def load_or_raise(load: Callable[..., Any], name: str, kind: str, **kwargs: Any) -> Any:
    """`load(name)`; what transformers or datasets cannot load, a `kind` of thing, is a `SurgicalError`."""
    check_folder(name, kind)
    try:
        return load(name, **kwargs)
    except (SurgicalError, MemoryError):
        raise
    except Exception as error:  # whatever transformers and datasets run into, StopIteration of an empty file included
        is_missing = isinstance(error, OSError) and not Path(name).exists()
        missing = "it is neither a folder here nor to be had from the Hub now: " if is_missing else ""
        raise SurgicalError(f"the {kind} {name!r} cannot be loaded: {missing}{_reason(error)}") from error


def load_pretrained(load: Callable[..., Any], recipe: Recipe, kind: str, **kwargs: Any) -> Any:
    """`load_or_raise` for what transformers loads of a recipe's model: code beside it runs if the recipe allows it.

    Else it is not even asked about: at a prompt, which is what transformers does otherwise, a script answers yes.
    """
    try:
        return load_or_raise(load, recipe.model, kind, trust_remote_code=recipe.allow_code, **kwargs)
    except SurgicalError as error:
        if recipe.allow_code or "custom code" not in str(error):
            raise
        raise SurgicalError(f"{error} Or {ALLOW}.") from error


def _reason(error: BaseException) -> str:
    """The first line that says something: datasets only says that there was an error, and hangs the cause on it."""
    lines = [line.strip() for line in str(error).splitlines() if not line.startswith("An error occurred while gen")]
    message = list(filter(None, lines))
    if not message:
        return _reason(error.__cause__) if error.__cause__ is not None else reason_of(error)
    if message[0].startswith("Config name"):
        return f"{' '.join(message[:2])}: write data_config into the recipe"
    return " ".join(message) if message[0].endswith(":") else message[0]  # a list follows a colon
