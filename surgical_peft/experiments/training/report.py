"""The report of a training: everything that a model card needs and that cannot be known later."""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import load_dataset_builder
from peft import PeftModel
from transformers import SchedulerType, Trainer
from transformers.training_args import OptimizerNames

from ...atomic_files import digest_of
from ...export.adapter_card import origin
from ..recipe.recipe import Recipe
from ..tasks import Task
from .card import PACKAGES as PACKAGES
from .card import RANDOM_SHIFTS


@dataclass(frozen=True)
class Beginning:
    """What has to be noted before a training, for its report.

    Attributes:
        clock: when it began.
        data: where the data are from.
    """

    clock: float
    data: dict[str, Any]


def begin(recipe: Recipe) -> Beginning:
    """To be called before the training: a data set of the Hub needs the network, which may be gone after it."""
    return Beginning(time.monotonic(), identity(recipe.data))


def make_report(
    recipe: Recipe,
    task: Task,
    trainer: Trainer,
    beginning: Beginning,
    before: dict[str, float],
    after: dict[str, float],
    parameters: tuple[int, int],
    folder: Path,
) -> dict[str, Any]:
    """What was trained, on what, how, and with which result; plain data, as `report.json` holds it.

    Args:
        recipe, task: what was asked for, and what it gave.
        trainer: it has trained the model.
        beginning: what `begin` gave.
        before, after: the task's metric on each split.
        parameters: how many are tuned, and how many there are.
        folder: where the results go.
    """
    model: PeftModel = trainer.model
    base, config, args = model.get_base_model(), model.peft_config["default"], trainer.args
    on_hub, commit = origin(recipe.model)
    labels = getattr(base.config, "id2label", None) if "Classification" in type(base).__name__ else None
    return {
        "name": folder.resolve().name,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "seconds": round(time.monotonic() - beginning.clock, 1),
        "task": recipe.task,
        "recipe": recipe.keys(),
        "blocks": config.blocks,
        "target_modules": config.target_modules,
        "modules_to_save": config.modules_to_save,
        "tuned_modules": list(config.tuned_modules),
        "selection": config.selection,
        "tuned_parameters": parameters[0],
        "all_parameters": parameters[1],
        "metric": _metric(recipe, task),
        "before": before,
        "after": after,
        "base_model": {
            "class": type(base).__name__,
            "on_hub": on_hub,
            "commit": commit,
            "new_labels": base.config.num_labels if recipe.new_head else None,
            "fingerprint": config.fingerprint,
        },
        "dataset": {
            **beginning.data,
            "examples": {split: len(examples) for split, examples in task.splits.items()},
            "shift": _shift(recipe),
            "labels": None if labels is None else list(labels.values()),
        },
        "rates": {
            "learning_rate": args.learning_rate,
            "schedule": SchedulerType(args.lr_scheduler_type).value,
            "weight_decay": args.weight_decay,
            "optimizer": OptimizerNames(args.optim).value,
            "epochs": round(trainer.state.epoch, 2),
            "steps": trainer.state.global_step,
            "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "seed": args.seed,
            "policy": recipe.policy,
            "policy_options": recipe.policy_options,
        },
        "versions": {name: version(name) for name in PACKAGES},
        "adapter": str(folder / "adapter"),
    }


def _metric(recipe: Recipe, task: Task) -> str:
    """A metric's folder as the recipe has it: where it lies is nobody's business."""
    return recipe.keys()["metric"] if recipe.metric == task.metric else task.metric


def _shift(recipe: Recipe) -> dict[str, Any]:
    """The keys by which the recipe changes its data on purpose."""
    keys = [key for key in (*RANDOM_SHIFTS, "label_map") if getattr(recipe, key)]
    keys += ["severity"] if recipe.corruption else []
    keys += ["shift_seed"] if any(key in RANDOM_SHIFTS for key in keys) else []
    return {key: getattr(recipe, key) for key in keys}


def identity(data: str) -> dict[str, Any]:
    """Where a data set is from: the commit of one on the Hub, or a digest of the files of a local one."""
    path = Path(data)
    if not path.exists():
        return {"on_hub": True, "commit": load_dataset_builder(data).hash, "fingerprint": None}
    return {"on_hub": False, "commit": None, "fingerprint": digest_of(path)}
