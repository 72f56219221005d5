"""Auto-RGN with the settings of the paper's code."""

from __future__ import annotations

from .auto_rgn import auto_rgn
from .policy import Policy


def auto_rgn_paper() -> Policy:
    """Auto-RGN as the paper's code does it: each tensor by itself, 5 batches every epoch, Adam's moments dropped.

    `auto_rgn(every="epoch", num_batches=5, granularity="tensor", state="reset")`. It needs `SurgicalCallback` among
    the Trainer's callbacks. Two things differ: batches are drawn at random rather than the first five of the loader,
    and the head and tensors that are all zero keep the full rate, where the code lets the head set the scale and
    divides by zero. We recommend `auto_rgn()`, which keeps the moments and needs no extra pass.

    Source: Lee et al. 2022 (arXiv 2210.11466), `main.py` of its code.

    Example:
        >>> optimizer = surgical_optimizer(args, policy=policies.auto_rgn_paper())
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=optimizer, callbacks=[SurgicalCallback()])
    """
    return auto_rgn(every="epoch", num_batches=5, granularity="tensor", state="reset")
