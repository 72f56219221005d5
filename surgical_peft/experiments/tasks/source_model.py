"""The source model of a task: as it was trained, or with a new head."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoConfig, TrainingArguments

from ...blocks.block_map import BlockMap
from ...errors import SurgicalError
from ..recipe.recipe import Recipe
from .task import load_pretrained


def model_loader(
    auto: Any, recipe: Recipe, count: int | None = None, names: list[str] | None = None
) -> Callable[[], nn.Module]:
    """A function that loads the source model of a recipe, in eval mode.

    Args:
        auto: the Auto class of transformers that loads it.
        recipe: with `new_head`, the head gets fresh weights, by the recipe's seed.
        count: of labels of the new head.
        names: of these labels, or of a head that only numbers as many (`LABEL_0`).
    """

    def load() -> nn.Module:
        model = _with_new_head(auto, recipe, count, names) if recipe.new_head else load_whole()
        if recipe.norm_eval:
            keep_batch_statistics(model)
        return model

    def load_whole() -> nn.Module:
        model, loading = load_pretrained(auto.from_pretrained, recipe, "model", output_loading_info=True)
        if loading["missing_keys"]:
            raise SurgicalError(
                f"{recipe.model} has no weights for {', '.join(sorted(loading['missing_keys']))}: it was not trained "
                f"for {recipe.task}. Write new_head: true to make and train a new head, or take another model."
            )
        if names and names_are_missing(model.config, names):
            model.config.id2label = dict(enumerate(names))
            model.config.label2id = {name: label for label, name in enumerate(names)}
        return model

    return load


def keep_batch_statistics(model: nn.Module) -> None:
    """Have the batch normalization of a model normalize by its running statistics, and leave them, in training too.

    By a hook on each module, which copies of the model take along: trainers put all modules into train mode at each
    step.

    Raises:
        SurgicalError: the model has no batch normalization.
    """
    found = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not found:
        raise SurgicalError(f"norm_eval: {type(model).__name__} has no batch normalization: leave norm_eval out.")
    for module in found:
        module.register_forward_pre_hook(_eval_first)


def _eval_first(module: nn.Module, inputs: Any) -> None:
    module.eval()


def names_are_missing(config: Any, names: list[str]) -> bool:
    """True if a model has as many labels as there are `names`, and only numbers them."""
    return config.id2label == {label: f"LABEL_{label}" for label in range(len(names))}


def modules_to_save(recipe: Recipe, model: nn.Module) -> list[str] | None:
    """The modules that are trained and saved whatever blocks are chosen: those of the recipe, else a new head."""
    if recipe.modules_to_save is not None or not recipe.new_head:
        return recipe.modules_to_save
    blocks = BlockMap.find(model)
    return [path for head in blocks.heads for path in blocks.modules[head]]


def _with_new_head(auto: Any, recipe: Recipe, count: int | None, names: list[str] | None) -> nn.Module:
    labels = {"num_labels": count} | ({"id2label": dict(enumerate(names))} if names else {})
    config = load_pretrained(AutoConfig.from_pretrained, recipe, "model", **labels)
    with torch.random.fork_rng(devices=[]):  # what the caller draws does not depend on it
        # A stream of its own: the source model may have begun with the very head that this seed gives.
        seed = recipe.training.get("seed", TrainingArguments.seed)
        torch.manual_seed(random.Random(f"new head {seed}").getrandbits(63))
        model = auto.from_config(config, trust_remote_code=recipe.allow_code)
        source = load_pretrained(auto.from_pretrained, recipe, "model", config=config, ignore_mismatched_sizes=True)
    if source.base_model is source:
        raise SurgicalError(f"new_head: {type(source).__name__} does not tell its head from the rest.")
    model.base_model.load_state_dict(source.base_model.state_dict())
    return model.to(source.dtype).eval()
