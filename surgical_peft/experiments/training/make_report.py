"""Makes the report of a training that has just ended."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from peft import PeftModel
from transformers import PreTrainedModel, SchedulerType, TrainerState, TrainingArguments
from transformers.training_args import OptimizerNames

from ...export.adapter_card import origin
from ..recipe.recipe import Recipe
from ..tasks import Task, info_of, task_of
from .provenance import identity, today, versions
from .report import RANDOM_SHIFTS, BaseModelReport, DataReport, RateReport, TrainingReport


@dataclass(frozen=True)
class Start:
    """The state before a training, for its report.

    Attributes:
        clock: when it began.
        data: where the data are from.
    """

    clock: float
    data: dict[str, Any]


class Trained(Protocol):
    """What a report asks a trainer for."""

    model: Any
    args: TrainingArguments
    state: TrainerState


def start(recipe: Recipe) -> Start:
    """To be called before the training: a data set of the Hub needs the network, which may be gone after it."""
    return Start(time.monotonic(), identity(recipe.data, recipe.data_config))


def make_report(
    recipe: Recipe,
    task: Task,
    trainer: Trained,
    beginning: Start,
    metrics: tuple[dict[str, float], dict[str, float]],
    parameters: tuple[int, int],
    folder: Path,
    scored: list[str] | None,
    plot: str | None,
) -> TrainingReport:
    """The report of a training that has just ended.

    Args:
        recipe, task: what was asked for, and what it gave.
        trainer: it has trained the model.
        beginning: what `start` gave.
        metrics: the task's on each split, before and after.
        parameters: how many are tuned, and how many there are.
        folder: where the results go.
        scored, plot: see `TrainingReport`.
    """
    model: PeftModel = trainer.model
    config = model.peft_config["default"]
    return TrainingReport(
        name=folder.resolve().name,
        date=today(),
        seconds=round(time.monotonic() - beginning.clock, 1),
        task=recipe.task,
        recipe=recipe.keys(),
        blocks=config.blocks,
        target_modules=config.target_modules,
        modules_to_save=config.modules_to_save,
        tuned_modules=list(config.tuned_modules),
        selection=config.selection,
        tuned_parameters=parameters[0],
        all_parameters=parameters[1],
        metric=_metric(recipe, task),
        before=metrics[0],
        after=metrics[1],
        base_model=_base_model(recipe, model.get_base_model(), config.fingerprint),
        dataset=_dataset(recipe, task, model.get_base_model(), beginning),
        rates=_rates(recipe, trainer),
        versions=versions(),
        adapter=str(folder / "adapter"),
        scored=scored,
        plot=plot,
        pipeline=info_of(task_of(recipe)).pipeline,
    )


def _metric(recipe: Recipe, task: Task) -> str:
    """A metric's folder as the recipe has it: where it lies is nobody's business."""
    return recipe.keys()["metric"] if recipe.metric == task.metric else task.metric


def _base_model(recipe: Recipe, model: PreTrainedModel, fingerprint: str | None) -> BaseModelReport:
    on_hub, commit = origin(recipe.model)
    new_labels = model.config.num_labels if recipe.new_head else None
    return BaseModelReport(type(model).__name__, on_hub, commit, new_labels, fingerprint)


def _dataset(recipe: Recipe, task: Task, model: PreTrainedModel, beginning: Start) -> DataReport:
    return DataReport(
        **beginning.data,
        examples={split: len(examples) for split, examples in task.splits.items()},
        shift=_shift(recipe),
        labels=list((model.config.id2label or {}).values()) if task.names_labels else None,
        summary=list(task.summary),
    )


def _shift(recipe: Recipe) -> dict[str, Any]:
    """The keys by which the recipe changes its data on purpose."""
    keys = [key for key in (*RANDOM_SHIFTS, "label_map") if getattr(recipe, key)]
    keys += ["severity"] if recipe.corruption else []
    keys += ["shift_seed"] if any(key in RANDOM_SHIFTS for key in keys) else []
    return {key: getattr(recipe, key) for key in keys}


def _rates(recipe: Recipe, trainer: Trained) -> RateReport:
    args = trainer.args
    return RateReport(
        learning_rate=args.learning_rate,
        schedule=SchedulerType(args.lr_scheduler_type).value,
        weight_decay=args.weight_decay,
        optimizer=OptimizerNames(args.optim).value,
        epochs=round(trainer.state.epoch or 0.0, 2),
        steps=trainer.state.global_step,
        batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        seed=args.seed,
        policy=recipe.policy,
        policy_options=recipe.policy_options,
    )
