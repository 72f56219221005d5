"""`--tiny`: a recipe whose model and data lie on the Hub, tried out without either.

The model is made from a config, with random weights; the data are made up, with the columns that the recipe names.
All else is the recipe's own: task, blocks, policy, and the code that reads, trains and saves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from ...atomic_files import check_replaceable, whole_folder
from ...errors import SurgicalError, reason_of
from ...policies.stages import Stages
from ...validation import nearest
from .. import tasks
from ..recipe.recipe import Recipe
from ..tasks.targets import target_of
from ..tasks.task import SPLITS, TinyTask

STEPS = 2
BATCHES = 4  # of the training split; a criterion judges on some what it trained on others
MEASURED = 12  # rows of each other split
NOTICE = (
    "Tiny: random weights and generated data, a few steps. It shows that the recipe runs; its numbers mean nothing."
)
_EXAMPLE = "tiny: {model_type: bert, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}"
_MODEL, _DATA = "tiny-random-model", "tiny-generated-data"  # as a card of such a training calls them


def make_tiny(recipe: Recipe, output: str | Path | None = None) -> Recipe:
    """The recipe with a small random model and generated data, for two steps, or as many as its stages need.

    Args:
        recipe: its `tiny` says what model: `model_type` and sizes, as the config of transformers has them. With as
            many layers as the real model it has the same blocks. Generated data stand for its `source_data`, too.
        output: folder for the results; default is the recipe's. Model, data and results go to `tiny/` in it, so that
            no result of the real recipe is replaced.

    Raises:
        SurgicalError: the recipe says no model, one that there is not or that is not for its task, or has a task of
            the user's own; or something else lies where the results go.

    Example:
        >>> train(make_tiny(load_recipe("recipes/hub/vit_base_beans.yaml")))["after"].keys()
        dict_keys(['validation', 'test'])
    """
    recipe.check_run(output)
    if not recipe.tiny:
        raise SurgicalError(f"the recipe has no tiny model: write the config of one into it, such as {_EXAMPLE}.")
    kind = tasks.info_of(tasks.task_of(recipe)).tiny
    if kind is None:
        raise SurgicalError(
            f"tiny: the task {recipe.task!r} has no generated data: give it some, see TinyTask, or take one of "
            f"{', '.join(tasks.__all__)}."
        )
    folder = Path(str(output if output is not None else recipe.arguments().output_dir)) / "tiny"
    model_folder, data_folder = folder / _MODEL, folder / _DATA
    check_replaceable(model_folder, "config.json")
    check_replaceable(data_folder, "train.parquet")
    classes = kind.classes(recipe)
    config = _config(recipe, kind, classes)
    with whole_folder(model_folder, "config.json") as temporary:
        _write_model(temporary, kind, config, recipe)
    with whole_folder(data_folder, "train.parquet") as temporary:
        _write_data(temporary, kind, recipe, classes)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (recipe.max_length, positions) if limit is not None]
    policy = recipe.make_policy()
    epochs, steps = policy.last_turn() if isinstance(policy, Stages) else (0, 0)
    enough = max(STEPS, epochs * BATCHES + 1, steps + 1)
    quiet = {"push_to_hub": False, "report_to": "none", "save_strategy": "no"}
    return replace(
        recipe,
        model=str(model_folder.resolve()),
        data=str(data_folder.resolve()),
        data_config=None,
        splits={},
        max_length=None if recipe.max_length is None else min(limits),
        sources=None,
        draws=None,
        test_data=None,
        source_data=None if recipe.source_data is None else {"data": str(data_folder.resolve())},
        training={
            **recipe.training,
            **quiet,
            "max_steps": enough,
            "output_dir": str(folder),
        },
    )


def _config(recipe: Recipe, kind: TinyTask, classes: list[str]) -> Any:
    given = dict(recipe.tiny)
    model_type = given.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise SurgicalError(
            f"tiny={recipe.tiny}: the model_type {model_type!r} is unknown to transformers: "
            f"{nearest(str(model_type), CONFIG_MAPPING)}Write it as in {_EXAMPLE}."
        )
    known = {*CONFIG_MAPPING[model_type]().to_dict(), *CONFIG_MAPPING[model_type].attribute_map}
    fixed = dict(kind.config)
    if target_of(recipe).classes is None:
        fixed["num_labels"] = 1
    elif classes:
        fixed["id2label"] = dict(enumerate(_labels(recipe, classes)))
    for key in given:
        if key in fixed:
            raise SurgicalError(f"tiny={recipe.tiny}: {key} follows from the generated data: leave it out.")
        if key not in known:
            raise SurgicalError(
                f"tiny={recipe.tiny}: the config of {model_type} has no {key!r}: {nearest(str(key), known)}It has: "
                f"{', '.join(sorted(known))}."
            )
    try:
        return CONFIG_MAPPING[model_type](**given, **fixed)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise SurgicalError(f"tiny={recipe.tiny}: transformers does not take it: {error}") from error


def _labels(recipe: Recipe, classes: list[str]) -> list[str]:
    """Names for the labels of the model: those of the classes, and more where the recipe's `label_map` goes on."""
    label_map = recipe.label_map
    given = label_map.values() if isinstance(label_map, Mapping) else label_map or []
    count = max([len(classes), *(number + 1 for number in given if isinstance(number, int))])
    return classes + [f"label {number}" for number in range(len(classes), count)]


def _write_model(folder: Path, kind: TinyTask, config: Any, recipe: Recipe) -> None:
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = kind.auto.from_config(config)
    except (ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise SurgicalError(
            f"tiny={recipe.tiny}: no model for {recipe.task} can be made of it: {reason_of(error)}"
        ) from error
    model.save_pretrained(folder)
    kind.save_reader(config, folder)


def _write_data(folder: Path, kind: TinyTask, recipe: Recipe, classes: list[str]) -> None:
    roles = kind.features if kind.roles is None else kind.roles(recipe)
    types = {role: make for role, make in kind.features.items() if role in roles}
    in_label: Callable[[Any], Any] | None = None
    if recipe.problem_type is not None:
        types["label"], in_label = target_of(recipe).tiny
    features = Features({str(recipe.columns.get(role, role)): make(classes) for role, make in types.items()})
    sizes = [BATCHES * recipe.arguments().train_batch_size, MEASURED, MEASURED]
    for number, (split, size) in enumerate(zip(SPLITS, sizes, strict=True)):
        rng = np.random.default_rng(number)
        rows = [kind.row(index, rng, classes) for index in range(size)]
        if in_label is not None:
            rows = [{**row, "label": in_label(row["label"])} for row in rows]
        named = [
            {str(recipe.columns.get(role, role)): value for role, value in row.items() if role in types}
            for row in rows
        ]
        Dataset.from_list(named, features=features).to_parquet(folder / f"{split}.parquet")
