"""One training by Trainer."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from ...errors import SurgicalError
from ...optim.optimizer import surgical_optimizer
from ...policies.policy import Policy
from ...prefix_cache import cache_prefix
from ..tasks import Examples
from ..tasks.question_answering import POSITIONS

PREFIX_CACHE = "prefix_cache"  # the folder of the outputs that are kept, while a training is not done


def fit(
    model: nn.Module,
    args: TrainingArguments,
    examples: Examples,
    policy: Policy | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]] = default_data_collator,
    judged: Examples | None = None,
    checkpoint: Path | None = None,
    prefix_cache: Path | None = None,
) -> Trainer:
    """Train what has `requires_grad` with `Trainer`, each block at its rate; returns the trainer.

    With an `eval_strategy` among the arguments, the loss on the examples `judged` is told as it says. It goes on from
    a `checkpoint`, if there is one. With a folder for the `prefix_cache`, what lies before the first tuned block runs
    once for each example; the folder is removed when the training is done, and is there for one that goes on.

    Raises:
        SurgicalError: the prefix cache does not go with the model, the data or the arguments.
    """
    if prefix_cache and args.torch_compile:
        raise SurgicalError("prefix_cache does not go with torch_compile: leave one of them out.")
    set_seed(args.seed)
    if judged is not None and "labels" not in (batch := collate([judged[0]])):  # nor does Trainer see others by itself
        args.label_names = [name for name in batch if name in POSITIONS] or args.label_names
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=examples,
        eval_dataset=judged,
        data_collator=collate,
        optimizer_cls_and_kwargs=surgical_optimizer(args, policy),  # type: ignore[arg-type]
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)  # prints the log as dictionaries where the progress bar is off
    with cache_prefix(model, trainer.get_train_dataloader(), folder=prefix_cache) if prefix_cache else nullcontext():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if prefix_cache:
        shutil.rmtree(prefix_cache, ignore_errors=True)
    return trainer
