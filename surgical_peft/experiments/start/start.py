"""`surgical-peft start`: reads a model and data, says what it understood, and makes a recipe and tells the costs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Image, LargeList, List, Value
from rich.console import Console
from transformers import AutoConfig

from ...errors import SurgicalError
from ...scoring.progress import Stages
from ...search.proposals import planned_candidates
from ..advise import advise as advising
from ..advise.cost import estimate as estimate_advice
from ..compare.cost import time_trainings
from ..compare.default_methods import DEFAULT
from ..recipe.recipe import Recipe
from ..tasks import load_task
from ..tasks.cells import cells_of
from ..tasks.chat import FORMS
from ..tasks.columns import LABEL, stored_images, whole_numbers
from ..tasks.question_answering import is_answers
from ..tasks.splits import DataSource, assign_splits
from ..tasks.task import load_pretrained
from ..training.cost import Timing, depth_of
from ..training.job_progress import telling
from ..training.runner import RecipeRunner
from ..training.train import budget_of, loader

_REMEDIES = ("new_head", "drop_empty")  # keys that an error may ask for, and that change no row and no label of others
_STEPS = 150  # of a training, about: few enough to wait for, enough to learn from
_EPOCHS = (3, 20)  # at least and at most
_SMALL = 10_000_000  # parameters: models of fewer take higher rates
_APART = 5  # factor between two rates; a few blocks take higher ones than a whole model
_BATCH = 16
_CLASSES = 20  # at most, of a column that is taken for them where nobody says so


@dataclass(frozen=True)
class Step:
    """A command to run next.

    Attributes:
        command: its name.
        seconds: that it takes at most, about.
        answers: the question that it answers.
    """

    command: str
    seconds: float
    answers: str


@dataclass(frozen=True)
class Start:
    """What was understood of a model and data, and a recipe for them.

    Attributes:
        recipe: for `surgical-peft train` and the others.
        reasons: of the keys that are there because the data ask for them.
        model: what the model is.
        data: what was understood of the data, in lines.
        steps: the commands, with what each costs on this machine.
        memory: bytes that a training takes at most.
    """

    recipe: Recipe
    reasons: dict[str, str]
    model: str
    data: list[str]
    steps: list[Step]
    memory: int


def start(
    model: str,
    data: str,
    task: str | None = None,
    console: Console | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    allow_code: bool = False,
) -> Start:
    """Read a model and data, and time a few steps.

    Args:
        model: folder or Hub id.
        data: folder, file or Hub id.
        task: a name from `tasks`; default is what the columns and the model speak for.
        console: where to show progress; default is the standard error.
        columns: by role, where they cannot be told: `{"label": "stars"}`.
        allow_code: see `Recipe`.

    Raises:
        SurgicalError: model or data cannot be read, or do not fit each other.

    Example:
        >>> start("google/vit-base-patch16-224", "photos").recipe.task
        'image_classification'
    """
    model, data = (str(Path(name).resolve()) if Path(name).exists() else name for name in (model, data))
    with Stages(console) as stages:
        stages.begin(f"read {model} and {data}")
        training = {"per_device_train_batch_size": _BATCH}
        task = task or guess_task(model, data, columns or {}, allow_code)
        recipe = Recipe(
            model=model, data=data, task=task, columns=dict(columns or {}), training=training, allow_code=allow_code
        )
        recipe, runner, reasons = _fitting(recipe)
        recipe = replace(recipe, training={**recipe.training, **_training(runner)})
        recipe = replace(recipe, rates=_rates(recipe.training["learning_rate"]))
        runner = RecipeRunner(recipe)
        stages.begin("time a few steps", 1.0)
        with telling(stages.advance):
            timing = time_trainings(replace(recipe, methods=DEFAULT), runner)
    size = sum(parameter.numel() for parameter in runner.model.parameters())
    layers = len(runner.blocks.layers)
    count = len(runner.blocks.names)
    described = f"{type(runner.model).__name__}, {count} blocks ({layers} layers), {size:,} parameters"
    understood = list(load_task(recipe).summary)  # with the test split
    return Start(recipe, reasons, described, understood, _steps(recipe, runner, timing), timing.memory)


def guess_task(model: str, data: str, columns: Mapping[str, str], allow_code: bool = False) -> str:
    """The task that the columns of the data and the kind of the model speak for.

    Raises:
        SurgicalError: model or data cannot be read.
    """
    recipe = Recipe(model=model, data=data, allow_code=allow_code)
    config = load_pretrained(AutoConfig.from_pretrained, recipe, "model")
    source = DataSource.find(data)
    train = assign_splits(source, {})["train"] or source.splits[0]
    rows = stored_images(whole_numbers(source.open(train)))
    features = list(rows.features.values())
    if any(isinstance(feature, Image) for feature in features):
        return "image_classification"
    if any(map(is_answers, features)):
        return "question_answering"
    if any(isinstance(feature, List | LargeList) and isinstance(feature.feature, Value) for feature in features):
        return "token_classification"
    if config.is_encoder_decoder:
        return "seq2seq"
    kinds = " ".join(config.architectures or [])
    if "CausalLM" not in kinds and "LMHead" not in kinds:
        return "text_classification"
    names = {*rows.features, *columns}
    forms = [form for form in FORMS if set(form) <= names and not ("text" in form and "label" in names)]
    has_classes = "label" in names or any(_are_classes(rows, name) for name in rows.features)
    return "text_classification" if has_classes and not forms else "causal_lm"


def _are_classes(rows: Any, column: str) -> bool:
    most = min(_CLASSES, len(rows) // 2)
    return LABEL.fits(rows.features[column]) and 1 < len(cells_of(rows, column).drop_null().unique()) <= most


def _fitting(recipe: Recipe) -> tuple[Recipe, RecipeRunner, dict[str, str]]:
    """The recipe with the keys that the data ask for, model and data loaded, and the reason for each key."""
    reasons: dict[str, str] = {}
    while True:
        try:
            return recipe, RecipeRunner(recipe), reasons
        except SurgicalError as error:
            asked = [key for key in _REMEDIES if f"{key}: true" in str(error) and key not in reasons]
            if not asked:
                raise
            reasons[asked[0]] = " ".join(str(error).split())
            keys: dict[str, Any] = {asked[0]: True}
            recipe = replace(recipe, **keys)


def _training(runner: RecipeRunner) -> dict[str, Any]:
    size = sum(parameter.numel() for parameter in runner.model.parameters())
    steps = math.ceil(len(runner.examples["train"]) / _BATCH)
    epochs = min(_EPOCHS[1], max(_EPOCHS[0], math.ceil(_STEPS / steps)))
    return {"learning_rate": 1e-3 if size < _SMALL else 1e-4, "num_train_epochs": epochs}


def _rates(middle: float) -> list[float]:
    return [float(f"{middle * factor:.1g}") for factor in (1 / _APART, 1, _APART)]


def _steps(recipe: Recipe, runner: RecipeRunner, timing: Timing) -> list[Step]:
    """The commands in the order of what they cost."""
    blocks, rates = runner.blocks, len(recipe.rates or [1])
    batches = loader(runner.task, runner.args)
    choosing = budget_of(runner.args, batches) * timing.step
    sweep = [depth_of(names, blocks.names, blocks.layers) for names in planned_candidates("sweep", blocks) or []]
    advice = estimate_advice(advising.comparison_of(recipe), runner, timing)
    searched = rates * sum(map(timing.seconds, sweep))
    compared = rates * (len(DEFAULT) - 1) * timing.whole + choosing
    return [
        Step("score", timing.start + choosing, "which blocks look worth tuning?"),
        Step("train", timing.start + choosing + timing.whole, "choose blocks, tune them, measure, save the adapter"),
        Step("advise", advice.seconds, "is surgery worth it here, with which blocks and rate?"),
        Step("search", timing.start + searched, "which blocks are best, tuned in full?"),
        Step("compare", timing.start + compared, "is it better than full fine-tuning or LoRA, on test data?"),
    ]


def recipe_text(start: Start, path: Path) -> str:
    """The recipe as a commented YAML file at `path`, which `surgical-peft train` takes as it is."""
    recipe, training = start.recipe, start.recipe.training
    lines = [
        "# A first recipe, written by `surgical-peft start`. Next:",
        f"#   surgical-peft train {path}",
        f"#   surgical-peft advise {path}",
        "# All keys: `surgical-peft recipe --keys`.",
        "",
        f"# {start.model}",
        f"model: {_beside(recipe.model, path)}",
        *(f"# {' '.join(line.split())}" for line in start.data),
        f"data: {_beside(recipe.data, path)}",
        f"task: {recipe.task}",
        *([f"columns: {json.dumps(recipe.columns, ensure_ascii=False)}"] if recipe.columns else []),
    ]
    for key, reason in start.reasons.items():
        lines += [f"# Without it: {reason}", f"{key}: true"]
    lines += [
        "",
        '# The blocks to tune: auto = by short trainings of each; or by number, slice or name, as [0, "-2:", head]',
        "# (`surgical-peft blocks MODEL` lists them).",
        "blocks: auto",
        "",
        f"learning_rate: {training['learning_rate']:g}",
        f"num_train_epochs: {training['num_train_epochs']}",
        f"per_device_train_batch_size: {training['per_device_train_batch_size']}",
        "seed: 0",
        "",
        "# Tried by search, compare and advise.",
        f"rates: [{', '.join(f'{rate:g}' for rate in recipe.rates or [])}]",
        "",
        "# The results: adapter/ with its card, report.json.",
        f"output_dir: runs/{path.stem}",
    ]
    return "\n".join(lines) + "\n"


def _beside(name: str, path: Path) -> str:
    """What lies here, as a recipe at `path` names it; a Hub id as it is."""
    if Path(name).exists():
        name = Path(os.path.relpath(Path(name).resolve(), path.resolve().parent)).as_posix()
    return json.dumps(name, ensure_ascii=False)  # in quotes: a folder may be called 2024, null or on


def to_json(start: Start, path: Path) -> Mapping[str, Any]:
    """Plain data of what was understood."""
    return {
        "recipe": str(path),
        "task": start.recipe.task,
        "keys": start.recipe.keys(),
        "reasons": start.reasons,
        "model": start.model,
        "data": start.data,
        "seconds": {step.command: step.seconds for step in start.steps},
        "memory": start.memory,
    }
