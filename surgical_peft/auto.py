"""`get_surgical_model`: choose the blocks if the config leaves it open, then wrap the model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from .choosing import choose_blocks
from .criteria.budget import half_of
from .errors import SurgicalError
from .scoring.batches import LossFunction
from .tuner.config import SurgicalConfig


def get_surgical_model(
    model: nn.Module,
    config: SurgicalConfig,
    dataloader: Iterable[Any] | None = None,
    *,
    num_batches: int | None = None,
    loss_fn: LossFunction | None = None,
    steps: float | None = None,
    **kwargs: Any,
) -> PeftModel:
    """Choose the blocks if the config says `"auto"`, then wrap the model with `peft.get_peft_model`.

    Args:
        model: the model to tune; scoring leaves it untouched.
        config: with `blocks="auto"`, `criterion` (default `probe`) scores the blocks and the `num_blocks` highest that
            can be tuned are taken; without a number, short joint trainings decide how many. The caller's config is not
            changed; the model's holds the names and the record.
        dataloader: labelled batches of the new data, needed for `"auto"`; those of the training split, not of the
            test split.
        num_batches: how many batches to score on; default is what the criterion asks for.
        loss_fn: `(model, batch) -> loss`; default is the model's own loss.
        steps: how many steps the training will have, more than 0, each on a batch as large as those of `dataloader`;
            with gradient accumulation so many times more. Choosing then costs at most half of that training: on fewer
            batches, with fewer short trainings, or by gradients alone where that is all there is room for. Default:
            not known, and no limit.
        **kwargs: passed on to `get_peft_model` (`adapter_name`, ...).

    Raises:
        SurgicalError: `"auto"` without a dataloader, `steps` that are no number above 0 or too few to choose anything
            by (says how many it takes), or anything that scoring or wrapping refuses.

    Example:
        >>> model = get_surgical_model(model, SurgicalConfig(blocks="auto"), dataloader)
        >>> model.peft_config["default"].blocks
        ['head']
    """
    budget = None if steps is None else half_of(steps)
    config = copy.deepcopy(config)
    if config.blocks == "auto":
        if dataloader is None:
            raise SurgicalError(
                "blocks='auto' needs data to choose by: get_surgical_model(model, config, dataloader) with labelled "
                "batches."
            )
        config, _ = choose_blocks(model, config, dataloader, num_batches, loss_fn, budget)
    return get_peft_model(model, config, **kwargs)
