"""`surgical-peft train --dry-run`: what a training will tune, and what its prefix cache will take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.utils.data import DataLoader

from ...auto import get_surgical_model
from ...blocks.block_map import blocks_in_words
from ...errors import SurgicalError
from ...prefix_cache import cache_prefix
from ...prefix_cache.attach import MEMORY, predicted_bytes
from ...scoring.progress import Stages
from ..recipe.recipe import Recipe
from ..tasks import load_task
from ..tasks.source_model import modules_to_save


@dataclass(frozen=True)
class TrainPlan:
    """What a training will tune and keep.

    Attributes:
        blocks: that are tuned.
        tuned_parameters, all_parameters: their numbers.
        examples: that are trained on.
        cached_examples: that the prefix cache will have, those of evaluations included; None without it.
        memory, files: bytes that it will hold in memory and in files.
    """

    blocks: list[str]
    tuned_parameters: int
    all_parameters: int
    examples: int
    cached_examples: int | None = None
    memory: int = 0
    files: int = 0

    def lines(self) -> list[str]:
        """The plan in words."""
        share = self.tuned_parameters / self.all_parameters
        lines = [
            f"Tunes {blocks_in_words(self.blocks) or 'modules by name'}: {self.tuned_parameters:,} of "
            f"{self.all_parameters:,} parameters ({share:.1%}), on {self.examples:,} examples."
        ]
        if self.cached_examples is not None:
            lines.append(
                f"Prefix cache: {(self.memory + self.files) / 1e6:,.1f} MB for {self.cached_examples:,} examples, "
                f"{self.memory / 1e6:,.1f} MB of it in memory and {self.files / 1e6:,.1f} MB in files."
            )
        return lines


def plan(recipe: Recipe, output: str | Path | None = None, console: Console | None = None) -> TrainPlan:
    """Load model and data, and look at a few examples; nothing is trained or written.

    Args:
        recipe: what would be trained.
        output: folder for the results; it is checked.
        console: where to tell what is done.

    Raises:
        SurgicalError: as `train`, or blocks that are only chosen by training: `blocks: auto`.
    """
    recipe.check_run(output)
    config = recipe.config()
    if config.blocks == "auto":
        raise SurgicalError(
            "blocks: auto are chosen by a part of the training: name blocks in the recipe for a dry run, or run "
            "`surgical-peft score`."
        )
    args = recipe.arguments()
    with Stages(console) as stages:
        stages.begin("load model and data")
        splits = ("train", "validation") if args.eval_strategy != "no" else ("train",)
        task = load_task(recipe, splits)
        model = task.load_model().to(args.device)
        stages.end()
        config.modules_to_save = modules_to_save(recipe, model)
        size = sum(weight.numel() for weight in model.parameters())
        wrapped = get_surgical_model(model, config)
        loaders: list[DataLoader[Any]] = [
            DataLoader(task.splits[split], args.train_batch_size, collate_fn=task.collate)  # type: ignore[arg-type]
            for split in splits
        ]
        cached, total = None, 0
        if recipe.prefix_cache:
            stages.begin("look at examples")
            with cache_prefix(wrapped, loaders[0], memory=0) as cache:
                total = sum(predicted_bytes(cache, loader) for loader in loaders)
            cached = sum(len(task.splits[split]) for split in splits)
            stages.end()
    return TrainPlan(
        blocks=list(wrapped.peft_config["default"].blocks or []),
        tuned_parameters=sum(weight.numel() for weight in wrapped.parameters() if weight.requires_grad),
        all_parameters=size,
        examples=len(task.splits["train"]),
        cached_examples=cached,
        memory=min(total, MEMORY),
        files=max(0, total - MEMORY),
    )
