"""A few weights everywhere, and PEFT's own way of tuning whole modules."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from peft import LoraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from ....auto import get_surgical_model
from ....blocks.block_map import BlockMap
from ....errors import SurgicalError
from ....scoring.selection import Selection
from ....tuner.config import SurgicalConfig
from ....validation import check_count, check_number
from ...recipe.recipe import Recipe
from ...tasks.source_model import modules_to_save as always_saved
from .method import Method, of_known_blocks, parsed


def norms(head: bool = True) -> Method:
    """All normalization layers, and with `head` the head: LN tuning.

    Args:
        head: tune the head too; where its weights are tied to the embeddings, as in many language models, these.

    Costs: nothing to choose.

    Example:
        methods: [full, norms, {norms: {head: false}}]
    """
    if not isinstance(head, bool):
        raise SurgicalError(f"norms: head={head!r} is neither true nor false.")
    return Method("norms and head" if head else "norms", wrap=partial(_tune_norms, head))


def lora(
    rank: int = 8, alpha: float | None = None, head: bool = True, target_modules: str | list[str] = "all-linear"
) -> Method:
    """LoRA by PEFT, by default on all linear layers, and with `head` a fully tuned head.

    Args:
        rank: of the updates.
        alpha: their scale; default twice the rank.
        head: tune the head in full, as PEFT does for classifiers; False: it is left as LoRA's other targets are.
        target_modules: what LoRA adapts, with PEFT's own meaning; a convolutional network has no linear layers.

    Costs: nothing to choose.

    Example:
        methods: [full, {lora: {rank: 4}}, {lora: {rank: 16}}]
    """
    check_count("lora", "rank", rank, "of the updates")
    if alpha is not None:
        check_number("lora", "alpha", alpha, "the scale of the updates", above=0)
    if not isinstance(head, bool):
        raise SurgicalError(f"lora: head={head!r} is neither true nor false.")
    if not target_modules or not isinstance(target_modules, str | list):
        raise SurgicalError(
            f"lora: target_modules={target_modules!r} is neither a name, a pattern nor a list of names."
        )
    settings = {"r": rank, "lora_alpha": 2 * rank if alpha is None else alpha, "target_modules": target_modules}
    title = [f"LoRA r={rank}", *([f"alpha={alpha:g}"] if alpha is not None else []), *([] if head else ["no head"])]
    if target_modules != "all-linear":
        title.append(target_modules if isinstance(target_modules, str) else " and ".join(map(str, target_modules)))
    return Method(", ".join(title), wrap=partial(_add_lora, settings, head))


def modules_to_save(names: Any) -> Method:
    """The blocks that you name, tuned by stock PEFT alone: `LoraConfig(modules_to_save=[...])` that adds no LoRA.

    Costs: nothing to choose.

    Example:
        methods: [full, {blocks: {names: ["-2:"]}}, {modules_to_save: {names: ["-2:"]}}]
    """
    shown = ", ".join(map(str, names)) if isinstance(names, list) else str(names)
    return replace(of_known_blocks(f"stock PEFT, {shown}", parsed(names)), wrap=_save_modules)


def _tune_norms(head: bool, model: nn.Module, selection: Selection, recipe: Recipe) -> nn.Module:
    saved = _with_heads(model, recipe) if head else always_saved(recipe, model)
    config = SurgicalConfig(blocks="all", target_modules="all-norm", modules_to_save=saved)
    if head and (tied := _tied_to_the_head(model)):
        targets = {**dict.fromkeys(BlockMap.find(model).names, "all-norm"), **tied}
        config = SurgicalConfig(target_modules=targets, modules_to_save=saved)
    return get_surgical_model(model, replace(config, frozen_eval=recipe.frozen_eval))


def _tied_to_the_head(model: nn.Module) -> dict[str, str | list[str]]:
    """By block, the embeddings whose weights the head of a language model shares."""
    blocks, modules = BlockMap.find(model), dict(model.named_modules())
    heads = [module for name, module in modules.items() if name in blocks.tied and isinstance(module, nn.Linear)]
    shared = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Embedding) and any(module.weight is head.weight for head in heads)
    ]
    owners = {name: blocks.block_of(f"{name}.weight") for name in shared}
    return {block: [name for name in shared if owners[name] == block] for block in owners.values()}


def _with_heads(model: nn.Module, recipe: Recipe) -> list[str] | None:
    """The modules of the model's heads, and those that the recipe wants trained with every method."""
    modules, blocks = dict(model.named_modules()), BlockMap.find(model)
    heads = [path for head in blocks.heads for path in blocks.modules[head]]
    whole = [path for path in heads if path in modules and next(modules[path].parameters(), None) is not None]
    return list(dict.fromkeys([*whole, *(always_saved(recipe, model) or [])])) or None


def _add_lora(
    settings: dict[str, Any], head: bool, model: nn.Module, selection: Selection, recipe: Recipe
) -> nn.Module:
    whole = _with_heads(model, recipe) if head else always_saved(recipe, model)
    return get_peft_model(model, LoraConfig(**settings, modules_to_save=whole))


def _save_modules(model: nn.Module, selection: Selection, recipe: Recipe) -> nn.Module:
    modules = dict(model.named_modules())
    modules_of_block = BlockMap.find(model).modules
    paths = [path for name in selection.blocks for path in modules_of_block[name]]
    loose = [path for path in paths if path not in modules]
    if loose:
        raise SurgicalError(f"modules_to_save: PEFT saves modules, and {', '.join(loose)} is a parameter by itself.")
    whole = sorted({*paths, *(always_saved(recipe, model) or [])})
    return get_peft_model(model, LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=whole))
