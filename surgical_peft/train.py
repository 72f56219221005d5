"""One training: a recipe in, a tuned adapter and its report out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator, set_seed

from .callback import SurgicalCallback
from .choosing import CRITERION, choose_blocks
from .files import check_replaceable, whole_folder, write_text
from .model import get_surgical_model
from .optim import surgical_optimizer
from .policies.policy import Policy
from .recipe import Recipe
from .scores import BlockScores
from .scoring import score_blocks
from .tasks import Examples, Task, load_task

_ADAPTER = "adapter_config.json"  # by which the adapter of an earlier run is known


def score(recipe: Recipe) -> BlockScores:
    """Score the blocks of a recipe's model on its training data, untouched; by `probe` unless the recipe says."""
    task = load_task(recipe)
    args = recipe.arguments()
    criterion = recipe.make_criterion() or CRITERION
    model = task.load_model().to(args.device)
    return score_blocks(model, _loader(task, args), criterion, num_batches=recipe.num_batches)


def _loader(task: Task, args: TrainingArguments) -> DataLoader[Any]:
    return DataLoader(
        task.splits["train"],  # type: ignore[arg-type]
        batch_size=args.train_batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(args.seed),
        collate_fn=default_data_collator,
    )


def train(recipe: Recipe, output: str | Path | None = None) -> dict[str, Any]:
    """Choose the blocks, tune them, measure, and save the adapter with its report.

    Args:
        recipe: what to do.
        output: folder to write to; default is the recipe's `output_dir`. It gets `adapter/`, `report.json`, and with
            `blocks: auto` also `scores.json` and `scores.png`; each whole or not at all.

    Returns:
        The report: blocks, numbers of parameters, accuracy on validation and test before and after.
    """
    args = recipe.arguments() if output is None else recipe.arguments(output_dir=str(output))
    folder = Path(str(args.output_dir))
    policy = recipe.make_policy()
    check_replaceable(folder / "adapter", _ADAPTER)
    task = load_task(recipe)
    model = task.load_model().to(args.device)
    size = sum(parameter.numel() for parameter in model.parameters())
    config, scores = recipe.config(), None
    if config.blocks == "auto":
        config, scores = choose_blocks(model, config, _loader(task, args), recipe.num_batches)
        config.selection = {**(config.selection or {}), "seed": args.seed}
    wrapped = get_surgical_model(model, config)
    before = {split: accuracy(wrapped, task.splits[split]) for split in ("validation", "test")}
    fit(wrapped, args, task.splits["train"], policy, [SurgicalCallback()])
    after = {split: accuracy(wrapped, task.splits[split]) for split in ("validation", "test")}
    with whole_folder(folder / "adapter", _ADAPTER) as temporary:
        wrapped.save_pretrained(temporary)
        if (folder / "adapter").exists():  # what an earlier run said of its adapter goes with it
            for stale in ("report.json", "scores.json", "scores.png"):
                (folder / stale).unlink(missing_ok=True)
    if scores is not None:
        scores.save(folder / "scores.json")
        scores.plot(folder / "scores.png")
    tuned = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    config = wrapped.peft_config["default"]
    report = {
        "model": recipe.model,
        "data": recipe.data,
        "blocks": config.blocks,
        "target_modules": config.target_modules,
        "selection": config.selection,
        "tuned_parameters": tuned,
        "all_parameters": size,
        "accuracy_before": before,
        "accuracy_after": after,
        "adapter": str(folder / "adapter"),
    }
    write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def fit(
    model: nn.Module,
    args: TrainingArguments,
    examples: Examples,
    policy: Policy | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    """Train what has `requires_grad` with `Trainer`, each block at its rate; returns the trainer."""
    set_seed(args.seed)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=examples,
        data_collator=default_data_collator,
        optimizer_cls_and_kwargs=surgical_optimizer(args, policy),  # type: ignore[arg-type]
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)  # prints the log as dictionaries where the progress bar is off
    trainer.train()
    return trainer


@torch.inference_mode()
def accuracy(model: nn.Module, examples: Examples, batch_size: int = 250) -> float:
    """Share of examples, 0 to 1, that the model classifies rightly."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    hits = total = 0
    for batch in DataLoader(examples, batch_size=batch_size, collate_fn=default_data_collator):  # type: ignore[arg-type]
        labels = batch.pop("labels").to(device)
        logits = model(**{key: value.to(device) for key, value in batch.items()}).logits
        hits += int((logits.argmax(-1) == labels).sum())
        total += len(labels)
    model.train(training)
    return hits / total
