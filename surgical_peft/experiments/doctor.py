"""Takes one training step of a recipe, or of a model on made-up input, and says how every tensor fares."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils.constants import CONFIG_NAME
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from ..auto import get_surgical_model
from ..diagnosis.diagnosis import Diagnosis
from ..diagnosis.doctor import doctor
from ..errors import SurgicalError
from ..optim.optimizer import create_surgical_optimizer, surgical_optimizer
from ..scoring.batches import LossFunction
from ..scoring.progress import Stages
from ..tuner.config import SurgicalConfig
from ..tuner.loading.saved_adapter import load_base, read_adapter
from .recipe.code import check_code
from .recipe.recipe import Recipe
from .tasks import load_task
from .tasks.source_model import modules_to_save

_EXAMPLES, _TOKENS = 2, 16  # of made-up input
_RATE, _DECAY = 1e-5, 0.01


def doctor_of_recipe(recipe: Recipe, adapter: str | Path | None = None, console: Console | None = None) -> Diagnosis:
    """One step of a recipe's training, on its first batch.

    Args:
        recipe: as for `train`, with its `blocks` given.
        adapter: of a training to go on with; also says which blocks, where the recipe leaves them to `auto`. Default
            is that of the recipe's own finished run, if its blocks are `auto`.
        console: where to show progress, as for `train`.

    Raises:
        SurgicalError: as `train`; or nothing says which blocks.

    Example:
        >>> print(doctor_of_recipe(load_recipe("recipes/label_map.yaml")))
    """
    check_code(recipe)
    run = Path(str(recipe.arguments().output_dir)) / "adapter"
    if adapter is None and recipe.blocks == "auto":
        if not (run / CONFIG_NAME).is_file():
            raise SurgicalError(
                f"blocks: auto chooses when it trains, and {str(run)!r} is not there: write the blocks into the "
                "recipe, or give the adapter of a training."
            )
        adapter = run
    with tempfile.TemporaryDirectory() as folder, Stages(console) as stages:  # Trainer makes one
        args = recipe.arguments(output_dir=folder)
        stages.begin("load the data")
        task = load_task(recipe, ("train",))
        stages.begin("load the model")
        model = task.load_model().to(args.device)
        if adapter is None:
            config = recipe.config()
            config.modules_to_save = modules_to_save(recipe, model)
            model = get_surgical_model(model, config)
        else:
            model = _with_adapter(model, read_adapter(_adapter_in(adapter)).folder)
        stages.begin("one step")
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=task.splits["train"],
            data_collator=task.collate,
            optimizer_cls_and_kwargs=surgical_optimizer(args, recipe.make_policy()),  # type: ignore[arg-type]
        )
        return doctor(trainer)


def doctor_of_model(model: str, adapter: str | Path | None = None) -> Diagnosis:
    """One step of a model, or of an adapter of it, on made-up tokens or images.

    Args:
        model: folder or Hub id.
        adapter: its folder; without one, the whole model is trained.

    Raises:
        SurgicalError: no such model or adapter, or one that takes something else than tokens or images.

    Example:
        >>> doctor_of_model("recipes/fashion_mnist/vit").is_healthy
        True
    """
    saved = None if adapter is None else read_adapter(_adapter_in(adapter))
    config, tensors = (SurgicalConfig(blocks="all"), {}) if saved is None else (saved.config, saved.tensors)
    tuned: Any = load_base(config, tensors, model).model
    batch, loss_fn = _made_up(tuned)
    if saved is not None:
        tuned = _with_adapter(tuned, saved.folder)
    optimizer = create_surgical_optimizer(tuned, torch.optim.AdamW, lr=_RATE, weight_decay=_DECAY)
    return doctor((tuned, optimizer), batch, loss_fn)


def _adapter_in(folder: str | Path) -> Path:
    """The folder of an adapter, or of a run."""
    is_run = (Path(folder) / "adapter" / CONFIG_NAME).is_file()
    return Path(folder) / "adapter" if is_run else Path(folder)


def _with_adapter(model: nn.Module, adapter: Path) -> nn.Module:
    return PeftModel.from_pretrained(model, str(adapter), is_trainable=True)


def _made_up(model: PreTrainedModel) -> tuple[dict[str, Tensor], LossFunction | None]:
    """A batch for a model, with labels where it takes them, and else a loss of its first output."""
    config, kind = model.config, model.main_input_name
    generator = torch.Generator().manual_seed(0)
    if kind == "input_ids":
        vocabulary = config.get_text_config(decoder=True).vocab_size
        inputs = torch.randint(0, vocabulary, (_EXAMPLES, _TOKENS), generator=generator)
    elif kind == "pixel_values" and getattr(config, "image_size", None):
        size = config.image_size if isinstance(config.image_size, list | tuple) else [config.image_size] * 2
        shape = (_EXAMPLES, getattr(config, "num_channels", 3), *size)
        inputs = torch.randn(shape, generator=generator).to(model.dtype)
    else:
        raise SurgicalError(
            f"{type(model).__name__} takes {kind}, and only tokens and images are made up here: give a recipe."
        )
    if model.get_output_embeddings() is not None:
        return {kind: inputs, "labels": inputs.clone()}, None
    if "Classification" not in type(model).__name__:
        return {kind: inputs}, lambda model, batch: model(**batch)[0].float().pow(2).mean()
    if config.problem_type in ("multi_label_classification", "regression") or config.num_labels == 1:
        labels = torch.zeros(_EXAMPLES, int(config.num_labels or 1))
    else:
        labels = torch.zeros((_EXAMPLES, _TOKENS)[: 1 + ("Token" in type(model).__name__)], dtype=torch.long)
    return {kind: inputs, "labels": labels}, None
