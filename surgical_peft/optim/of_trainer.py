"""The batches, loss and length of a Trainer's training, for choosing blocks by."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import has_length

from ..errors import SurgicalError
from ..scoring.batches import LossFunction


def loss_of(trainer: Trainer) -> LossFunction | None:
    """The loss that a Trainer makes of the model's outputs itself: by `compute_loss_func`, or with label smoothing."""
    if trainer.compute_loss_func is None and trainer.label_smoother is None:
        return None
    return compute_loss_of(trainer)


def compute_loss_of(trainer: Trainer) -> LossFunction:
    """A Trainer's own `compute_loss`, which takes the labels out of the batch that it gets."""
    return lambda model, batch: trainer.compute_loss(model, dict(batch))  # type: ignore[return-value]


def training_of(trainer: Trainer) -> tuple[Iterable[Any], LossFunction | None, float | None]:
    """Batches as a Trainer makes them, its loss where that is not the model's own, and its steps (one a batch).

    Raises:
        SurgicalError: a Trainer without a training set.
    """
    if trainer.train_dataset is None:
        raise SurgicalError(f"the {type(trainer).__name__} has no train_dataset to choose blocks by: give it one.")
    batches, args = trainer.get_train_dataloader(), trainer.args
    has_own = type(trainer).compute_loss is not Trainer.compute_loss
    loss = compute_loss_of(trainer) if has_own else loss_of(trainer)
    steps: float | None = None
    if args.max_steps > 0:
        steps = args.max_steps * args.gradient_accumulation_steps
    elif has_length(batches):
        steps = math.ceil(len(batches) * args.num_train_epochs)
    return batches, loss, steps
