"""Adaptation to a stream: a step on copies of what comes next, then its prediction, with weights that stay adapted."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerState, TrainingArguments, default_data_collator, set_seed

from ...optim.optimizer import surgical_optimizer
from ...policies.policy import Policy
from ...scoring.progress import Counted, Stages
from ..tasks import Examples, Task
from ..tasks.evaluation import Measure
from ..tasks.unlabelled import COPIES
from .job_progress import report_progress


def adapt_online(
    model: nn.Module, stream: Examples, args: TrainingArguments, measure: Measure, policy: Policy | None = None
) -> float:
    """Adapt what has `requires_grad` to a stream, and give the metric of the predictions made along it.

    Each image is predicted once, after the step on its copies; what the step has changed stays for those that follow.
    The model is in eval mode throughout, as in the source: batch statistics of copies of one image would mean little.

    Args:
        model: with a loss on copies, see `MarginalEntropy`; it is left adapted, in eval mode.
        stream: labeled images with `COPIES`, in their order; the labels go into the metric alone.
        args: rate and optimizer; `train_batch_size` images are adapted to and predicted together, and after
            `max_steps`, if that is given, the rest is predicted without a step.
        measure: reads and computes the metric.
        policy: of the learning rates.

    Source: MEMO, Zhang, Levine and Finn 2021 (arXiv 2110.09506), in the online form of Lee et al. 2022 (arXiv
        2210.11466), Table 2.

    Example:
        >>> adapt_online(model, task.splits["test"], args, task.measure)
        0.754
    """
    set_seed(args.seed)
    factory, settings = surgical_optimizer(args, policy)
    optimizer = factory()(model, **settings)
    device = next(model.parameters()).device
    predictions: list[Any] = []
    references: list[Any] = []
    model.eval()
    loader: DataLoader[Any] = DataLoader(stream, args.train_batch_size, collate_fn=default_data_collator)  # type: ignore[arg-type]
    for step, batch in enumerate(loader):
        batch = {name: value.to(device) for name, value in batch.items()}
        if args.max_steps <= 0 or step < args.max_steps:
            optimizer.zero_grad()
            model(pixel_values=batch[COPIES]).loss.backward()
            optimizer.step()
        with torch.no_grad():
            predicted, wanted = measure.read(model, batch)
        report_progress((step + 1) / len(loader))
        predictions += predicted
        references += wanted
    optimizer.block_rates.release()  # type: ignore[attr-defined]
    return measure.compute(predictions, references)


@dataclass
class Adapted:
    """Stands for the trainer of a model that was adapted to a stream."""

    model: nn.Module
    args: TrainingArguments
    state: TrainerState


def adapt_to_streams(
    model: nn.Module, task: Task, args: TrainingArguments, policy: Policy | None, stages: Stages
) -> tuple[Adapted, dict[str, float]]:
    """The metric along the stream of each split that is measured, each begun with the model as it is.

    Returns:
        The model as it is after the last of the streams, and the metrics.
    """
    after: dict[str, float] = {}
    splits = [split for split in ("validation", "test") if split in task.splits]
    for split in splits:
        stream = task.splits[split]
        stages.begin(f"adapt to the stream {split}", len(stream))
        adapted = model if split == splits[-1] else copy.deepcopy(model)
        after[split] = adapt_online(adapted, Counted(stream, stages), args, task.measure, policy)  # type: ignore[arg-type]
    steps = math.ceil(len(stream) / args.train_batch_size)
    steps = min(steps, args.max_steps) if args.max_steps > 0 else steps
    return Adapted(model, args, TrainerState(epoch=1.0, global_step=steps)), after
