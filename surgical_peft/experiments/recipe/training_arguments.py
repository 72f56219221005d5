"""Checks what a recipe says to `transformers.TrainingArguments`, before any data or model is loaded.

transformers itself looks at little of it: a wrong value is seen by the optimizer or the scheduler that it goes to,
which are made when data and model are there, or never, as a negative weight decay.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from ...errors import SurgicalError, reason_of

_ABOVE_0 = (math.nextafter(0, 1), math.inf)
_ONE_OR_MORE, _NOT_NEGATIVE = (1, math.inf), (0, math.inf)
_BELOW_1 = (0, math.nextafter(1, 0))
_SEED = (0, 2**32 - 1)
_RANGES: dict[str, tuple[float, float]] = {  # first and last value that means something
    **dict.fromkeys(("learning_rate", "num_train_epochs", "adam_epsilon", "neftune_noise_alpha"), _ABOVE_0),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), _ABOVE_0),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _ONE_OR_MORE),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "save_total_limit"), _ONE_OR_MORE),
    **dict.fromkeys(("dataloader_prefetch_factor", "torch_empty_cache_steps", "ddp_timeout"), _ONE_OR_MORE),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "warmup_steps", "eval_delay"), _NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), _BELOW_1),
    **dict.fromkeys(("seed", "data_seed"), _SEED),
    "dataloader_num_workers": (0, 16 * (os.cpu_count() or 1)),
    "ddp_bucket_cap_mb": _ONE_OR_MORE,
}


def make_arguments(keys: Mapping[str, Any], defaults: Mapping[str, Any]) -> TrainingArguments:
    """The training arguments of a recipe's `keys`, over `defaults`.

    Raises:
        SurgicalError: transformers does not take them; the message names the key where one alone is to blame.
    """
    try:
        return TrainingArguments(**{**defaults, **keys})
    except Exception as error:  # transformers raises whatever it runs into: ZeroDivisionError, AttributeError, ...
        raise SurgicalError(
            f"transformers.TrainingArguments does not take {_to_blame(keys, defaults)}: {reason_of(error)}"
        ) from error


def _to_blame(keys: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The key that is refused also by itself, or else all."""
    for key, value in keys.items():
        try:
            TrainingArguments(**{**defaults, key: value})
        except Exception:  # as above
            return f"{key}: {value!r}"
    return str(dict(keys))


def check_training(keys: Mapping[str, Any], arguments: TrainingArguments) -> None:
    """Refuse training arguments that mean nothing, or that the optimizer or the scheduler does not take.

    Args:
        keys: what the recipe says.
        arguments: made of them.

    Raises:
        SurgicalError: the message names the key, its value and what it may be.

    Example:
        >>> check_training({"weight_decay": -1}, TrainingArguments("runs", weight_decay=-1))
        Traceback (most recent call last):
        surgical_peft.errors.SurgicalError: weight_decay: -1 ...
    """
    for key, value in keys.items():
        if key in _RANGES and isinstance(value, int | float):
            least, most = _RANGES[key]
            if not least <= value <= most:
                low = "above 0" if _RANGES[key] == _ABOVE_0 else f"{least:g} or more"
                high = (
                    "" if most == math.inf else ", below 1" if _RANGES[key] == _BELOW_1 else f", at most {most:.10g}"
                )
                raise SurgicalError(f"{key}: {value!r} is out of range for a training: {low}{high}.")
    if arguments.max_steps == 0 or arguments.max_steps < -1:
        raise SurgicalError(
            f"max_steps: {arguments.max_steps} trains nothing: 1 or more, or leave it out and give num_train_epochs."
        )
    (strategy,) = (entry for entry in fields(TrainingArguments) if entry.name == "train_sampling_strategy")
    known = strategy.metadata["choices"]
    if arguments.train_sampling_strategy not in known:
        raise SurgicalError(
            f"train_sampling_strategy: {arguments.train_sampling_strategy!r} is unknown: one of {', '.join(known)}."
        )
    try:
        get_reporting_integration_callbacks(arguments.report_to)
    except Exception as error:  # names that it does not know, and what is no name
        raise SurgicalError(f"report_to: {keys.get('report_to')!r}: {reason_of(error)}") from error
    _try(arguments)


def _try(arguments: Any) -> None:
    """Make the optimizer and the scheduler, for one weight."""
    weight: Any = nn.Linear(2, 2)
    keys = "optim, optim_args, learning_rate, adam_*"
    if arguments.optim_target_modules is not None:
        return  # such an optimizer looks its modules up in the model
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, weight)
        optimizer: torch.optim.Optimizer = kind(weight.parameters(), **options)
        keys = "lr_scheduler_type, lr_scheduler_kwargs, warmup_steps"
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=arguments.get_warmup_steps(100),
            num_training_steps=100,
            scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
        )
    except Exception as error:  # whatever an optimizer or a scheduler does not like
        raise SurgicalError(f"{keys}: a training cannot begin with these: {reason_of(error)}") from error
    for pair in str(arguments.optim_args or "").replace(" ", "").split(","):
        name = pair.partition("=")[0]
        if name and not _is_read(arguments, name, weight):
            raise SurgicalError(
                f"optim_args: {arguments.optim_args!r}: transformers gives no {name!r} to {arguments.optim}; leave it "
                "out, or choose an optimizer that takes it."
            )


def _is_read(arguments: Any, name: str, weight: Any) -> bool:
    """True if an entry of `optim_args` changes what the optimizer is given."""
    without, of_it = copy.copy(arguments), copy.copy(arguments)
    without.optim_args, of_it.optim_args = None, f"{name}=0.123"
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(of_it, weight)
        return bool((kind, options) != Trainer.get_optimizer_cls_and_kwargs(without, weight))
    except Exception:  # it takes another kind of value
        return True
