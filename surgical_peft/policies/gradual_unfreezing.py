"""Gradual unfreezing: one more block each epoch."""

from __future__ import annotations

from dataclasses import dataclass

from ..validation import check_cadence, check_choice
from .policy import STATE_POLICIES, Policy, TrainingState


@dataclass(frozen=True)
class GradualUnfreezing(Policy):
    """Train the head first, then one more block at each interval, until all are trained.

    From last to first, the first interval trains the final norm and the head, the next one also the last repeated
    block, and so on down to the embeddings. From first to last it trains the embeddings and the head, then also the
    first block, and so on. Blocks that are not tuned at all take no turn. A bare encoder has no head, as its
    pooler is none: the first interval trains its last block as well, since the loss may reach nothing behind that.

    Args:
        direction: `"last_to_first"` (ULMFiT) or `"first_to_last"`.
        every: the interval: an `"epoch"`, which needs `SurgicalCallback` among the Trainer's callbacks, or so many
            steps.
        hard: freeze; False = rate 0 only, which saves nothing and works under DDP.
        state_policy: what being frozen does to the optimizer's state; blocks are never frozen again, so it is all one.

    Source: Howard and Ruder 2018, ULMFiT (arXiv 1801.06146). Lee et al. 2022 rank it below full fine-tuning.

    Example:
        >>> optimizer = surgical_optimizer(args, policy=policies.gradual_unfreezing())
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=optimizer, callbacks=[SurgicalCallback()])
    """

    direction: str = "last_to_first"
    every: str | int = "epoch"
    hard: bool = True
    state_policy: str = "keep"

    def __post_init__(self) -> None:
        check_choice("gradual_unfreezing", "direction", self.direction, ("last_to_first", "first_to_last"))
        check_cadence("gradual_unfreezing", self.every, ("epoch",))
        check_choice("gradual_unfreezing", "state_policy", self.state_policy, STATE_POLICIES)

    @property
    def by_epoch(self) -> bool:
        return self.every == "epoch"

    def plan(self, training: TrainingState) -> dict[str, float] | None:
        turn = (training.epoch or 0) if isinstance(self.every, str) else training.step // self.every
        blocks = training.blocks
        depth_of = dict(blocks.depths)
        if training.repeated and not blocks.tied and blocks.heads == blocks.poolers:
            last = max(depth_of[name] for name in training.repeated)  # the loss may reach nothing behind it
            depth_of |= {name: min(depth_of[name], last) for name in training.names}
        order = sorted({depth_of[name] for name in training.names}, reverse=self.direction == "last_to_first")
        thawed = set(order[: turn + 1])
        return training.only([*training.heads, *(name for name in training.names if depth_of[name] in thawed)])
