"""LP-FT: the head first, then everything."""

from __future__ import annotations

from .stages import Stage, Stages


def lp_ft(epochs: int, lr_multiplier: float = 1.0, hard: bool = True) -> Stages:
    """Linear probing, then fine-tuning: `epochs` epochs train the head alone, the rest everything that is tuned.

    So that a new head does not distort the features while it is still random. Needs `SurgicalCallback` among the
    Trainer's callbacks, and a head among the tuned blocks; the pooler of a bare encoder is none.

    Args:
        epochs: how long the head is trained alone; the paper gives it half of all epochs.
        lr_multiplier: factor on the learning rate while it is; a head alone often takes a larger one.
        hard: freeze; False = rate 0 only, which saves nothing and works under DDP.

    Source: Kumar et al. 2022 (arXiv 2202.10054).

    Example:
        >>> optimizer = surgical_optimizer(args, policy=policies.lp_ft(epochs=5))
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=optimizer, callbacks=[SurgicalCallback()])
    """
    return Stages((Stage("head", epochs=epochs, lr_multiplier=lr_multiplier), Stage("all")), hard)
